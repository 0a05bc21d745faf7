// SPDX-License-Identifier: MIT
/// \file
/// What the routing of one pass did, in numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/parallel.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Load, drops, entropy and losses of one MoE layer in one pass. Padding is not in it.
struct MoEReport {
  Index tokens = 0;          ///< Real tokens.
  Index assignments = 0;     ///< Of tokens to experts, dropped or not.
  Index dropped = 0;         ///< Assignments beyond a capacity.
  Index dropped_tokens = 0;  ///< Tokens that kept no expert at all.
  std::vector<Index> load;   ///< Assignments of each expert, dropped or not.
  std::vector<Index> kept;   ///< Assignments of each expert that it computed.
  double entropy = 0.0;      ///< Mean over tokens of -sum_e p_e ln p_e, in nats.
  std::vector<std::pair<std::string, double>> losses;  ///< By balancer, scaled by coefficients;
                                                       ///< "router", if that has one of its own.

  /// The share of assignments that were dropped; 0 without any.
  double drop_rate() const {
    return assignments > 0 ? static_cast<double>(dropped) / static_cast<double>(assignments) : 0.0;
  }

  /// max_e load_e / mean_e load_e: 1 when level, `experts` when one has it all; 1 without load.
  double imbalance() const {
    Index largest = 0;
    for (const Index l : load) largest = std::max(largest, l);
    return assignments > 0 ? static_cast<double>(largest) * static_cast<double>(load.size()) /
                                 static_cast<double>(assignments)
                           : 1.0;
  }
};

/// The report of `routing`, without the losses.
template <class T>
MoEReport report_of(const Routing<T>& routing) {
  MoEReport report;
  report.assignments = routing.assignments();
  report.load.assign(static_cast<std::size_t>(routing.experts()), 0);
  report.kept = report.load;
  for (Index t = 0; t < routing.tokens(); ++t) {
    if (routing.is_padding(t)) continue;
    ++report.tokens;
    bool served = false;
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      const auto i = static_cast<std::size_t>(a);
      const auto e = static_cast<std::size_t>(routing.expert[i]);
      ++report.load[e];
      report.kept[e] += routing.kept[i];
      report.dropped += 1 - routing.kept[i];
      served = served || routing.kept[i] != 0;
    }
    report.dropped_tokens += served ? 0 : 1;
  }
  std::vector<double> entropy(static_cast<std::size_t>(routing.tokens()), 0.0);
  constexpr Index kCostOfLogarithm = 32;
  parallel_rows(routing.tokens(), kCostOfLogarithm * routing.experts(),
                [&](Index begin, Index end) {
                  for (Index t = begin; t < end; ++t) {
                    if (routing.is_padding(t)) continue;
                    for (const T p : routing.probabilities.row(t)) {
                      if (!(p > T(0))) continue;
                      entropy[static_cast<std::size_t>(t)] -=
                          static_cast<double>(p) * std::log(static_cast<double>(p));
                    }
                  }
                });
  report.entropy = std::accumulate(entropy.begin(), entropy.end(), 0.0);
  if (report.tokens > 0) report.entropy /= static_cast<double>(report.tokens);
  return report;
}

}  // namespace weir
