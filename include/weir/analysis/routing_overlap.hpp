// SPDX-License-Identifier: MIT
/// \file
/// Whether two models, or two checkpoints of one, send the same tokens to the same experts.
#pragma once

#include <algorithm>
#include <span>
#include <string_view>
#include <vector>

#include <weir/analysis/bootstrap.hpp>
#include <weir/analysis/load_statistics.hpp>
#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Agreement of two routings of the same tokens.
struct RoutingOverlap {
  Estimate shared;  ///< Mean over tokens of |S_t and S'_t| / max(|S_t|, |S'_t|).
                    ///< By chance: min(k, k') / experts.
  Estimate first;   ///< The share of tokens with the same first choice. By chance: 1 / experts.
};

/// How far a layer of one trace agrees with one of another trace of the same tokens (Xue et al.
/// 2024, arXiv:2402.01739, section 4.2: routing of checkpoints, "early routing learning").
/// \param in_a     A layer of a.
/// \param in_b     A layer of b; tokens may have another number of experts in it.
/// \throws ConfigError  unless both have the same sequences, positions and ids, and the layers as
///                      many experts.
inline RoutingOverlap routing_overlap(const TracedTokens& a, const TracedLayer& in_a,
                                      const TracedTokens& b, const TracedLayer& in_b,
                                      const BootstrapConfig& config = {}) {
  const auto same = [](const TracedTokens::Sequence& s, const TracedTokens::Sequence& t) {
    return s.id == t.id && s.begin == t.begin && s.end == t.end;
  };
  if (!std::equal(a.sequences.begin(), a.sequences.end(), b.sequences.begin(), b.sequences.end(),
                  same) ||
      a.position != b.position || a.id != b.id) {
    throw_error<ConfigError>(
        "routing_overlap: the traces have different tokens, expected the same");
  }
  if (in_a.experts != in_b.experts) {
    throw_error<ConfigError>("routing_overlap: layer '", in_a.name, "' has ", in_a.experts,
                             " experts and '", in_b.name, "' ", in_b.experts,
                             ", expected as many in both");
  }
  const auto agreement = [&](std::span<const Index> sequences, bool by_chance) {
    double tokens = 0.0;
    double shared = 0.0;
    double first = 0.0;
    for_each_traced(a, in_a, sequences, [&](Index t, const auto&) {
      if (in_a.choices(t) == 0 || in_b.choices(t) == 0) return;
      tokens += 1.0;
      const auto most = static_cast<double>(std::max(in_a.choices(t), in_b.choices(t)));
      const auto experts = static_cast<double>(in_a.experts);
      if (by_chance) {
        shared += static_cast<double>(std::min(in_a.choices(t), in_b.choices(t))) / experts;
        first += 1.0 / experts;
        return;
      }
      first += in_a.first_choice(t) == in_b.first_choice(t) ? 1.0 : 0.0;
      const std::span<const Index> others = in_b.experts_of(t);
      for (const Index e : in_a.experts_of(t)) {
        shared += std::find(others.begin(), others.end(), e) != others.end() ? 1.0 / most : 0.0;
      }
    });
    if (tokens == 0.0) return std::vector<double>{kUnknown, kUnknown};
    return std::vector<double>{shared / tokens, first / tokens};
  };
  const std::vector<Estimate> e = estimate(
      a, [&](std::span<const Index> sequences) { return agreement(sequences, false); }, config, 0.0,
      1.0);
  RoutingOverlap result = {e[0], e[1]};
  const std::vector<double> chance = agreement(a.all(), true);
  result.shared.chance = chance[0];
  result.first.chance = chance[1];
  return result;
}

/// How far the layer of this name agrees in both.
/// \throws ConfigError  as above, and if one of them has no such layer.
inline RoutingOverlap routing_overlap(const TracedTokens& a, const TracedTokens& b,
                                      std::string_view layer, const BootstrapConfig& config = {}) {
  return routing_overlap(a, a.layer(layer), b, b.layer(layer), config);
}

}  // namespace weir
