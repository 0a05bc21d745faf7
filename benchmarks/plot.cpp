// SPDX-License-Identifier: MIT
// Draws what moe_bench and peers_bench found, and writes it as tables:
//
//     moe_bench --benchmark_out=moe.json; peers_bench --benchmark_out=peers.json
//     plot peers.json moe.json --svg benchmarks.svg --markdown > tables.md
//
// Rows with the most threads and with tokens spread evenly are drawn. Rows that occur more than
// once, also in several files, count with their median; the machine's limits are the last file's.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "plot/picture.hpp"
#include "plot/results.hpp"
#include "plot/svg.hpp"

namespace {

namespace bench = weir::bench;
using bench::fixed;
using bench::Results;
using bench::Selection;

struct Options {
  std::vector<std::string> files;
  std::vector<std::string> shapes;
  std::string svg;
  bool markdown = false;
};

std::string precision_of(const bench::RowKey& key) {
  return key.precision() + (key.mode == "training" ? ", training" : "");
}

void write_limits(std::ostream& out, const Selection& selection) {
  out << "| shape | tokens | precision | ms | GFLOP/s | % of limit | bound by |\n"
         "| --- | ---: | --- | ---: | ---: | ---: | --- |\n";
  for (const std::string& shape : selection.shapes) {
    for (const bench::Group& group : selection.groups) {
      for (const auto& [key, figures] : selection.bars(shape, group)) {
        out << "| " << shape << " | " << key.tokens << " | " << precision_of(key) << " | "
            << fixed(figures["real_time"], 2) << " | " << fixed(figures["GFLOP/s"], 0) << " | "
            << fixed(figures["limit%"], 0) << " | "
            << (bench::is_bound_by_memory(figures) ? "memory" : "arithmetic") << " |\n";
      }
    }
  }
}

void write_peers(std::ostream& out, const Results& results, const Selection& selection) {
  out << "| shape | tokens | precision |";
  for (const std::string& peer : selection.details) {
    out << ' ' << results.name_of_peer(peer) << " |";
  }
  out << "\n| --- | ---: | --- |";
  for (std::size_t i = 0; i < selection.details.size(); ++i) out << " ---: |";
  out << '\n';
  for (const std::string& shape : selection.shapes) {
    for (const bench::Group& group : selection.groups) {
      const std::vector<Results::Row> bars = selection.bars(shape, group);
      std::vector<std::string> precisions;
      for (const auto& [key, figures] : bars) bench::add_once(precisions, precision_of(key));
      for (const std::string& precision : precisions) {
        out << "| " << shape << " | " << group.tokens << " | " << precision << " |";
        for (const std::string& peer : selection.details) {
          const auto cell = std::find_if(bars.begin(), bars.end(), [&](const auto& row) {
            return row.first.detail == peer && precision_of(row.first) == precision;
          });
          out << ' ' << (cell == bars.end() ? "" : fixed(cell->second["ratio"], 2) + "×") << " |";
        }
        out << '\n';
      }
    }
  }
}

void run(const Options& options) {
  Results results;
  for (const std::string& file : options.files) results.read(file);
  const Selection limits = bench::select(results, "moe", options.shapes);
  const Selection peers = bench::select(results, "peers", options.shapes);
  if (limits.empty() && peers.empty()) {
    throw std::runtime_error(
        "nothing to draw: no rows of moe_bench or peers_bench of these shapes");
  }
  if (!options.svg.empty()) {
    std::ofstream file(options.svg);
    file << bench::picture(results, limits, peers) << std::flush;
    if (!file) throw std::runtime_error(options.svg + ": cannot be written");
  }
  if (!options.markdown) return;
  if (!limits.empty()) write_limits(std::cout, limits);
  if (!limits.empty() && !peers.empty()) std::cout << '\n';
  if (!peers.empty()) write_peers(std::cout, results, peers);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("Draws what moe_bench and peers_bench found, and writes it as tables.");
  app.set_help_flag("-h,--help", "Print this and exit");
  app.add_option("FILE", options.files, "What --benchmark_out=FILE wrote; any number")->required();
  app.add_option("--svg", options.svg, "Draw to this file");
  app.add_flag("--markdown", options.markdown, "Print tables");
  app.add_option("--shapes", options.shapes, "Only these, such as A,B,C")->delimiter(',');
  try {
    app.parse(argc, argv);
    if (options.svg.empty() && !options.markdown) {
      throw CLI::RequiredError("--svg or --markdown");
    }
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  try {
    run(options);
  } catch (const std::exception& error) {
    std::cerr << "plot: " << error.what() << '\n';
    return 1;
  }
}
