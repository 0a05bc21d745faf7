// SPDX-License-Identifier: MIT
/// \file
/// A capacity factor that follows the load from step to step.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <functional>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/parameter.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of AdaptiveCapacity.
struct AdaptiveCapacityConfig {
  double initial = 1.25;  ///< The factor before the first update.
  double least = 1.0;     ///< The factor stays between these two.
  double most = 4.0;
  double tolerated = 0.01;  ///< The share of assignments that may be dropped.
  double rate = 0.1;        ///< How far one update goes towards the factor that was needed.
  Index minimum = 4;        ///< These as in CapacityFactor.
  DropOrder order = DropOrder::kRankMajor;
  Scope scope = Scope::kBatch;
  OnDrop on_drop = OnDrop::kZero;
};

/// A CapacityFactor whose factor is moved after each optimizer step to what the load asked for:
///
///     f* = the least f with  sum_e max(0, c_e - f * mean_j c_j) <= tolerated * sum_e c_e
///     f <- clamp(f + rate * (mean f* - f), least, most)
///
/// c_e counts the assignments to expert e in one group that `scope` names, dropped or not; f* is
/// reckoned for each group of each backward pass, and averaged over those since the last update.
/// Groups without assignments are not counted; without any group the factor stays. C is
/// ceil(f * T * k / experts), at least `minimum`, the same in training and evaluation. The factor
/// is a buffer: saved, and not trained by gradient; nothing has a gradient here.
///
/// The rule is this library's own. Tutel (Hwang et al. 2022, arXiv:2206.03382), see
/// DynamicCapacity, adapts within the pass instead, to the load at hand: there an earlier token
/// depends on later ones through C. Here the factor is that of the step before; C still depends on
/// the number of tokens.
template <std::floating_point T>
class AdaptiveCapacity {
 public:
  using Scalar = T;

  /// \throws ConfigError  unless 0 < least <= initial <= most, all finite, 0 <= tolerated <= 1,
  ///                      0 <= rate <= 1 and minimum >= 0.
  explicit AdaptiveCapacity(AdaptiveCapacityConfig config = {}) : config_(config) {
    factor_.value.setConstant(1, 1, static_cast<T>(config.initial));
    check_settings();
    check();
  }

  /// \throws ConfigError  unless the factor, which may come from a file, is between `least` and
  ///                      `most`.
  void check() const {
    if (factor_.value.rows() != 1 || factor_.value.cols() != 1) {
      fail<ConfigError>("AdaptiveCapacity: the factor is ", shape_of(factor_.value),
                        ", expected [1, 1]");
    }
    const T f = factor_.value(0, 0);
    if (!(f >= static_cast<T>(config_.least) && f <= static_cast<T>(config_.most))) {
      fail<ConfigError>("AdaptiveCapacity: factor = ", f, ", expected ", config_.least,
                        " <= factor <= ", config_.most);
    }
  }

  /// \throws ConfigError  as `check`; if a random order has no pass.rng in training.
  void apply(Routing<T>& routing) const {
    check();
    CapacityFactor{.train = factor(),
                   .evaluate = factor(),
                   .minimum = config_.minimum,
                   .order = config_.order,
                   .scope = config_.scope,
                   .on_drop = config_.on_drop}
        .apply(routing);
  }

  /// Reckons f* of each group of `routing`.
  void observe(const Routing<T>& routing) {
    routing.for_each_group(config_.scope, [&](Index begin, Index end) {
      load_.setZero(routing.experts());
      routing.add_load(begin, end, load_);
      if (load_.sum() == T(0)) return;
      needed_ += needed_factor();
      ++observed_;
    });
  }

  /// Moves the factor and starts counting anew.
  void update() {
    if (observed_ == 0) return;
    const double mean = needed_ / static_cast<double>(observed_);
    const double moved = factor() + config_.rate * (mean - factor());
    factor_.value(0, 0) = std::clamp(static_cast<T>(moved), static_cast<T>(config_.least),
                                     static_cast<T>(config_.most));
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
  double needed_factor() {
    std::sort(load_.data(), load_.data() + load_.size(), std::greater<T>());
    const auto total = static_cast<double>(load_.sum());
    const double tolerated = config_.tolerated * total;
    double sum = 0.0;
    double level = 0.0;
    for (Index m = 1; m <= load_.size(); ++m) {
      sum += static_cast<double>(load_[m - 1]);
      level = (sum - tolerated) / static_cast<double>(m);
      if (m == load_.size() || level >= static_cast<double>(load_[m])) break;
    }
    return level * static_cast<double>(load_.size()) / total;
  }

  void check_settings() const {
    expect_positive("AdaptiveCapacity", "least", config_.least);
    if (!(config_.least <= config_.most && std::isfinite(config_.most))) {
      fail<ConfigError>("AdaptiveCapacity: most = ", config_.most,
                        ", expected a finite number >= least = ", config_.least);
    }
    expect_share("tolerated", config_.tolerated);
    expect_share("rate", config_.rate);
    expect_at_least<Index>("AdaptiveCapacity", "minimum", config_.minimum, 0);
  }

  static void expect_share(std::string_view name, double value) {
    if (!(value >= 0.0 && value <= 1.0)) {
      fail<ConfigError>("AdaptiveCapacity: ", name, " = ", value, ", expected 0 <= ", name,
                        " <= 1");
    }
  }

  AdaptiveCapacityConfig config_;
  Buffer<T> factor_;
  RowVector<T> load_;
  double needed_ = 0.0;
  Index observed_ = 0;
};

}  // namespace weir
