// SPDX-License-Identifier: MIT
/// \file
/// Experts that come where one is overloaded and go where they starve, during training.
#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/tuning/surgery.hpp>

namespace weir {

/// Settings of `plan_population`.
struct PopulationConfig {
  double overloaded = 2.0;  ///< An expert is split if it is used more than so many times the mean,
  double starved = 0.1;     ///< and retired if less than this share of it.
  Index least = 1;          ///< How many experts remain at least: k, or more,
  Index most = 64;          ///< and at most.
};

/// Which experts of a mixture to split and which to retire, each in order of their numbers.
struct PopulationPlan {
  std::vector<Index> split, retired;
  bool changes() const { return !split.empty() || !retired.empty(); }
};

/// Plans a change by how often each expert was used since the last one. The most starved are
/// retired first, as long as `least` remain; then the most overloaded are split, as long as there
/// are at most `most`. Of equal ones, the lower number is first. Without any use nothing changes.
/// \param use      One number for each expert.
/// \throws ConfigError  without experts, if a setting is out of range, or use is negative or NaN.
inline PopulationPlan plan_population(std::span<const double> use,
                                      const PopulationConfig& config = {}) {
  constexpr auto kWhere = "plan_population";
  const auto experts = static_cast<Index>(use.size());
  expect_at_least<Index>(kWhere, "experts", experts, 1);
  expect_at_least(kWhere, "overloaded", config.overloaded, 1.0);
  expect_in(kWhere, "starved", config.starved, 0.0, 1.0);
  expect_at_least<Index>(kWhere, "least", config.least, 1);
  expect_at_least<Index>(kWhere, "most", config.most, config.least);
  for (const double u : use) expect_at_least(kWhere, "use", u, 0.0);
  const double mean = std::accumulate(use.begin(), use.end(), 0.0) / static_cast<double>(experts);
  PopulationPlan plan;
  if (mean == 0.0) return plan;
  const auto of = [&](Index e) { return use[static_cast<std::size_t>(e)]; };
  std::vector<Index> order(use.size());
  std::iota(order.begin(), order.end(), Index{0});
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) { return of(a) < of(b); });
  Index left = experts;
  for (const Index e : order) {
    if (!(of(e) < config.starved * mean) || left <= config.least) break;
    plan.retired.push_back(e);
    --left;
  }
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) { return of(a) > of(b); });
  for (const Index e : order) {
    if (!(of(e) > config.overloaded * mean) || left >= config.most) break;
    plan.split.push_back(e);
    ++left;
  }
  std::sort(plan.retired.begin(), plan.retired.end());
  std::sort(plan.split.begin(), plan.split.end());
  return plan;
}

/// Carries a plan out: splits, then removes. Experts that stay keep their order, and halves that
/// were split off follow behind them.
/// \param apart    See `ExpertSurgery::split`.
/// \return         How the output of the layer changes, by all of it.
/// \throws         As ExpertSurgery; if a later operation throws, those before it are done.
template <class L, class Optimizer>
OutputChange change_population(ExpertSurgery<L, Optimizer>& surgery, const PopulationPlan& plan,
                               Rng& rng, double apart = 0.05) {
  const auto before = surgery.output();
  for (const Index e : plan.split) surgery.split(e, rng, apart);
  if (!plan.retired.empty()) {
    std::vector<Index> kept;
    for (Index e = 0; e < surgery.experts(); ++e) {
      if (!std::binary_search(plan.retired.begin(), plan.retired.end(), e)) kept.push_back(e);
    }
    surgery.keep(std::move(kept));
  }
  return output_change<typename L::Scalar>(before, surgery.output());
}

}  // namespace weir
