// SPDX-License-Identifier: MIT
/// \file
/// How a layer's tokens spread over its experts, in all and by group.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include <weir/analysis/bootstrap.hpp>
#include <weir/analysis/random_drops.hpp>
#include <weir/analysis/random_routing.hpp>
#include <weir/analysis/token_groups.hpp>
#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Calls `body(token, sequence)` for each token of the sequences that the layer has seen.
template <class Body>
void for_each_traced(const TracedTokens& tokens, const TracedLayer& layer,
                     std::span<const Index> sequences, Body&& body) {
  for (const Index s : sequences) {
    const TracedTokens::Sequence& sequence = tokens.sequences[static_cast<std::size_t>(s)];
    for (Index t = sequence.begin; t < sequence.end; ++t) {
      if (layer.recorded[t] != 0) body(t, sequence);
    }
  }
}

/// The share of experts by group (Jiang et al. 2024, arXiv:2401.04088, section 5; Xue et al. 2024,
/// arXiv:2402.01739, section 4):
///
///     share_ge = assignments of tokens of g to e / assignments of tokens of g
///
/// dropped ones included.
/// \return         [groups * experts], group by group. By chance: 1 / experts.
inline std::vector<Estimate> expert_share(const TracedTokens& tokens, const TracedLayer& layer,
                                          const TokenGroups& groups,
                                          const BootstrapConfig& config = {}) {
  const auto experts = static_cast<std::size_t>(layer.experts);
  const auto count = [&](std::span<const Index> sequences) {
    std::vector<double> share(static_cast<std::size_t>(groups.count()) * experts);
    for_each_traced(tokens, layer, sequences, [&](Index t, const auto&) {
      if (groups.of[t] < 0) return;
      double* const row = share.data() + static_cast<std::size_t>(groups.of[t]) * experts;
      for (const Index e : layer.experts_of(t)) row[e] += 1.0;
    });
    for (auto row = share.begin(); row != share.end(); row += layer.experts) {
      const double sum = std::accumulate(row, row + layer.experts, 0.0);
      for (auto v = row; v != row + layer.experts; ++v) *v = sum > 0.0 ? *v / sum : kUnknown;
    }
    return share;
  };
  std::vector<Estimate> estimates = estimate(tokens, count, config, 0.0, 1.0);
  for (Estimate& e : estimates) e.chance = 1.0 / static_cast<double>(layer.experts);
  return estimates;
}

namespace detail {

/// The share of choices that are lost on average, by group, of the tokens for which that is known.
/// \param lost     [tokens], how many of each; NaN if it is not known.
inline std::vector<double> lost_share(const TracedTokens& tokens, const TracedLayer& layer,
                                      const TokenGroups& groups, std::span<const double> lost) {
  std::vector<double> share(static_cast<std::size_t>(groups.count()));
  std::vector<double> choices(share.size());
  for (Index t = 0; t < tokens.tokens(); ++t) {
    const double of_token = lost[static_cast<std::size_t>(t)];
    if (groups.of[t] < 0 || std::isnan(of_token)) continue;
    const auto group = static_cast<std::size_t>(groups.of[t]);
    share[group] += of_token;
    choices[group] += static_cast<double>(layer.choices(t));
  }
  for (std::size_t g = 0; g < share.size(); ++g) {
    share[g] = choices[g] > 0.0 ? share[g] / choices[g] : kUnknown;
  }
  return share;
}

}  // namespace detail

/// The share of assignments that were dropped, by group; for groups by position, see "drop towards
/// the end" (Xue et al. 2024, arXiv:2402.01739, section 4.3).
/// \return         [groups]. By chance: the mean of `random_drops`, random routing with the same
///                 capacity, over those tokens of the group for which the trace shows a capacity.
inline std::vector<Estimate> drop_ratio(const TracedTokens& tokens, const TracedLayer& layer,
                                        const TokenGroups& groups,
                                        const BootstrapConfig& config = {}) {
  const auto ratios = [&](std::span<const Index> sequences) {
    std::vector<double> dropped(static_cast<std::size_t>(groups.count()));
    std::vector<double> assigned(dropped.size());
    for_each_traced(tokens, layer, sequences, [&](Index t, const auto&) {
      if (groups.of[t] < 0) return;
      const auto group = static_cast<std::size_t>(groups.of[t]);
      for (Index a = layer.first(t); a < layer.last(t); ++a) {
        dropped[group] += layer.kept[a] != 0 ? 0.0 : 1.0;
      }
      assigned[group] += static_cast<double>(layer.choices(t));
    });
    for (std::size_t g = 0; g < dropped.size(); ++g) {
      dropped[g] = assigned[g] > 0.0 ? dropped[g] / assigned[g] : kUnknown;
    }
    return dropped;
  };
  std::vector<Estimate> estimates = estimate(tokens, ratios, config, 0.0, 1.0);
  const std::vector<double> chance =
      detail::lost_share(tokens, layer, groups, random_drops(tokens, layer));
  for (std::size_t g = 0; g < estimates.size(); ++g) estimates[g].chance = chance[g];
  return estimates;
}

/// How far the experts of a group are from an even spread, over all groups (the "std test" of Xue
/// et al. 2024, arXiv:2402.01739, section 4.2, there a histogram over groups):
///
///     spread = sqrt(mean over groups g of mean over experts e of (share_ge - 1 / experts)^2)
///
/// Groups by token id with a large spread and groups by position with a small one: routing depends
/// on what a token is, not on where it stands. With n_g tokens of k experts each, the expectation
/// of spread^2 under random routing is the mean over groups of (1 - k / experts) / (n_g k experts),
/// whose root is `chance`.
/// \return         One value, at least 0.
inline Estimate routing_spread(const TracedTokens& tokens, const TracedLayer& layer,
                               const TokenGroups& groups, const BootstrapConfig& config = {}) {
  const auto experts = static_cast<double>(layer.experts);
  double by_chance = kUnknown;
  const auto spread = [&](std::span<const Index> sequences) {
    List<double> count(groups.count() * layer.experts);
    List<double> variance(groups.count());
    for_each_traced(tokens, layer, sequences, [&](Index t, const auto&) {
      const Index g = groups.of[t];
      if (g < 0) return;
      for (const Index e : layer.experts_of(t)) count[g * layer.experts + e] += 1.0;
      const double rate = static_cast<double>(layer.choices(t)) / experts;
      variance[g] += rate * (1.0 - rate);
    });
    double sum = 0.0;
    double expected = 0.0;
    double present = 0.0;
    for (Index g = 0; g < groups.count(); ++g) {
      const double* const own = count.data() + g * layer.experts;
      const double of_group = std::accumulate(own, own + layer.experts, 0.0);
      if (of_group == 0.0) continue;
      present += 1.0;
      double squares = 0.0;
      for (Index e = 0; e < layer.experts; ++e) {
        const double off = own[e] / of_group - 1.0 / experts;
        squares += off * off;
      }
      sum += squares / experts;
      expected += variance[g] / (of_group * of_group);
    }
    by_chance = present > 0.0 ? std::sqrt(expected / present) : kUnknown;
    return std::vector<double>{present > 0.0 ? std::sqrt(sum / present) : kUnknown};
  };
  Estimate result = estimate(tokens, spread, config, 0.0, 1.0)[0];
  spread(tokens.all());
  result.chance = by_chance;
  return result;
}

/// How level the load of a layer is, l_e being the assignments to expert e.
struct LoadStatistics {
  Estimate variation;     ///< CV = standard deviation of l_e / mean of l_e; 0 if level.
  Estimate max_to_mean;   ///< max l_e / mean l_e; 1 if level.
  Estimate entropy;       ///< -sum_e p_e ln p_e of the router, mean over tokens, in nats.
  Estimate load_entropy;  ///< -sum_e q_e ln q_e of the shares q_e = l_e / sum l, in nats.
  Estimate dropped;       ///< Dropped assignments / assignments.
  Estimate dead;          ///< Share of experts without any token.
};

/// By chance: CV^2 has the expectation sum_t (k_t / E) (1 - k_t / E) / (sum_t k_t / E)^2, of which
/// `chance` is the root; the router's entropy is ln E if it does not prefer any of the E experts;
/// drops are as in `drop_ratio`; the others are the mean over random routings.
inline LoadStatistics load_statistics(const TracedTokens& tokens, const TracedLayer& layer,
                                      const BootstrapConfig& config = {}) {
  struct OfLoad {
    double max_to_mean = kUnknown, entropy = kUnknown, dead = kUnknown, variation = kUnknown;
  };
  const auto experts = static_cast<double>(layer.experts);
  const auto of_load = [&](const List<double>& load) -> OfLoad {
    const double sum = std::accumulate(load.begin(), load.end(), 0.0);
    if (sum == 0.0) return {};
    const double mean = sum / experts;
    OfLoad result = {0.0, 0.0, 0.0, 0.0};
    double squares = 0.0;
    for (const double l : load) {
      result.max_to_mean = std::max(result.max_to_mean, l / mean);
      result.entropy -= l > 0.0 ? l / sum * std::log(l / sum) : 0.0;
      result.dead += l == 0.0 ? 1.0 / experts : 0.0;
      squares += (l - mean) * (l - mean);
    }
    result.variation = std::sqrt(squares / experts) / mean;
    return result;
  };
  const auto all = [&](std::span<const Index> sequences) {
    List<double> load(layer.experts);
    double assigned = 0.0;
    double entropy = 0.0;
    double seen = 0.0;
    double dropped = 0.0;
    for_each_traced(tokens, layer, sequences, [&](Index t, const auto&) {
      for (Index a = layer.first(t); a < layer.last(t); ++a) {
        load[layer.expert[a]] += 1.0;
        assigned += 1.0;
        dropped += layer.kept[a] != 0 ? 0.0 : 1.0;
      }
      entropy += static_cast<double>(layer.entropy[t]);
      seen += 1.0;
    });
    const OfLoad level = of_load(load);
    return std::vector<double>{level.variation,
                               level.max_to_mean,
                               seen > 0.0 ? entropy / seen : kUnknown,
                               level.entropy,
                               assigned > 0.0 ? dropped / assigned : kUnknown,
                               level.dead};
  };
  const std::vector<Estimate> e =
      estimate(tokens, all, config, 0.0, std::numeric_limits<double>::infinity());
  LoadStatistics result = {e[0], e[1], e[2], e[3], e[4], e[5]};
  const auto cut = [](Estimate& of, double lowest, double highest) {
    of.low = std::clamp(of.low, lowest, highest);
    of.high = std::clamp(of.high, lowest, highest);
  };
  cut(result.max_to_mean, 1.0, experts);
  cut(result.entropy, 0.0, std::log(experts));
  cut(result.load_entropy, 0.0, std::log(experts));
  cut(result.dropped, 0.0, 1.0);
  cut(result.dead, 0.0, 1.0);

  const std::vector<Index> sequences = tokens.all();
  double variance = 0.0;
  double sum = 0.0;
  for_each_traced(tokens, layer, sequences, [&](Index t, const auto&) {
    const double rate = static_cast<double>(layer.choices(t)) / experts;
    variance += rate * (1.0 - rate);
    sum += rate;
  });
  if (sum == 0.0) return result;
  result.variation.chance = std::sqrt(variance) / sum;
  result.dropped.chance =
      detail::lost_share(tokens, layer, all_tokens(tokens), random_drops(tokens, layer))[0];
  result.entropy.chance = std::log(experts);
  result.max_to_mean.chance = result.load_entropy.chance = result.dead.chance = 0.0;
  Rng rng(config.seed);
  const double part = 1.0 / static_cast<double>(config.random_routings);
  for (Index r = 0; r < config.random_routings; ++r) {
    const OfLoad random = of_load(random_load(layer, rng));
    result.max_to_mean.chance += part * random.max_to_mean;
    result.load_entropy.chance += part * random.entropy;
    result.dead.chance += part * random.dead;
  }
  return result;
}

}  // namespace weir
