// SPDX-License-Identifier: MIT
/// \file
/// The picture for the README: bars against the machine's limits, and against other libraries.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "plot/results.hpp"
#include "plot/svg.hpp"
#include "support/mixture.hpp"

namespace weir::bench {

/// {"64 experts, 6 a token", "each 1024 × 512"} of a shape of the benchmarks; nothing of others.
inline std::array<std::string, 2> description_of(const std::string& shape) {
  const auto known = std::find_if(kShapes.begin(), kShapes.end(),
                                  [&](const Shape& candidate) { return candidate.name == shape; });
  if (known == kShapes.end()) return {};
  const std::string shared =
      known->shared > 0 ? " + " + std::to_string(known->shared) + " shared" : "";
  return {std::to_string(known->experts) + " experts, " + std::to_string(known->k) + shared +
              " a token",
          "each " + std::to_string(known->d_model) + " × " + std::to_string(known->d_hidden)};
}

inline constexpr double kWidth = 980.0;
inline constexpr double kMargin = 32.0;
inline constexpr double kLabels = 100.0;  ///< For the names of groups, left of the first column.
inline constexpr double kGap = 22.0;      ///< Between columns.
inline constexpr double kBar = 11.0;
inline constexpr double kBarStep = 13.0;
inline constexpr double kGroupGap = 9.0;
inline constexpr double kHeading = 98.0;  ///< From the heading of a panel to its charts.
inline constexpr double kSection = 44.0;  ///< From the end of a panel to the next heading.

inline constexpr std::string_view kInk = "#1f2328";
inline constexpr std::string_view kMuted = "#656d76";
inline constexpr std::string_view kFaint = "#e6e9ed";
inline constexpr std::string_view kStrong = "#9aa4af";
inline constexpr std::string_view kFloat = "#3b76af";
inline constexpr std::string_view kBfloat = "#ef8536";

inline constexpr Svg::Font kTitleFont = {22.0, kInk, true};
inline constexpr Svg::Font kHeadingFont = {16.0, kInk, true};
inline constexpr Svg::Font kShapeFont = {14.0, kInk, true};
inline constexpr Svg::Font kLegendFont = {12.0, kInk};
inline constexpr Svg::Font kGroupFont = {12.0, kInk, false, Svg::Anchor::kEnd};
inline constexpr Svg::Font kGroupsFont = {11.0, kMuted, false, Svg::Anchor::kEnd};
inline constexpr Svg::Font kSmallFont = {11.0, kMuted};
inline constexpr Svg::Font kTickFont = {10.0, kMuted, false, Svg::Anchor::kMiddle};
inline constexpr Svg::Font kValueFont = {10.5, kInk, false, Svg::Anchor::kStart, true};

/// Of the peers; in float and, paler, in bfloat16.
struct PeerColours {
  std::string_view full, pale;
};
inline constexpr std::array kPeers = {PeerColours{"#7f6bb2", "#c9c0e2"},
                                      PeerColours{"#2a9d8f", "#a3d6d0"},
                                      PeerColours{"#d1495b", "#edb5bd"}};
inline constexpr PeerColours kAnyPeer = {kStrong, "#d5dae0"};

/// A row of charts, one for each shape, that share the names of their groups.
class Panel {
 public:
  /// \param values   Room for what is written behind a bar.
  Panel(Svg& svg, const Selection& selection, double top, double values)
      : svg_(svg), selection_(selection), top_(top) {
    const auto columns = static_cast<double>(selection.shapes.size());
    column_ = (kWidth - 2 * kMargin - kLabels - (columns - 1) * kGap) / columns;
    axis_ = column_ - values;
    bottom_ = top_;
    for (const Group& group : selection.groups) {
      std::size_t most = 0;
      for (const std::string& shape : selection.shapes) {
        most = std::max(most, selection.bars(shape, group).size());
      }
      group_tops_.push_back(bottom_ + kGroupGap);
      group_heights_.push_back(kBarStep * static_cast<double>(most));
      bottom_ = group_tops_.back() + group_heights_.back();
    }
    bottom_ += kGroupGap;
  }

  double axis() const { return axis_; }
  double bottom() const { return bottom_; }

  /// Calls `draw_scale(left)` for each chart, then `draw_bar(row, left, y)` for each of its bars.
  template <class DrawScale, class DrawBar>
  void draw(DrawScale&& draw_scale, DrawBar&& draw_bar) {
    for (std::size_t g = 0; g < selection_.groups.size(); ++g) {
      svg_.text(kMargin + kLabels - 10.0, group_tops_[g] + 0.5 * group_heights_[g] + 3.5,
                selection_.groups[g].name(), kGroupFont);
    }
    svg_.text(kMargin + kLabels - 10.0, top_ - 8.0, "tokens", kGroupsFont);
    for (std::size_t s = 0; s < selection_.shapes.size(); ++s) {
      const double left = kMargin + kLabels + static_cast<double>(s) * (column_ + kGap);
      const auto [first, second] = description_of(selection_.shapes[s]);
      svg_.text(left, top_ - 55.0, selection_.shapes[s], kShapeFont);
      svg_.text(left, top_ - 40.0, first, kSmallFont);
      svg_.text(left, top_ - 26.0, second, kSmallFont);
      draw_scale(left);
      for (std::size_t g = 0; g < selection_.groups.size(); ++g) {
        double y = group_tops_[g];
        for (const auto& row : selection_.bars(selection_.shapes[s], selection_.groups[g])) {
          draw_bar(row, left, y);
          y += kBarStep;
        }
      }
    }
  }

  void tick(double x, const std::string& label, bool strong) {
    svg_.vertical(x, top_ - 3.0, bottom_, strong ? kStrong : kFaint);
    svg_.text(x, top_ - 8.0, label, kTickFont);
  }

  /// Behind a bar that ends at `x`.
  void value(double x, double y, const std::string& text) {
    svg_.text(x + 5.0, y + 9.3, text, kValueFont);
  }

 private:
  Svg& svg_;
  const Selection& selection_;
  double top_;
  double bottom_ = 0.0;
  double column_ = 0.0;
  double axis_ = 0.0;
  std::vector<double> group_tops_, group_heights_;
};

/// How a bar looks, and what that means.
struct LegendEntry {
  Svg::Fill fill;
  std::string text;
};

/// The heading of a panel, what its bars look like, and a line that says more.
inline void draw_heading(Svg& svg, double y, std::string_view heading, double width,
                         const std::vector<LegendEntry>& legend, std::string_view more) {
  constexpr double kLetter = 6.1;  // About the width of one.
  svg.text(kMargin, y, heading, kHeadingFont);
  double x = kMargin + width;
  for (const LegendEntry& entry : legend) {
    svg.rectangle(x, y - 9.5, kBar, kBar, 2.0, entry.fill);
    svg.text(x + 17.0, y, entry.text, kLegendFont);
    x += 17.0 + kLetter * static_cast<double>(entry.text.size()) + 20.0;
  }
  svg.text(kMargin, y + 18.0, more, kSmallFont);
}

/// What a bar stands for, in words.
inline std::string meaning(const RowKey& key, const std::string& value) {
  return key.shape + ", " + in_words({key.mode, key.tokens}) + ", " + key.precision() + ": " +
         value;
}

/// Percent of the limit. Returns where the panel ends.
inline double draw_limits(Svg& svg, const Selection& selection, double top) {
  constexpr double kFull = 100.0;
  draw_heading(svg, top, "Percent of the machine's limit", 300.0,
               {{{kFloat}, "fp32"},
                {{kBfloat}, "bf16"},
                {{kStrong}, "limited by arithmetic"},
                {{kStrong, true}, "limited by memory"}},
               "The limit is the time for the arithmetic alone, or that for reading the weights of "
               "the experts in use alone, whichever is longer.");
  Panel panel(svg, selection, top + kHeading, 30.0);
  const double scale = panel.axis() / kFull;
  panel.draw(
      [&](double left) {
        for (const int percent : {0, 25, 50, 75, 100}) {
          panel.tick(left + scale * percent, std::to_string(percent), percent % 100 == 0);
        }
      },
      [&](const Results::Row& row, double left, double y) {
        const auto& [key, figures] = row;
        const double percent = figures["limit%"];
        const bool memory = is_bound_by_memory(figures);
        const double width = scale * std::min(percent, kFull);
        svg.bar(left, y, width, kBar, {key.precision() == "bf16" ? kBfloat : kFloat, memory},
                meaning(key, fixed(percent, 1) + " % of the limit, which is " +
                                 (memory ? "memory" : "arithmetic")));
        panel.value(left + width, y, fixed(percent, 0));
      });
  return panel.bottom();
}

/// How many times as fast, on a logarithmic scale. Returns where the panel ends.
inline double draw_peers(Svg& svg, const Results& results, const Selection& selection, double top) {
  const auto colours_of = [&](const std::string& peer) {
    const auto found = std::find(selection.details.begin(), selection.details.end(), peer);
    const auto number = static_cast<std::size_t>(found - selection.details.begin());
    return kPeers[number % kPeers.size()];
  };
  std::vector<LegendEntry> legend;
  for (const std::string& peer : selection.details) {
    legend.push_back({{colours_of(peer).full}, results.name_of_peer(peer)});
  }
  legend.push_back({{kAnyPeer.full}, "fp32"});
  legend.push_back({{kAnyPeer.pale}, "bf16"});
  draw_heading(svg, top, "Times as fast as", 170.0, legend,
               "The same layer, weights and tokens, in turns; 1 is as fast.");

  double least = 1.0;
  double most = 2.0;
  for (const auto& [key, figures] : selection.rows) {
    least = std::min(least, figures["ratio"]);
    most = std::max(most, figures["ratio"]);
  }
  const double low = std::log2(least);
  const double high = std::log2(most);
  Panel panel(svg, selection, top + kHeading, 36.0);
  const double scale = panel.axis() / (high - low);
  panel.draw(
      [&](double left) {
        for (double power = std::ceil(low); power <= high; power += 1.0) {
          panel.tick(left + scale * (power - low), decimal(std::exp2(power)), power == 0.0);
        }
      },
      [&](const Results::Row& row, double left, double y) {
        const auto& [key, figures] = row;
        const double ratio = figures["ratio"];
        const double one = left - scale * low;
        const double end = one + scale * std::log2(ratio);
        svg.bar(
            std::min(one, end), y, std::abs(end - one), kBar,
            {key.precision() == "bf16" ? colours_of(key.detail).pale : colours_of(key.detail).full},
            meaning(key, fixed(ratio, 2) + " times as fast as " + key.detail));
        panel.value(std::max(one, end), y, fixed(ratio, ratio < 1.95 ? 2 : 1));
      });
  return panel.bottom();
}

/// "24 Nov 2026" of "2026-11-24T18:43:30+00:00".
inline std::string date_of(const Results& results) {
  constexpr std::array kMonths = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                  "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
  const std::string date = results.context("date");
  if (date.size() < 10) return date;
  const auto month = static_cast<std::size_t>(10 * (date[5] - '0') + date[6] - '0' - 1);
  if (month >= kMonths.size()) return date.substr(0, 10);
  const std::string day = date[8] == '0' ? date.substr(9, 1) : date.substr(8, 2);
  return day + ' ' + kMonths[month] + ' ' + date.substr(0, 4);
}

/// "AMD EPYC · 2 threads · 24 Nov 2026", as far as known.
inline std::string machine_of(const Results& results, long threads) {
  std::string text = results.context("cpu");
  const auto add = [&](const std::string& part) {
    if (!part.empty()) text += (text.empty() ? "" : " · ") + part;
  };
  add(std::to_string(threads) + (threads == 1 ? " thread" : " threads"));
  const auto limit = [&](const std::string& name) {
    return results.context("limits/" + name + "/threads:" + std::to_string(threads));
  };
  for (const std::string name : {"fp32", "bf16", "read"}) {
    if (!limit(name).empty()) add(name + ' ' + limit(name));
  }
  add(date_of(results));
  return text;
}

/// The text of the SVG file. Either selection may be empty.
inline std::string picture(const Results& results, const Selection& limits,
                           const Selection& peers) {
  const std::string title = "weir: mixture-of-experts layers";
  const std::string machine = machine_of(results, std::max(limits.threads, peers.threads));
  Svg svg;
  svg.text(kMargin, 46.0, title, kTitleFont);
  svg.text(kMargin, 67.0, machine, kSmallFont);
  double y = 67.0;
  if (!limits.empty()) y = draw_limits(svg, limits, y + kSection);
  if (!peers.empty()) y = draw_peers(svg, results, peers, y + kSection);
  return svg.str(kWidth, y + kMargin, title + ", " + machine);
}

}  // namespace weir::bench
