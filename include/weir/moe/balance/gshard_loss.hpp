// SPDX-License-Identifier: MIT
/// \file
/// Load-balancing loss of GShard (Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/moe/balance/priced_probability.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Rewards a router for spreading the first choices of the tokens evenly over the experts:
///
///     loss = coefficient * experts / T^2 * sum_e c_e * sum_t p_te
///
/// c_e counts the tokens whose first choice is expert e, dropped or not; T the real tokens. At
/// uniform load the loss is the coefficient. Algorithm 1 has 1 / experts for `experts`; this is the
/// scale of the authors' code, of Tutel and of DeepSpeed. Over the sequences, if that is the scope,
/// the mean is taken: they are the paper's groups.
///
/// c_e is constant to the derivative; the gradient reaches the router through the probabilities.
/// Padding, and choices of tokens without any expert, are not counted.
template <std::floating_point T>
struct GShardLoss {
  static constexpr std::string_view kName = "gshard";

  T coefficient = T(0.01);
  Scope scope = Scope::kBatch;

  /// \throws ConfigError  if the coefficient is negative.
  void check() const { expect_at_least("GShardLoss", "coefficient", coefficient, T(0)); }

  /// \return         The loss, already scaled by `coefficient`.
  T loss(const Routing<T>& routing) const {
    return factor(routing) * priced_probability(routing, scope, first_choices(routing));
  }

  /// Adds d(loss)/d(probabilities).
  void add_gradient(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    add_priced_probability_gradient(routing, scope, factor(routing), first_choices(routing),
                                    gradient);
  }

 private:
  T factor(const Routing<T>& routing) const {
    return coefficient * static_cast<T>(routing.experts());
  }

  /// The fraction of the tokens that chose each expert first.
  static auto first_choices(const Routing<T>& routing) {
    return [&routing](Index begin, Index end, Index tokens, RowVector<T>& f) {
      f.setZero(routing.experts());
      for (Index t = begin; t < end; ++t) {
        if (routing.first(t) == routing.last(t)) continue;
        f[routing.expert[static_cast<std::size_t>(routing.first(t))]] += T(1);
      }
      f /= static_cast<T>(tokens);
    };
  }
};

}  // namespace weir
