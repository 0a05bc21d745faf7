// SPDX-License-Identifier: MIT
/// \file
/// Whether neighbouring tokens go to the same experts.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include <weir/analysis/bootstrap.hpp>
#include <weir/analysis/load_statistics.hpp>
#include <weir/analysis/random_routing.hpp>
#include <weir/analysis/token_groups.hpp>
#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Which experts of two tokens have to agree.
enum class Repeat {
  kFirst,  ///< Their first choices.
  kAny,    ///< Any of the one with any of the other.
};

/// How often a token and the one after it go to the same expert, by the group of the former (Jiang
/// et al. 2024, arXiv:2401.04088, table 5: "first choice" and "first or second choice"):
///
///     rate_g = pairs (t, t + 1) with t in g that share an expert / pairs (t, t + 1) with t in g
///
/// Pairs are of one sequence and of neighbouring positions, both of which the layer has seen.
/// \return         [groups]. By chance: 1 / E, or the mean of `chance_of_shared_expert`.
inline std::vector<Estimate> repeat_rate(const TracedTokens& tokens, const TracedLayer& layer,
                                         const TokenGroups& groups, Repeat repeat,
                                         const BootstrapConfig& config = {}) {
  const auto repeats = [&](Index t) {
    if (repeat == Repeat::kFirst) return layer.first_choice(t) == layer.first_choice(t + 1);
    const std::span<const Index> next = layer.experts_of(t + 1);
    return std::any_of(
        layer.expert.begin() + layer.first(t), layer.expert.begin() + layer.last(t),
        [&](Index e) { return std::find(next.begin(), next.end(), e) != next.end(); });
  };
  const auto mean_over_pairs = [&](std::span<const Index> sequences, auto&& value) {
    std::vector<double> sum(static_cast<std::size_t>(groups.count()));
    std::vector<double> pairs(sum.size());
    for_each_traced(tokens, layer, sequences, [&](Index t, const TracedTokens::Sequence& s) {
      if (groups.of[t] < 0 || !tokens.is_followed(t, s) || layer.choices(t) == 0 ||
          layer.choices(t + 1) == 0) {
        return;
      }
      sum[static_cast<std::size_t>(groups.of[t])] += value(t);
      pairs[static_cast<std::size_t>(groups.of[t])] += 1.0;
    });
    for (std::size_t g = 0; g < sum.size(); ++g) {
      sum[g] = pairs[g] > 0.0 ? sum[g] / pairs[g] : kUnknown;
    }
    return sum;
  };
  std::vector<Estimate> estimates = estimate(
      tokens,
      [&](std::span<const Index> sequences) {
        return mean_over_pairs(sequences, [&](Index t) { return repeats(t) ? 1.0 : 0.0; });
      },
      config, 0.0, 1.0);
  const std::vector<double> chance = mean_over_pairs(tokens.all(), [&](Index t) {
    if (repeat == Repeat::kFirst) return 1.0 / static_cast<double>(layer.experts);
    return chance_of_shared_expert(layer.experts, layer.choices(t), layer.choices(t + 1));
  });
  for (std::size_t g = 0; g < estimates.size(); ++g) estimates[g].chance = chance[g];
  return estimates;
}

}  // namespace weir
