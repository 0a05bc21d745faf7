// SPDX-License-Identifier: MIT
/// \file
/// What the routing of one layer did in one pass, in numbers.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/types.hpp>

namespace weir {

/// Load, drops, entropy and losses of one layer that routes tokens, in one pass. Padding is not
/// counted.
struct LayerReport {
  Index tokens = 0;            ///< Real tokens.
  Index assignments = 0;       ///< Assignments of tokens to experts, dropped or not.
  Index dropped = 0;           ///< Assignments beyond a capacity.
  Index dropped_tokens = 0;    ///< Tokens that kept no expert at all.
  Index switched_off = 0;      ///< Experts that the pass allowed to no real token.
  std::vector<Index> load;     ///< Assignments of each expert, dropped or not.
  std::vector<double> weight;  ///< The sum of the weights that the selector gave each expert.
  std::vector<Index> kept;     ///< Assignments of each expert that it computed.
  double entropy = 0.0;        ///< Mean over tokens of -sum_e p_e ln p_e, in nats.

  /// The value that the forward pass computed for each auxiliary loss, by its balancer's name and
  /// scaled by its coefficient. Empty if the pass computed none.
  std::vector<std::pair<std::string, double>> losses;

  /// The share of assignments that were dropped; 0 without any.
  double drop_rate() const {
    return assignments > 0 ? static_cast<double>(dropped) / static_cast<double>(assignments) : 0.0;
  }

  /// max_e load_e / mean_e load_e, the mean being that of the experts that are not switched off. It
  /// is 1 if the load is level or there is none, and their number if one of them has all of it.
  double imbalance() const {
    if (assignments == 0) return 1.0;
    Index largest = 0;
    for (const Index l : load) largest = std::max(largest, l);
    const Index experts = static_cast<Index>(load.size()) - switched_off;
    return static_cast<double>(largest) * static_cast<double>(experts) /
           static_cast<double>(assignments);
  }
};

}  // namespace weir
