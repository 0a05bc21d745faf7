// SPDX-License-Identifier: MIT
/// \file
/// Load-balancing loss over the global batch (Qiu et al. 2025, arXiv:2501.11873).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/moe/balance/priced_probability.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// The Switch loss with the fractions of all micro-batches of an optimizer step so far:
///
///     loss = coefficient * experts * sum_e f_e * P_e,    f_e = c_e / sum_j c_j
///
/// c_e counts the assignments to expert e, before any are dropped and without padding, in the
/// micro-batch at hand and in those of this step before it (and on other ranks, see `add_load`);
/// P_e is the mean probability in the micro-batch at hand. An expert may then specialise in what
/// one micro-batch is made of, as long as the load of the step is level. At uniform load the loss
/// is the coefficient. With micro-batches of one size it is Megatron-Core's `global_aux_loss`,
/// whose c_e are running averages. f is constant to the derivative.
///
/// A micro-batch is added to the counts by its backward pass: a forward pass that is run again
/// counts once. The loss a forward pass reports is the one that is differentiated if its backward
/// pass is the next one of the layer. `MoELayer::update` starts the next step.
template <std::floating_point T>
class GlobalBatchLoss {
 public:
  static constexpr std::string_view kName = "global_batch";

  /// \throws ConfigError  if the coefficient is negative.
  explicit GlobalBatchLoss(T coefficient = T(0.01)) : coefficient_(coefficient) { check(); }

  void check() const { expect_at_least("GlobalBatchLoss", "coefficient", coefficient_, T(0)); }

  /// \return         The loss, already scaled by the coefficient.
  T loss(const Routing<T>& routing) const {
    return factor(routing) * priced_probability(routing, Scope::kBatch, fractions(routing));
  }

  /// Adds d(loss)/d(probabilities).
  void add_gradient(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    add_priced_probability_gradient(routing, Scope::kBatch, factor(routing), fractions(routing),
                                    gradient);
  }

  void observe(const Routing<T>& routing) {
    if (load_.size() != routing.experts()) load_.setZero(routing.experts());
    RowVector<T>& count = routing.scratch[0];
    count.setZero(routing.experts());
    routing.add_load(0, routing.tokens(), count);
    load_ += count.template cast<double>();
  }

  /// Adds what other ranks counted.
  /// \param load      [experts]
  /// \throws ShapeError   if passes before it were of another number of experts.
  void add_load(const RowVector<double>& load) {
    if (load_.size() == 0) load_.setZero(load.size());
    expect_shape("GlobalBatchLoss::add_load", "load", load, 1, load_.size());
    load_ += load;
  }

  /// Starts the next step.
  template <class S>
  void update(S& /*selector*/) {
    load_.setZero();
  }

  /// What has been counted in this step; empty before the first pass.
  const RowVector<double>& load() const { return load_; }

 private:
  T factor(const Routing<T>& routing) const {
    return coefficient_ * static_cast<T>(routing.experts());
  }

  auto fractions(const Routing<T>& routing) const {
    return [&routing, this](Index begin, Index end, Index /*tokens*/, RowVector<T>& f) {
      f.setZero(routing.experts());
      routing.add_load(begin, end, f);
      const bool more = load_.size() == routing.experts();
      const double total = static_cast<double>(f.sum()) + (more ? load_.sum() : 0.0);
      for (Index e = 0; e < f.size() && total > 0.0; ++e) {
        f[e] = static_cast<T>((static_cast<double>(f[e]) + (more ? load_[e] : 0.0)) / total);
      }
    };
  }

  T coefficient_;
  RowVector<double> load_;
};

}  // namespace weir
