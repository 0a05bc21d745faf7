// SPDX-License-Identifier: MIT
// Draws what moe_bench and peers_bench measured, or writes it as Markdown tables:
//
//     moe_bench --benchmark_out=moe.json; peers_bench --benchmark_out=peers.json
//     plot moe.json peers.json > moe.svg
//     plot --markdown moe.json peers.json > tables.md
//
// Rows with the most threads and with tokens spread evenly are shown; of a row that occurs more
// than once, also in several files, the last.
#include <algorithm>
#include <cmath>
#include <exception>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "support/mixture.hpp"

namespace {

namespace bench = weir::bench;
using Json = nlohmann::json;

// Where a bar belongs, in the order in which bars are shown.
using Group = std::pair<bool, long>;                 // Whether it is training; tokens.
using Series = std::pair<bool, std::string>;         // Whether it is bfloat16; name and style.
using Key = std::tuple<std::string, Group, Series>;  // With the name of the shape.

struct Bar {
  double length = 0.0;  ///< On the axis; a negative one points to the left.
  std::string label, meaning;
  bool striped = false;
};

/// A chart for each shape, side by side, in which each group has room for a bar of each series.
struct Panel {
  std::string heading, note;
  double begin, end;  ///< Of the axis.
  std::map<double, std::string> ticks;
  std::map<Key, Bar> bars = {};

  template <std::size_t part>
  auto all() const {
    std::set<std::tuple_element_t<part, Key>> all;
    for (const auto& [key, bar] : bars) all.insert(std::get<part>(key));
    return all;
  }
};

struct Results {
  Panel limits{"Percent of the machine's limit",
               "The limit is the time for the arithmetic alone, or that for reading the weights of "
               "the experts in use alone (striped), whichever is longer.",
               0.0,
               100.0,
               {{0, "0"}, {25, "25"}, {50, "50"}, {75, "75"}, {100, "100"}}};
  Panel peers{"Times as fast as",  // On a logarithmic axis.
              "The same layer, weights and tokens, in turns; 1 is as fast.",
              0.0,
              1.0,
              {{-1, "½"}, {0, "1"}, {1, "2"}, {2, "4"}, {3, "8"}, {4, "16"}, {5, "32"}}};
  long threads = 0;
  Json context = Json::object();
};

std::string fixed(double value, int digits) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(digits) << value;
  return text.str();
}

Bar limits_bar(const Json& row) {
  const double percent = row.at("limit%");
  const bool memory = row.at("bandwidth%") > row.at("peak%");
  return {std::min(percent, 100.0), fixed(percent, 0),
          fixed(row.at("GFLOP/s"), 0) + " GFLOP/s, " + fixed(percent, 0) + " % of " +
              (memory ? "memory" : "arithmetic"),
          memory};
}

Bar peers_bar(const Json& row) {
  const double ratio = row.at("ratio");
  return {std::log2(ratio), fixed(ratio, ratio < 2.0 ? 2 : 1), fixed(ratio, 2) + "×"};
}

void read(const std::string& file, Results& results) {
  static const std::regex row_name(
      "(moe|peers)/([^/]+)/(fp32|bf16)(-trainable)?/(forward|training)/tokens:([0-9]+)/([^/]+)"
      "/threads:([0-9]+)(/.*)?");
  std::ifstream stream(file);
  if (!stream) throw std::runtime_error(file + ": cannot be read");
  Json json = Json::parse(stream, nullptr, false);
  if (!json.is_object() || !json["context"].is_object() || !json["benchmarks"].is_array()) {
    throw std::runtime_error(file + ": is not the JSON of Google Benchmark's --benchmark_out");
  }
  results.context.update(json["context"]);
  for (const Json& row : json["benchmarks"]) {
    const auto name = row.at("name").get<std::string>();
    std::smatch part;
    const bool measured =
        row.value("run_type", "") == "iteration" && !row.value("error_occurred", false);
    if (!measured || !std::regex_match(name, part, row_name)) continue;
    const bool training = part[5] == "training";
    const long threads = std::stol(part[8]);
    // A forward pass of trainable weights is part of the training that is shown.
    const bool unusual = part[7] == "skewed" || (part[4].matched && !training);
    if (unusual || threads < results.threads) continue;
    if (threads > results.threads) results.limits.bars.clear(), results.peers.bars.clear();
    results.threads = threads;
    const bool peer = part[1] == "peers";
    const Series series(part[3] == "bf16", (peer ? part[7].str() + ' ' : "") + part[3].str());
    const Key key(part[2], {training, std::stol(part[6])}, series);
    Panel& panel = peer ? results.peers : results.limits;
    const Bar& bar = panel.bars[key] = peer ? peers_bar(row) : limits_bar(row);
    panel.begin = std::min(panel.begin, bar.length);
    panel.end = std::max(panel.end, bar.length);
  }
}

std::string name_of(const Group& group) {
  return std::to_string(group.second) + (group.first ? ", training" : "");
}

void write_table(const Panel& panel) {
  const auto all_series = panel.all<2>();
  std::cout << "| shape | tokens |";
  for (const Series& series : all_series) std::cout << ' ' << series.second << " |";
  std::cout << "\n| --- | ---: |";
  for (std::size_t i = 0; i < all_series.size(); ++i) std::cout << " ---: |";
  for (const std::string& shape : panel.all<0>()) {
    for (const Group& group : panel.all<1>()) {
      std::cout << "\n| " << shape << " | " << name_of(group) << " |";
      for (const Series& series : all_series) {
        const auto bar = panel.bars.find({shape, group, series});
        std::cout << ' ' << (bar == panel.bars.end() ? "" : bar->second.meaning) << " |";
      }
    }
  }
  std::cout << "\n\n";
}

constexpr double kWidth = 980.0;
constexpr double kMargin = 32.0;
constexpr double kBar = 11.0;

/// The style sheet, stripes, and a white ground, so that it can be read where the page is dark.
constexpr const char* kHead = R"svg(<style>
text { font: 11px -apple-system, 'Segoe UI', 'Noto Sans', 'DejaVu Sans', sans-serif; fill: #656d76 }
.title { font-size: 22px } .heading { font-size: 16px } .shape { font-size: 14px }
.title, .heading, .shape { font-weight: 600; fill: #1f2328 }
.group, .legend { font-size: 12px; fill: #1f2328 } .group, .tokens { text-anchor: end }
.tick { font-size: 10px; text-anchor: middle } path { stroke: #e6e9ed } .start { stroke: #9aa4af }
.value { font-size: 10.5px; fill: #1f2328; paint-order: stroke; stroke: #fff; stroke-width: 3px }
.fp32 { fill: #3b76af } .bf16 { fill: #ef8536 }
.Eigen { fill: #7f6bb2 } .oneDNN { fill: #2a9d8f } .libtorch { fill: #d1495b }
.Eigen.bf16 { fill: #c9c0e2 } .oneDNN.bf16 { fill: #a3d6d0 } .libtorch.bf16 { fill: #edb5bd }
.stripes { fill: url(#stripes) }
</style>
<pattern id="stripes" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<rect width="2.5" height="5" fill="#fff" fill-opacity="0.45"/></pattern>
<rect width="100%" height="100%" rx="12" fill="#fff"/>
)svg";

void draw_text(std::ostream& svg, double x, double y, const char* style, std::string text) {
  text = std::regex_replace(text, std::regex("&"), "&amp;");
  text = std::regex_replace(text, std::regex("<"), "&lt;");
  svg << "<text x='" << x << "' y='" << y << "' class='" << style << "'>" << text << "</text>\n";
}

void draw_bar(std::ostream& svg, double x, double y, double width, const std::string& style,
              const std::string& meaning) {
  svg << "<rect x='" << x << "' y='" << y << "' width='" << width << "' height='" << kBar
      << "' rx='2' class='" << style << "'><title>" << meaning << "</title></rect>\n";
}

/// How many experts a shape has, how large each is, and how many a token visits.
std::string describe(const std::string& name) {
  for (const bench::Shape& shape : bench::kShapes) {
    if (shape.name != name) continue;
    return std::to_string(shape.experts) + " of " + std::to_string(shape.d_model) + " × " +
           std::to_string(shape.d_hidden) + ", top " + std::to_string(shape.k) +
           (shape.shared > 0 ? " + " + std::to_string(shape.shared) + " shared" : "");
  }
  return "";
}

/// Returns where the panel ends.
double draw(std::ostream& svg, const Panel& panel, double top) {
  const auto shapes = panel.all<0>();
  const auto groups = panel.all<1>();
  const auto all_series = panel.all<2>();
  const auto size = [](const auto& set) { return static_cast<double>(set.size()); };
  const auto place = [](const auto& set, const auto& value) {
    return static_cast<double>(std::distance(set.begin(), set.find(value)));
  };
  constexpr double kLeft = 132.0;  // Of the first chart.
  constexpr double kStep = kBar + 2.0;
  const double group_step = kStep * size(all_series) + 9.0;
  const double shape_step = (kWidth + 16.0 - kLeft) / size(shapes);
  const double scale = (shape_step - 58.0) / (panel.end - panel.begin);
  const auto x_of = [&](const std::string& shape, double on_axis) {
    return kLeft + shape_step * place(shapes, shape) + scale * (on_axis - panel.begin);
  };
  const auto y_of = [&](const Group& group) {
    return top + 98.0 + group_step * place(groups, group);
  };
  const double bottom = top + 98.0 + group_step * size(groups);

  draw_text(svg, kMargin, top, "heading", panel.heading);
  draw_text(svg, kMargin, top + 18.0, "note", panel.note);
  for (double x = kMargin + 300.0; const Series& series : all_series) {
    draw_bar(svg, x, top - 9.5, kBar, series.second, series.second);
    draw_text(svg, x + 17.0, top, "legend", series.second);
    x += 110.0;
  }
  for (const Group& group : groups) {
    draw_text(svg, kLeft - 10.0, y_of(group) + 9.8, "group", name_of(group));
  }
  draw_text(svg, kLeft - 10.0, top + 86.0, "tokens", "tokens");
  for (const std::string& shape : shapes) {
    draw_text(svg, x_of(shape, panel.begin), top + 47.0, "shape", shape);
    draw_text(svg, x_of(shape, panel.begin), top + 63.0, "note", describe(shape));
    for (const auto& [at, text] : panel.ticks) {
      if (at < panel.begin || at > panel.end) continue;
      svg << "<path d='M" << x_of(shape, at) << ' ' << top + 91.0 << 'V' << bottom << "' class='"
          << (at == 0.0 ? "start" : "") << "'/>\n";
      draw_text(svg, x_of(shape, at), top + 86.0, "tick", text);
    }
  }
  for (const auto& [key, bar] : panel.bars) {
    const auto& [shape, group, series] = key;
    const double y = y_of(group) + kStep * place(all_series, series);
    const double left = x_of(shape, std::min(bar.length, 0.0));
    const double right = x_of(shape, std::max(bar.length, 0.0));
    const std::string meaning =
        shape + ", " + name_of(group) + ", " + series.second + ": " + bar.meaning;
    draw_bar(svg, left, y, right - left, "bar " + series.second, meaning);
    if (bar.striped) draw_bar(svg, left, y, right - left, "stripes", meaning);
    draw_text(svg, right + 5.0, y + 9.3, "value", bar.label);
  }
  return bottom;
}

void write_picture(const Results& results) {
  const std::string threads = std::to_string(results.threads);
  std::string machine = results.context.value("cpu", "") + " · " + threads + " threads · ";
  for (const auto& [name, value] : results.context.items()) {
    const bool limit = name.starts_with("limits/") && name.ends_with(":" + threads);
    if (limit) machine += name.substr(7, 4) + ' ' + value.get<std::string>() + " · ";
    if (name.starts_with("peers/")) machine += value.get<std::string>() + " · ";
  }
  machine += results.context.value("date", "").substr(0, 10);

  std::ostringstream svg;
  svg << std::fixed << std::setprecision(1);
  draw_text(svg, kMargin, 46.0, "title", "weir: mixture-of-experts layers");
  draw_text(svg, kMargin, 67.0, "note", machine);
  double bottom = 67.0;
  for (const Panel* panel : {&results.limits, &results.peers}) {
    if (!panel->bars.empty()) bottom = draw(svg, *panel, bottom + 44.0);
  }
  std::cout << "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 " << kWidth << ' '
            << bottom + kMargin << "' width='" << kWidth << "'>\n"
            << kHead << svg.str() << "</svg>\n";
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> files(argv + 1, argv + argc);
  const bool markdown = std::erase(files, "--markdown") > 0;
  try {
    Results results;
    for (const std::string& file : files) read(file, results);
    if (results.threads == 0) throw std::runtime_error("no rows of moe_bench or peers_bench");
    for (const Panel* panel : {&results.limits, &results.peers}) {
      if (markdown && !panel->bars.empty()) write_table(*panel);
    }
    if (!markdown) write_picture(results);
  } catch (const std::exception& error) {
    std::cerr << "plot: " << error.what() << "\nusage: plot [--markdown] FILE.json...\n";
    return 1;
  }
}
