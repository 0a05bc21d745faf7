// SPDX-License-Identifier: MIT
/// \file
/// Second-place loss of Mesh TensorFlow (mesh_tensorflow/transformer/moe.py, `_top_2_gating` with
/// moe_use_second_place_loss).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/moe/balance/conditional_price.hpp>
#include <weir/moe/balance/first_choice.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of SecondPlaceLoss.
struct SecondPlaceLossConfig {
  double coefficient = 0.005;
  double epsilon = 0.0;  ///< Mesh TensorFlow: 1e-9, against a division by zero, which makes the
                         ///< loss of tokens whose first choice is certain too small. Here, a token
                         ///< with no probability left for others has the loss 0 in any case.
};

/// Rewards a router for spreading the second-best experts of the tokens evenly, beside GShardLoss,
/// which does it for the best:
///
///     loss = coefficient * experts / T^2 * sum_e c_e * sum_t q_te
///     q_te = p_te / (sum_{j != first_t} p_tj + epsilon),    q_te = 0 for e = first_t
///
/// first_t is the first choice of token t. c_e counts the tokens whose probability is largest at e
/// once first_t is out, whether they are sent there or not; of equal ones the lowest index wins. T
/// counts the real tokens. The original adds it to GShard's loss with half its coefficient.
///
/// Padding, and tokens without any choice, count in no c_e and no q. Experts that are forbidden to
/// a token do not count for it either: a token that is allowed its first choice alone has no second
/// place. `experts` are those that the pass allows to some token. The loss is zero with one expert
/// or without tokens, and the coefficient where second choices are spread evenly. The counts and
/// first_t are constant to the derivative.
template <std::floating_point T>
class SecondPlaceLoss : public BalancerBase {
 public:
  static constexpr std::string_view kName = "second_place";
  struct Cache {
    RowVector<T> price;  ///< [experts], coefficient * experts / T^2 * c_e.
  };

  explicit SecondPlaceLoss(SecondPlaceLossConfig config = {}) : config_(config) { check(); }

  /// \throws ConfigError  if the coefficient or epsilon is negative.
  void check() const {
    expect_at_least("SecondPlaceLoss", "coefficient", config_.coefficient, 0.0);
    expect_at_least("SecondPlaceLoss", "epsilon", config_.epsilon, 0.0);
  }

  /// \return         The loss, already scaled by `coefficient`.
  double forward(const Routing<T>& routing, Cache& cache) const;

  /// Adds `scale` times d(loss)/d(probabilities).
  void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                Cache& cache) const {
    for_each_first_choice(routing, 0, routing.tokens(), [&](Index t, Index first) {
      of_token(routing, t, first, cache.price)
          .add_gradient(static_cast<T>(scale), &gradient.probabilities(t, 0));
    });
  }

  const SecondPlaceLossConfig& config() const { return config_; }

 private:
  /// Whether expert e may be second.
  static bool competes(const Routing<T>& routing, Index t, Index first, Index e) {
    return e != first && !routing.is_forbidden(t, e);
  }

  void set_prices(const Routing<T>& routing, RowVector<T>& price) const;

  /// sum_e price_e q_te
  auto of_token(const Routing<T>& routing, Index t, Index first, const RowVector<T>& price) const {
    const auto is_in = [&routing, t, first](Index e) { return competes(routing, t, first, e); };
    return ConditionalPrice<T, decltype(is_in)>{.p = &routing.probabilities(t, 0),
                                                .u = price.data(),
                                                .begin = 0,
                                                .end = routing.experts(),
                                                .is_in = is_in,
                                                .epsilon = static_cast<T>(config_.epsilon)};
  }

  SecondPlaceLossConfig config_;
};

template <std::floating_point T>
double SecondPlaceLoss<T>::forward(const Routing<T>& routing, Cache& cache) const {
  set_prices(routing, cache.price);
  T sum = T(0);
  for_each_first_choice(routing, 0, routing.tokens(), [&](Index t, Index first) {
    sum += of_token(routing, t, first, cache.price).value();
  });
  return static_cast<double>(sum);
}

template <std::floating_point T>
void SecondPlaceLoss<T>::set_prices(const Routing<T>& routing, RowVector<T>& price) const {
  const Index experts = routing.experts();
  set_zero(price, experts);
  for_each_first_choice(routing, 0, routing.tokens(), [&](Index t, Index first) {
    Index second = experts;
    for (Index e = 0; e < experts; ++e) {
      if (!competes(routing, t, first, e)) continue;
      const bool better =
          second == experts || routing.probabilities(t, e) > routing.probabilities(t, second);
      if (better) second = e;
    }
    if (second < experts) price[second] += T(1);
  });
  const auto tokens = static_cast<T>(routing.rows.real());
  if (tokens == T(0)) return;
  price *= static_cast<T>(config_.coefficient) * static_cast<T>(routing.open_experts()) /
           (tokens * tokens);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::SecondPlaceLoss<float>;
extern template class weir::SecondPlaceLoss<double>;
#endif
