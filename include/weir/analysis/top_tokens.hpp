// SPDX-License-Identifier: MIT
/// \file
/// The tokens that each expert gets.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include <weir/analysis/bootstrap.hpp>
#include <weir/analysis/load_statistics.hpp>
#include <weir/analysis/token_groups.hpp>
#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A token id that an expert was chosen for.
struct TopToken {
  Index id = -1;
  Index count = 0;           ///< Assignments of the token to the expert.
  Estimate share_of_expert;  ///< Of the expert's assignments. By chance: that of all assignments.
  Estimate share_of_token;   ///< Of the token's occurrences. By chance: k / experts.
};

namespace detail {

/// Assignments of the tokens with an id.
struct TokenCounts {
  std::vector<double> pairs;    ///< [ids * experts]
  std::vector<double> load;     ///< [experts], of tokens without an id as well.
  std::vector<double> occurs;   ///< [ids]
  std::vector<double> choices;  ///< [ids], of all experts.

  TokenCounts(const TracedTokens& tokens, const TracedLayer& layer, const TokenGroups& ids,
              std::span<const Index> sequences)
      : pairs(static_cast<std::size_t>(ids.count() * layer.experts)),
        load(static_cast<std::size_t>(layer.experts)),
        occurs(static_cast<std::size_t>(ids.count())),
        choices(occurs.size()) {
    for_each_traced(tokens, layer, sequences, [&](Index t, const auto&) {
      const bool counts = ids.of[t] >= 0;
      const auto id = static_cast<std::size_t>(counts ? ids.of[t] : 0);
      for (const Index e : layer.experts_of(t)) {
        load[static_cast<std::size_t>(e)] += 1.0;
        if (counts) pairs[id * load.size() + static_cast<std::size_t>(e)] += 1.0;
      }
      if (!counts) return;
      occurs[id] += 1.0;
      choices[id] += static_cast<double>(layer.choices(t));
    });
  }
};

}  // namespace detail

/// The tokens that each expert was chosen for most often, best first; of equally many, the lower
/// id first (Xue et al. 2024, arXiv:2402.01739, table of the ten tokens of each expert). Which they
/// are is found with all sequences; the intervals are those of their shares.
/// \param most     How many of each expert.
/// \param least_count  Tokens that occur less often are left out.
/// \return         [experts]
inline std::vector<std::vector<TopToken>> top_tokens(const TracedTokens& tokens,
                                                     const TracedLayer& layer, Index most = 10,
                                                     Index least_count = 1,
                                                     const BootstrapConfig& config = {}) {
  struct Pair {
    std::size_t id, expert;
  };
  const TokenGroups ids = by_token(tokens, least_count);
  const auto experts = static_cast<std::size_t>(layer.experts);
  const detail::TokenCounts all(tokens, layer, ids, tokens.all());
  std::vector<Pair> pairs;
  for (std::size_t e = 0; e < experts; ++e) {
    std::vector<Pair> own;
    for (std::size_t id = 0; id < all.occurs.size(); ++id) {
      if (all.pairs[id * experts + e] > 0.0) own.push_back({id, e});
    }
    std::stable_sort(own.begin(), own.end(), [&](const Pair& a, const Pair& b) {
      return all.pairs[a.id * experts + e] > all.pairs[b.id * experts + e];
    });
    if (static_cast<Index>(own.size()) > most) own.resize(static_cast<std::size_t>(most));
    pairs.insert(pairs.end(), own.begin(), own.end());
  }
  const std::vector<Estimate> shares = estimate(
      tokens,
      [&](std::span<const Index> sequences) {
        const detail::TokenCounts drawn(tokens, layer, ids, sequences);
        std::vector<double> values;
        for (const Pair& pair : pairs) {
          const double count = drawn.pairs[pair.id * experts + pair.expert];
          const double load = drawn.load[pair.expert];
          const double occurs = drawn.occurs[pair.id];
          values.push_back(load > 0.0 ? count / load : kUnknown);
          values.push_back(occurs > 0.0 ? count / occurs : kUnknown);
        }
        return values;
      },
      config, 0.0, 1.0);
  double sum = 0.0;
  for (const double l : all.load) sum += l;
  std::vector<std::vector<TopToken>> best(experts);
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    const std::size_t id = pairs[i].id;
    TopToken token = {ids.key[static_cast<Index>(id)],
                      static_cast<Index>(all.pairs[id * experts + pairs[i].expert]), shares[2 * i],
                      shares[2 * i + 1]};
    token.share_of_expert.chance = all.choices[id] / sum;
    token.share_of_token.chance = all.choices[id] / all.occurs[id] / static_cast<double>(experts);
    best[pairs[i].expert].push_back(token);
  }
  return best;
}

}  // namespace weir
