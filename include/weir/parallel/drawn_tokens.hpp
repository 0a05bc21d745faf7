// SPDX-License-Identifier: MIT
/// \file
/// Tokens whose experts are drawn at random, where there is no trace.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/parallel/routed_tokens.hpp>

namespace weir {

/// How experts are chosen by tokens that do not know each other.
struct RoutingDistribution {
  /// How popular each expert is; they need not sum to 1. 0: never chosen.
  std::vector<double> popularity = {};
  Index k = 1;
  GroupLimit groups = {};

  /// \throws ConfigError  unless popularities are finite and >= 0, k <= the experts above 0, and
  ///                      the groups fit.
  void check() const {
    const auto experts = static_cast<Index>(popularity.size());
    Index possible = 0;
    for (const double p : popularity) {
      expect_at_least("RoutingDistribution", "popularity", p, 0.0);
      possible += p > 0.0 ? 1 : 0;
    }
    expect_in<Index>("RoutingDistribution", "k", k, 1, possible);
    groups.check("RoutingDistribution", experts, k);
  }
};

/// Popularities that fall as 1 / rank^exponent (Zipf), in an order drawn from the seed; 0 makes all
/// equal.
/// \throws ConfigError  unless experts >= 1 and exponent >= 0.
inline std::vector<double> zipf_popularity(Index experts, double exponent, std::uint64_t seed) {
  expect_at_least<Index>("zipf_popularity", "experts", experts, 1);
  expect_at_least("zipf_popularity", "exponent", exponent, 0.0);
  std::vector<double> popularity;
  for (Index e = 0; e < experts; ++e) {
    popularity.push_back(std::pow(static_cast<double>(e + 1), -exponent));
  }
  Rng rng(seed);
  for (Index e = experts - 1; e > 0; --e) {
    std::swap(popularity[static_cast<std::size_t>(e)],
              popularity[static_cast<std::size_t>(rng.below(e + 1))]);
  }
  return popularity;
}

/// How many of the assignments of a trace each expert has.
inline std::vector<double> popularity_of(const TracedLayer& layer) {
  std::vector<double> popularity(static_cast<std::size_t>(layer.experts), 0.0);
  for (const Index e : layer.expert) popularity[static_cast<std::size_t>(e)] += 1.0;
  return popularity;
}

/// `tokens_per_rank` tokens of each rank, each with the k experts of largest
///
///     ln popularity_e + G_e,    G_e = -ln(-ln u),  u uniform in (0, 1)
///
/// among those that the groups leave open: k draws without replacement (Kool et al. 2019,
/// arXiv:1903.06059, section 2.3).
/// \throws ConfigError  as RoutingDistribution::check; unless tokens_per_rank >= 0 and ranks >= 1.
inline RoutedTokens draw_tokens(const RoutingDistribution& distribution, Index tokens_per_rank,
                                Index ranks, std::uint64_t seed) {
  distribution.check();
  expect_at_least<Index>("draw_tokens", "tokens_per_rank", tokens_per_rank, 0);
  expect_at_least<Index>("draw_tokens", "ranks", ranks, 1);
  const auto experts = static_cast<Index>(distribution.popularity.size());
  constexpr double kNever = -std::numeric_limits<double>::infinity();
  constexpr double kLeast = std::numeric_limits<double>::min();  // In place of ln 1.
  List<double> logs;
  for (const double p : distribution.popularity) logs.push_back(p > 0.0 ? std::log(p) : kNever);
  Rng rng(seed);
  RoutedTokens drawn;
  drawn.layer.experts = experts;
  List<double> scores(experts, 0.0);
  List<Index> order(experts, 0);
  std::vector<Index> chosen;
  for (Index t = 0; t < tokens_per_rank * ranks; ++t) {
    for (Index e = 0; e < experts; ++e) {
      scores[e] = logs[e] - std::log(kLeast - std::log1p(-rng.uniform()));  // u = 1 - uniform()
    }
    const double* const open = distribution.groups.candidates(scores.data(), experts);
    std::iota(order.begin(), order.end(), Index(0));
    std::partial_sort(
        order.begin(), order.begin() + distribution.k, order.end(),
        [&](Index a, Index b) { return open[a] != open[b] ? open[a] > open[b] : a < b; });
    chosen.assign(order.begin(), order.begin() + distribution.k);
    drawn.layer.add(chosen);
    drawn.source.push_back(t / std::max<Index>(1, tokens_per_rank));
  }
  return drawn;
}

}  // namespace weir
