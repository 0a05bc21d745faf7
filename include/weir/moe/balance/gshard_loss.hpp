// SPDX-License-Identifier: MIT
/// \file
/// Load-balancing loss of GShard (Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/moe/balance/first_choice.hpp>
#include <weir/moe/balance/priced_probability.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of GShardLoss.
struct GShardLossConfig {
  double coefficient = 0.01;
  Scope scope = Scope::kBatch;
};

/// Rewards a router for spreading the first choices of the tokens evenly over the experts:
///
///     loss = coefficient * experts / T^2 * sum_e c_e * sum_t p_te
///
/// c_e counts the tokens whose first choice is expert e, dropped or not; T counts the real tokens,
/// `experts` those that the pass allows to some token.
/// At uniform load the loss is the coefficient. Algorithm 1 has 1 / experts for `experts`; this is
/// the scale of the authors' code, of Tutel and of DeepSpeed. Over the sequences, if that is the
/// scope, the mean is taken: they are the paper's groups.
///
/// c_e is constant to the derivative; the gradient reaches the router through the probabilities.
/// Padding, and choices of tokens without any expert, are not counted.
template <std::floating_point T>
class GShardLoss : public BalancerBase {
 public:
  static constexpr std::string_view kName = "gshard";
  using Cache = PriceSpace<T>;

  explicit GShardLoss(GShardLossConfig config = {}) : config_(config) { check(); }

  /// \throws ConfigError  if the coefficient is negative.
  void check() const { expect_at_least("GShardLoss", "coefficient", config_.coefficient, 0.0); }

  /// \return         The loss, already scaled by `coefficient`.
  double forward(const Routing<T>& routing, Cache& cache) const {
    return static_cast<double>(factor(routing) * priced_probability(routing, config_.scope,
                                                                    first_choices(routing), cache));
  }

  /// Adds `scale` times d(loss)/d(probabilities).
  void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                Cache& cache) const {
    add_priced_probability_gradient(routing, config_.scope, static_cast<T>(scale) * factor(routing),
                                    first_choices(routing), cache, gradient);
  }

  const GShardLossConfig& config() const { return config_; }

 private:
  T factor(const Routing<T>& routing) const {
    return static_cast<T>(config_.coefficient) * static_cast<T>(routing.open_experts());
  }

  /// The fraction of the tokens that chose each expert first.
  static auto first_choices(const Routing<T>& routing) {
    return [&routing](Index begin, Index end, Index tokens, RowVector<T>& f) {
      set_zero(f, routing.experts());
      for_each_first_choice(routing, begin, end, [&](Index /*t*/, Index e) { f[e] += T(1); });
      f /= static_cast<T>(tokens);
    };
  }

  GShardLossConfig config_;
};

}  // namespace weir
