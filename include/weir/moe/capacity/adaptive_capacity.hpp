// SPDX-License-Identifier: MIT
/// \file
/// A capacity factor that follows the load from step to step.
#pragma once

#include <algorithm>
#include <concepts>
#include <functional>

#include <weir/core/error.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/overflow.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of AdaptiveCapacity.
struct AdaptiveCapacityConfig {
  double initial = 1.25;    ///< The factor before the first update.
  double least = 1.0;       ///< The factor never falls below this.
  double most = 4.0;        ///< The factor never rises above this.
  double tolerated = 0.01;  ///< The share of assignments that may be dropped.
  double rate = 0.1;        ///< How far one update goes towards the factor that was needed.
  Index minimum = 4;        ///< As in CapacityFactor.
  DropOrder order = DropOrder::kRankMajor;
  Scope scope = Scope::kBatch;
};

/// A CapacityFactor whose factor is moved after each optimizer step to what the load asked for:
///
///     f* = the least f with  sum_e max(0, c_e - f * mean_j c_j) <= tolerated * sum_e c_e
///     f <- clamp(f + rate * (mean f* - f), least, most)
///
/// c_e counts the assignments to expert e in one group that `scope` names, dropped or not. Each
/// group of each backward pass has its f*; the mean is that since the last update.
/// Groups without assignments are not counted; without any group the factor stays. C is
/// ceil((T * k / experts) * f), `experts` being those that the pass allows to some token, at least
/// `minimum`, the same in training and evaluation. The factor is a buffer: saved, and not trained
/// by gradient; nothing has a gradient here.
///
/// The rule is this library's own. Tutel (Hwang et al. 2022, arXiv:2206.03382), see
/// DynamicCapacity, adapts within the pass instead, to the load at hand: there an earlier token
/// depends on later ones through C. Here the factor is that of the step before; C still depends on
/// the number of tokens.
template <std::floating_point T>
class AdaptiveCapacity : public CapacityBase {
 public:
  using Scalar = T;

  template <class U>
  using Cache = OverflowSpace<U>;

  /// \throws ConfigError  unless 0 < least <= initial <= most, all finite, 0 <= tolerated <= 1,
  ///                      0 <= rate <= 1 and minimum >= 0.
  explicit AdaptiveCapacity(AdaptiveCapacityConfig config = {});

  /// \throws ConfigError  unless the factor, which may come from a file, is between `least` and
  ///                      `most`.
  void check() const;

  /// \throws ConfigError  as `check`; if a random order has no pass.rng in training.
  template <class U>
  void forward(const Pass& pass, Routing<U>& routing, Cache<U>& cache) const {
    check();
    const CapacityFactor same({.train = factor(),
                               .evaluate = factor(),
                               .minimum = config_.minimum,
                               .order = config_.order,
                               .scope = config_.scope});
    same.forward(pass, routing, cache);
  }

  /// Finds f* of each group of `routing`.
  template <class U>
  void observe(const Routing<U>& routing) {
    routing.rows.for_each_group(config_.scope, [&](Index begin, Index end) {
      set_zero(load_, routing.experts());
      routing.add_load(begin, end, load_);
      if (load_.sum() == 0.0) return;
      needed_ += needed_factor(routing.open_experts());
      ++observed_;
    });
  }

  /// Moves the factor and starts counting anew; for `weir::update`.
  void update_self();

  /// Forgets what was counted since the last update; for `weir::discard`.
  void discard_self() {
    needed_ = 0.0;
    observed_ = 0;
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("factor", self.factor_);
  }

  double factor() const { return static_cast<double>(factor_.value(0, 0)); }
  const AdaptiveCapacityConfig& config() const { return config_; }

 private:
  /// f* of `load_`, which it sorts. Cutting the m largest loads to a level drops
  /// sum_{i < m} c_i - m * level; the right m is the one whose level is not below the next load.
  /// Those of experts that are not open are zero, and last.
  double needed_factor(Index open);

  AdaptiveCapacityConfig config_;
  Buffer<T> factor_;
  RowVector<double> load_;  // The assignments to each expert in the group that is looked at.
  double needed_ = 0.0;     // The sum of f* since the last update.
  Index observed_ = 0;      // How many groups that sum has.
};

template <std::floating_point T>
AdaptiveCapacity<T>::AdaptiveCapacity(AdaptiveCapacityConfig config) : config_(config) {
  factor_.value.setConstant(1, 1, static_cast<T>(config.initial));
  expect_positive("AdaptiveCapacity", "least", config_.least);
  expect_at_least("AdaptiveCapacity", "most", config_.most, config_.least);
  expect_in("AdaptiveCapacity", "tolerated", config_.tolerated, 0.0, 1.0);
  expect_in("AdaptiveCapacity", "rate", config_.rate, 0.0, 1.0);
  expect_at_least<Index>("AdaptiveCapacity", "minimum", config_.minimum, 0);
  check();
}

template <std::floating_point T>
void AdaptiveCapacity<T>::check() const {
  if (factor_.value.rows() != 1 || factor_.value.cols() != 1) {
    throw_error<ConfigError>("AdaptiveCapacity: the factor is ", shape_of(factor_.value),
                             ", expected [1, 1]");
  }
  expect_in("AdaptiveCapacity", "factor", factor_.value(0, 0), static_cast<T>(config_.least),
            static_cast<T>(config_.most));
}

template <std::floating_point T>
void AdaptiveCapacity<T>::update_self() {
  if (observed_ == 0) return;
  const double mean = needed_ / static_cast<double>(observed_);
  const double moved = factor() + config_.rate * (mean - factor());
  factor_.value(0, 0) = std::clamp(static_cast<T>(moved), static_cast<T>(config_.least),
                                   static_cast<T>(config_.most));
  discard_self();
}

template <std::floating_point T>
double AdaptiveCapacity<T>::needed_factor(Index open) {
  std::sort(load_.data(), load_.data() + load_.size(), std::greater<>());
  const double total = load_.sum();
  const double tolerated = config_.tolerated * total;
  double sum = 0.0;
  double level = 0.0;
  for (Index m = 1; m <= open; ++m) {
    sum += load_[m - 1];
    level = (sum - tolerated) / static_cast<double>(m);
    if (m == open || level >= load_[m]) break;
  }
  return level * static_cast<double>(open) / total;
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::AdaptiveCapacity<float>;
extern template class weir::AdaptiveCapacity<double>;
#endif
