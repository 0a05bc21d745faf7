// SPDX-License-Identifier: MIT
/// \file
/// How far a statistic of routed tokens can be relied on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/error.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>

namespace weir {

inline constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();

/// A statistic, how sure it is, and what it would be if experts were chosen at random. What cannot
/// be said is NaN.
struct Estimate {
  double value = kUnknown;
  double low = kUnknown, high = kUnknown;  ///< The confidence interval.
  double chance = kUnknown;                ///< The expected value under random routing.
};

/// Settings of `estimate`.
struct BootstrapConfig {
  Index replicates = 200;  ///< 0: no intervals.
  double level = 0.95;     ///< Of the intervals.
  std::uint64_t seed = 1;
  /// How many random routings the expected values are the mean of, where there is no formula.
  Index random_routings = 20;

  /// \throws ConfigError  if a setting is out of range.
  void check() const {
    expect_at_least<Index>("BootstrapConfig", "replicates", replicates, 0);
    expect_fraction("BootstrapConfig", "level", level);
    expect_at_least<Index>("BootstrapConfig", "random_routings", random_routings, 1);
  }
};

/// Computes several values from the tokens of the sequences with these numbers, some of which may
/// be there several times. A value without tokens is NaN.
using Statistic = FunctionRef<std::vector<double>(std::span<const Index> sequences)>;

namespace detail {

/// Which values at least two sequences contribute to. Stops as soon as nothing more can be learnt.
/// \param values   Those of all sequences: one that is NaN has no contributors.
inline std::vector<bool> of_several(Statistic statistic, Index sequences,
                                    const std::vector<double>& values) {
  std::vector<Index> contributing(values.size(), 0);
  const auto open = [&](std::size_t i) { return !std::isnan(values[i]) && contributing[i] < 2; };
  std::vector<bool> several(values.size(), false);
  auto left = static_cast<std::size_t>(
      std::count_if(values.begin(), values.end(), [](double v) { return !std::isnan(v); }));
  for (Index s = 0; s < sequences && left > 0; ++s) {
    const std::vector<double> own = statistic(std::span(&s, 1));
    for (std::size_t i = 0; i < own.size(); ++i) {
      if (!open(i) || std::isnan(own[i]) || ++contributing[i] < 2) continue;
      several[i] = true;
      --left;
    }
  }
  return several;
}

/// The number at `share` of the way from the least to the largest, between neighbours in
/// proportion.
inline double quantile(const std::vector<double>& ascending, double share) {
  const double place = share * static_cast<double>(ascending.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, ascending.size() - 1);
  const double part = place - static_cast<double>(below);
  return (1.0 - part) * ascending[below] + part * ascending[above];
}

}  // namespace detail

/// The values of `statistic` for all sequences, each with a bootstrap interval: tokens of one
/// sequence depend on each other, so whole sequences are drawn with replacement, from each domain
/// as many as it has. With the quantiles q of the replicates' values, the interval is
///
///     [2 v - q((1 + level) / 2), 2 v - q((1 - level) / 2)]
///
/// cut to [lowest, highest]: the basic interval, which takes a bias that grows as tokens get fewer,
/// such as that of mutual information, out of v instead of counting it twice
/// (Davison and Hinkley 1997, doi:10.1017/CBO9780511802843, eq. 5.6). There is no interval where
/// fewer than two sequences have a value. `chance` is left to others.
/// \param domain   Of each sequence, in 0, 1, 2, ...
/// \throws ConfigError  if a setting is out of range.
inline std::vector<Estimate> estimate(std::span<const Index> domain, Statistic statistic,
                                      const BootstrapConfig& config, double lowest,
                                      double highest) {
  config.check();
  std::vector<std::vector<Index>> of_domain;
  std::vector<Index> sample;
  for (std::size_t s = 0; s < domain.size(); ++s) {
    const auto d = static_cast<std::size_t>(domain[s]);
    if (of_domain.size() <= d) of_domain.resize(d + 1);
    of_domain[d].push_back(static_cast<Index>(s));
    sample.push_back(static_cast<Index>(s));
  }
  const std::vector<double> values = statistic(sample);
  std::vector<Estimate> estimates(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) estimates[i].value = values[i];
  if (config.replicates == 0) return estimates;

  const auto count = static_cast<Index>(domain.size());
  const std::vector<bool> has_interval = detail::of_several(statistic, count, values);
  std::vector<std::vector<double>> drawn(values.size());
  Rng rng(config.seed);
  for (Index r = 0; r < config.replicates; ++r) {
    sample.clear();
    for (const std::vector<Index>& own : of_domain) {
      for (std::size_t i = 0; i < own.size(); ++i) {
        sample.push_back(own[static_cast<std::size_t>(rng.below(static_cast<Index>(own.size())))]);
      }
    }
    const std::vector<double> replicate = statistic(sample);
    for (std::size_t i = 0; i < replicate.size(); ++i) {
      if (!std::isnan(replicate[i])) drawn[i].push_back(replicate[i]);
    }
  }
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!has_interval[i] || drawn[i].empty()) continue;
    std::sort(drawn[i].begin(), drawn[i].end());
    const double tail = (1.0 - config.level) / 2.0;
    const auto bound = [&](double share) {
      return std::clamp(2.0 * values[i] - detail::quantile(drawn[i], share), lowest, highest);
    };
    estimates[i].low = bound(1.0 - tail);
    estimates[i].high = bound(tail);
  }
  return estimates;
}

/// The same of the sequences of a trace.
inline std::vector<Estimate> estimate(const TracedTokens& tokens, Statistic statistic,
                                      const BootstrapConfig& config, double lowest,
                                      double highest) {
  std::vector<Index> domain;
  for (const TracedTokens::Sequence& sequence : tokens.sequences) domain.push_back(sequence.domain);
  return estimate(domain, statistic, config, lowest, highest);
}

/// The mean of `value(rng)` over `config.random_routings` calls.
inline double mean_over_random_routings(const BootstrapConfig& config,
                                        FunctionRef<double(Rng&)> value) {
  Rng rng(config.seed);
  double sum = 0.0;
  for (Index r = 0; r < config.random_routings; ++r) sum += value(rng);
  return sum / static_cast<double>(config.random_routings);
}

}  // namespace weir
