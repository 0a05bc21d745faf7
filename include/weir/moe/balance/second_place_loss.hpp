// SPDX-License-Identifier: MIT
/// \file
/// Second-place loss of Mesh TensorFlow (mesh_tensorflow/transformer/moe.py, `_top_2_gating` with
/// moe_use_second_place_loss).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/moe/routing.hpp>

namespace weir {

/// Rewards a router for spreading the second-best experts of the tokens evenly, beside GShardLoss,
/// which does it for the best:
///
///     loss = coefficient * experts / T^2 * sum_e c_e * sum_t q_te
///     q_te = p_te / (sum_{j != first_t} p_tj + 1e-9),    q_te = 0 for e = first_t
///
/// first_t is the first choice of token t, c_e counts the tokens whose probability is largest at e
/// once first_t is out, whether they are sent there or not; of equal ones the lowest index. T
/// counts the real tokens. The original adds it to GShard's loss with half its coefficient.
/// Padding, and tokens without any choice, count in no c_e and no q. Nor do experts that are
/// forbidden to a token: one that is allowed its first choice alone has no second place. Zero with
/// one expert or without tokens. At uniform load, of second choices, the loss is the coefficient.
/// The counts and first_t are constant to the derivative.
template <std::floating_point T>
struct SecondPlaceLoss {
  static constexpr std::string_view kName = "second_place";

  T coefficient = T(0.005);

  /// \throws ConfigError  if the coefficient is negative.
  void check() const { expect_at_least("SecondPlaceLoss", "coefficient", coefficient, T(0)); }

  /// \return         The loss, already scaled by `coefficient`.
  T loss(const Routing<T>& routing) const {
    RowVector<T>& price = routing.scratch[0];
    prices(routing, price);
    T sum = T(0);
    for_each_choice(routing, [&](Index t, Index first) {
      sum += mean_price(routing, price, t, first, rest(routing, t, first));
    });
    return sum;
  }

  /// Adds d(loss)/d(probabilities).
  void add_gradient(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    RowVector<T>& price = routing.scratch[0];
    prices(routing, price);
    for_each_choice(routing, [&](Index t, Index first) {
      const T divisor = rest(routing, t, first);
      const T mean = mean_price(routing, price, t, first, divisor);
      for (Index e = 0; e < routing.experts(); ++e) {
        if (competes(routing, t, first, e)) {
          gradient.probabilities(t, e) += (price[e] - mean) / divisor;
        }
      }
    });
  }

 private:
  /// Calls `body(t, first)` for each token with a choice.
  template <class Body>
  static void for_each_choice(const Routing<T>& routing, Body&& body) {
    for (Index t = 0; t < routing.tokens(); ++t) {
      if (routing.is_padding(t) || routing.first(t) == routing.last(t)) continue;
      body(t, routing.expert[static_cast<std::size_t>(routing.first(t))]);
    }
  }

  /// Whether expert e may be second.
  static bool competes(const Routing<T>& routing, Index t, Index first, Index e) {
    return e != first && !routing.is_forbidden(t, e);
  }

  /// price[e] = coefficient * experts / T^2 * c_e.
  void prices(const Routing<T>& routing, RowVector<T>& price) const {
    const Index experts = routing.experts();
    price.setZero(experts);
    const auto tokens = static_cast<T>(routing.real_tokens());
    if (experts < 2) return;
    for_each_choice(routing, [&](Index t, Index first) {
      Index second = experts;
      for (Index e = 0; e < experts; ++e) {
        if (!competes(routing, t, first, e)) continue;
        const bool better =
            second == experts || routing.probabilities(t, e) > routing.probabilities(t, second);
        if (better) second = e;
      }
      if (second < experts) price[second] += T(1);
    });
    if (tokens > T(0)) price *= coefficient * static_cast<T>(experts) / (tokens * tokens);
  }

  /// What the probabilities of all experts but the first choice are divided by.
  static T rest(const Routing<T>& routing, Index t, Index first) {
    constexpr T kTiny = T(1e-9);
    T sum = kTiny;
    for (Index e = 0; e < routing.experts(); ++e) {
      if (competes(routing, t, first, e)) sum += routing.probabilities(t, e);
    }
    return sum;
  }

  /// sum_e price_e q_te
  static T mean_price(const Routing<T>& routing, const RowVector<T>& price, Index t, Index first,
                      T divisor) {
    T sum = T(0);
    for (Index e = 0; e < routing.experts(); ++e) {
      if (competes(routing, t, first, e)) sum += price[e] * routing.probabilities(t, e);
    }
    return sum / divisor;
  }
};

}  // namespace weir
