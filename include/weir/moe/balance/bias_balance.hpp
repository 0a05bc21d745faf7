// SPDX-License-Identifier: MIT
/// \file
/// Auxiliary-loss-free balancing (Wang et al. 2024, arXiv:2408.15664, algorithm 1; DeepSeek-V3,
/// arXiv:2412.19437, section 2.1.2).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/core/parameter.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// A selector with a bias that enters the choice of experts and nothing else.
template <class S>
concept BiasedSelector = requires(S& selector) {
  { selector.selection_bias() } -> std::same_as<Buffer<typename S::Scalar>&>;
};

/// After each optimizer step, raises the selection bias of the experts that got too little and
/// lowers that of those that got too much:
///
///     b_e += rate * sign(mean_j c_j - c_e)
///
/// c_e counts the assignments to expert e, dropped or not and without padding, in all backward
/// passes since the last update: micro-batches of one step add up, and a forward pass that is run
/// again counts once. An expert with exactly the mean keeps its bias. There is no loss.
template <std::floating_point T>
class BiasBalance {
 public:
  static constexpr std::string_view kName = "bias";

  /// \throws ConfigError  if rate < 0.
  explicit BiasBalance(T rate = T(0.001)) : rate_(rate) { check(); }

  void check() const { expect_at_least("BiasBalance", "rate", rate_, T(0)); }

  void observe(const Routing<T>& routing) {
    if (load_.size() != routing.experts()) load_.setZero(routing.experts());
    routing.add_load(0, routing.tokens(), load_);
  }

  /// Moves the bias and starts counting anew; without anything counted it stays.
  template <BiasedSelector S>
  void update(S& selector) {
    if (load_.size() == 0) return;
    const T mean = load_.sum() / static_cast<T>(load_.size());
    Matrix<T>& bias = selector.selection_bias().value;
    for (Index e = 0; e < load_.size(); ++e) {
      const T lack = mean - load_[e];
      bias(0, e) += lack > T(0) ? rate_ : lack < T(0) ? -rate_ : T(0);
    }
    load_.setZero();
  }

  /// What has been counted since the last update; empty before the first pass.
  const RowVector<T>& load() const { return load_; }

  T rate() const { return rate_; }

  /// For a schedule; DeepSeek-V3 ends its training with 0.
  void set_rate(T rate) {
    expect_at_least("BiasBalance", "rate", rate, T(0));
    rate_ = rate;
  }

 private:
  T rate_;
  RowVector<T> load_;
};

}  // namespace weir
