// SPDX-License-Identifier: MIT
/// \file
/// Passes of a mixture over the ranks of a job, as cluster_measure times them and cluster models
/// them.
#pragma once

#include <array>
#include <charconv>
#include <cstddef>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/parallel/cluster_model.hpp>
#include <weir/parallel/drawn_tokens.hpp>
#include <weir/parallel/placement.hpp>
#include <weir/parallel/traffic.hpp>

/// What is the same in all runs.
constexpr weir::Index kRunExperts = 12;  // As many on each of 2, 3 or 4 ranks.
constexpr weir::Index kRunChoices = 2;

/// One kind of run, and what it took.
struct ClusterRun {
  weir::Index ranks = 1;
  weir::Index tokens = 0;  ///< Of each rank.
  weir::Index d_model = 0;
  weir::Index d_hidden = 0;
  double forward =
      0.0;  ///< Seconds of a forward pass, from the first rank's start to the last's end.
  double backward = 0.0;
};

/// Where the tokens of all ranks go in such a run: known beforehand, so that a run can be counted
/// without being made.
inline weir::RoutedTokens tokens_of(const ClusterRun& run) {
  return weir::draw_tokens(
      {.popularity = weir::zipf_popularity(kRunExperts, 0.3, 1), .k = kRunChoices}, run.tokens,
      run.ranks, 7);
}

inline weir::Placement placement_of(const ClusterRun& run) {
  return weir::Placement::contiguous(kRunExperts, weir::RankNodes::single(run.ranks));
}

inline weir::Traffic traffic_of(const ClusterRun& run) {
  const weir::RoutedTokens tokens = tokens_of(run);
  const weir::Placement placement = placement_of(run);
  weir::Traffic traffic(placement.nodes(), weir::RowsSent::kPerAssignment);
  traffic.add(tokens.layer, placement, [&](weir::Index t) { return tokens.source[t]; });
  return traffic;
}

/// Rows of floats, and three products of a gated network, each two operations for each weight; in
/// `backward` twice as many.
inline weir::LayerWork work_of(const ClusterRun& run, bool backward) {
  const weir::Index row = 4 * run.d_model;
  const double weights = 3.0 * static_cast<double>(run.d_model * run.d_hidden);
  return {.sizes = {.dispatch = row, .combine = row},
          .flops_per_assignment = (backward ? 4.0 : 2.0) * weights};
}

constexpr std::string_view kRunHeader = "ranks,tokens,d_model,d_hidden,forward,backward";

/// A line of a file of runs.
inline std::string line_of(const ClusterRun& run) {
  std::string line;
  for (const weir::Index n : {run.ranks, run.tokens, run.d_model, run.d_hidden}) {
    line += std::to_string(n) + ',';
  }
  const auto seconds = [](double value) {
    std::array<char, 32> text{};
    return std::string(text.data(),
                       std::to_chars(text.data(), text.data() + text.size(), value).ptr);
  };
  line += seconds(run.forward) + ',' + seconds(run.backward);
  return line;
}

/// \throws ConfigError  if the file cannot be read or a line is none of `line_of`.
inline std::vector<ClusterRun> read_runs(const std::string& path) {
  std::ifstream file(path);
  if (!file) weir::throw_error<weir::ConfigError>(path, ": cannot be read");
  std::vector<ClusterRun> runs;
  std::string line;
  for (weir::Index number = 1; std::getline(file, line); ++number) {
    if (line.empty() || line == kRunHeader) continue;
    std::array<double, 6> values{};
    const char* at = line.data();
    const char* const end = line.data() + line.size();
    bool good = true;
    for (std::size_t i = 0; i < values.size() && good; ++i) {
      const auto [next, error] = std::from_chars(at, end, values[i]);
      const bool last = i + 1 == values.size();
      good = error == std::errc() && values[i] > 0.0 && (last ? next == end : next != end);
      good = good && (i < 4 ? values[i] <= 1e6 && values[i] == static_cast<int>(values[i])
                            : values[i] <= 1e6);
      if (good && !last) good = *next == ',';
      at = good && !last ? next + 1 : next;
    }
    const auto whole = [&](std::size_t i) { return static_cast<weir::Index>(values[i]); };
    if (!good || whole(0) > 256 || whole(1) > (1 << 24) / whole(0)) {
      weir::throw_error<weir::ConfigError>(path, ": line ", number, " is '", line, "', expected ",
                                           kRunHeader,
                                           " with numbers above 0, 256 ranks and 2^24 "
                                           "tokens of all at most");
    }
    runs.push_back({whole(0), whole(1), whole(2), whole(3), values[4], values[5]});
  }
  if (runs.empty()) weir::throw_error<weir::ConfigError>(path, ": has no runs");
  return runs;
}
