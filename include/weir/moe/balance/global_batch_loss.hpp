// SPDX-License-Identifier: MIT
/// \file
/// Load-balancing loss over the global batch (Qiu et al. 2025, arXiv:2501.11873).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/moe/balance/load_count.hpp>
#include <weir/moe/balance/priced_probability.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of GlobalBatchLoss.
struct GlobalBatchLossConfig {
  double coefficient = 0.01;
  LoadCount count = LoadCount::kAssignments;  ///< What c_e counts.
};

/// The Switch loss with the fractions of all micro-batches of an optimizer step so far:
///
///     loss = coefficient * experts * sum_e f_e * P_e,    f_e = c_e / sum_j c_j
///
/// c_e counts the assignments to expert e, before any are dropped and without padding, or what
/// LoadCount says instead, in the micro-batch at hand and in those of this step before it (and on
/// other ranks, see `add_load` and RankBatchLoss); P_e is the mean probability in the micro-batch
/// at hand. An expert may then specialise in what one micro-batch is made of, as long as the load
/// of the step is level. At uniform load the loss is the coefficient. With micro-batches of one
/// size it is Megatron-Core's `global_aux_loss`, whose c_e are running averages. `experts` are
/// those that the pass allows to some token of the micro-batch at hand. f is constant to the
/// derivative.
///
/// A micro-batch is added to the counts by its backward pass: a forward pass that is run again
/// counts once. The backward pass differentiates the loss that its forward pass reported, whatever
/// has been counted in between. `update` starts the next step.
template <std::floating_point T>
class GlobalBatchLoss : public BalancerBase {
 public:
  static constexpr std::string_view kName = "global_batch";
  struct Cache {
    PriceSpace<T> prices;
    RowVector<T> fractions;  ///< [experts], f of the forward pass.
  };

  explicit GlobalBatchLoss(GlobalBatchLossConfig config = {}) : config_(config) { check(); }

  /// \throws ConfigError  if the coefficient is negative.
  void check() const {
    expect_at_least("GlobalBatchLoss", "coefficient", config_.coefficient, 0.0);
  }

  /// \return         The loss, already scaled by the coefficient.
  double forward(const Routing<T>& routing, Cache& cache) const {
    set_fractions(routing, cache.fractions);
    return factor(routing) * static_cast<double>(priced_probability(
                                 routing, Scope::kBatch, fractions_of(cache), cache.prices));
  }

  /// Adds `scale` times d(loss)/d(probabilities).
  void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                Cache& cache) const {
    add_priced_probability_gradient(routing, Scope::kBatch, static_cast<T>(scale * factor(routing)),
                                    fractions_of(cache), cache.prices, gradient);
  }

  void observe(const Routing<T>& routing) {
    if (load_.size() != routing.experts()) set_zero(load_, routing.experts());
    add_counted_load(config_.count, routing, 0, routing.tokens(), load_);
  }

  /// Adds what other ranks counted.
  /// \param load      [experts]
  /// \throws ShapeError   if passes before it were of another number of experts.
  void add_load(const RowVector<double>& load) {
    if (load_.size() == 0) set_zero(load_, load.size());
    expect_shape("GlobalBatchLoss::add_load", "load", load, 1, load_.size());
    load_ += load;
  }

  /// Starts the next step.
  template <class S>
  void update(S& /*selector*/) {
    load_.setZero();
  }

  /// Forgets what was counted in this step; for `weir::discard`.
  void discard_self() { load_.setZero(); }

  /// What has been counted in this step; empty before the first pass.
  const RowVector<double>& load() const { return load_; }

  const GlobalBatchLossConfig& config() const { return config_; }

 private:
  double factor(const Routing<T>& routing) const {
    return config_.coefficient * static_cast<double>(routing.open_experts());
  }

  void set_fractions(const Routing<T>& routing, RowVector<T>& f) const;

  static auto fractions_of(const Cache& cache) {
    return [&cache](Index /*begin*/, Index /*end*/, Index /*tokens*/, RowVector<T>& f) {
      f = cache.fractions;
    };
  }

  GlobalBatchLossConfig config_;
  RowVector<double> load_;
};

template <std::floating_point T>
void GlobalBatchLoss<T>::set_fractions(const Routing<T>& routing, RowVector<T>& f) const {
  set_zero(f, routing.experts());
  add_counted_load(config_.count, routing, 0, routing.tokens(), f);
  const bool more = load_.size() == routing.experts();
  const double total = static_cast<double>(f.sum()) + (more ? load_.sum() : 0.0);
  for (Index e = 0; e < f.size() && total > 0.0; ++e) {
    f[e] = static_cast<T>((static_cast<double>(f[e]) + (more ? load_[e] : 0.0)) / total);
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::GlobalBatchLoss<float>;
extern template class weir::GlobalBatchLoss<double>;
#endif
