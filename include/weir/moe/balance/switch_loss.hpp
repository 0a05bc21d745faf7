// SPDX-License-Identifier: MIT
/// \file
/// Load-balancing loss of the Switch Transformer (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6) and
/// its forms for k > 1.
#pragma once

#include <algorithm>
#include <concepts>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/moe/balance/load_count.hpp>
#include <weir/moe/balance/priced_probability.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// What the fractions f_e of SwitchLoss are taken of.
enum class LoadFraction {
  kOfAssignments,  ///< f sums to 1, the loss at uniform load is the coefficient (Megatron-Core,
                   ///< MegaBlocks, DeepSpeed).
  kOfTokens,       ///< f sums to k, the loss at uniform load is k times the coefficient (Hugging
                   ///< Face's Mixtral and DBRX, flaxformer).
};

/// Settings of SwitchLoss.
struct SwitchLossConfig {
  double coefficient = 0.01;
  LoadFraction fraction = LoadFraction::kOfAssignments;
  LoadCount count = LoadCount::kAssignments;  ///< What the fractions count.
  Scope scope = Scope::kBatch;
};

/// Rewards a router for spreading tokens evenly over the experts:
///
///     loss = coefficient * experts * sum_e f_e * P_e
///
/// f_e is the fraction of the assignments (or: of the tokens) that went to expert e, before any are
/// dropped, or of what LoadCount says instead; P_e the mean probability the router gave it.
/// `experts` are those that the pass allows to some token: one that is switched off for all does
/// not count, one that is forbidden to some counts for all. Over the sequences, if that is the
/// scope, the mean is taken: then a batch cut between sequences has the same loss as its parts
/// together. Padding is not counted; without real tokens the loss is zero. At uniform load the loss
/// has the value that LoadFraction says; that is not its minimum, f and P being free of each other.
///
/// f_e counts decisions and is constant to the derivative; the gradient reaches the router through
/// P_e alone.
template <std::floating_point T>
class SwitchLoss : public BalancerBase {
 public:
  static constexpr std::string_view kName = "switch";
  using Cache = PriceSpace<T>;

  explicit SwitchLoss(SwitchLossConfig config = {}) : config_(config) { check(); }

  /// \throws ConfigError  if the coefficient is negative.
  void check() const { expect_at_least("SwitchLoss", "coefficient", config_.coefficient, 0.0); }

  /// \return         The loss, already scaled by `coefficient`.
  double forward(const Routing<T>& routing, Cache& cache) const {
    return static_cast<double>(
        factor(routing) * priced_probability(routing, config_.scope, fractions(routing), cache));
  }

  /// Adds `scale` times d(loss)/d(probabilities).
  void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                Cache& cache) const {
    add_priced_probability_gradient(routing, config_.scope, static_cast<T>(scale) * factor(routing),
                                    fractions(routing), cache, gradient);
  }

  const SwitchLossConfig& config() const { return config_; }

 private:
  T factor(const Routing<T>& routing) const {
    return static_cast<T>(config_.coefficient) * static_cast<T>(routing.open_experts());
  }

  auto fractions(const Routing<T>& routing) const {
    return [&routing, this](Index begin, Index end, Index tokens, RowVector<T>& f) {
      set_zero(f, routing.experts());
      add_counted_load(config_.count, routing, begin, end, f);
      const T assignments = f.sum();
      f /= config_.fraction == LoadFraction::kOfTokens ? static_cast<T>(tokens)
                                                       : std::max(assignments, T(1));
    };
  }

  SwitchLossConfig config_;
};

}  // namespace weir
