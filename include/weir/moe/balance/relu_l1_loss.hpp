// SPDX-License-Identifier: MIT
/// \file
/// Adaptive L1 regularisation of ReLU routing (ReMoE, Wang et al. 2024, arXiv:2412.14711, section
/// 3.3-3.4).
#pragma once

#include <algorithm>
#include <concepts>
#include <limits>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/parameter.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of ReluL1Loss.
struct ReluL1LossConfig {
  Index k = 2;               ///< The mean number of experts per token that is wanted.
  double initial = 1e-8;     ///< The coefficient lambda before the first update.
  double multiplier = 1.2;   ///< alpha.
  bool load_balance = true;  ///< Weights the experts by their load.
};

/// Keeps the weights of ReluRouting just small enough that a token has k experts on average:
///
///     loss = lambda / T * sum_t sum_e g_te                        eq. 7
///     loss = lambda / T * sum_t sum_e f_e g_te,                   eq. 10, with load_balance
///                        f_e = experts / (k T) * c_e
///     lambda <- lambda * alpha^sign((1 - k / experts) - S)        eq. 8, in `update`
///
/// T counts real tokens, c_e the assignments to expert e, dropped or not; S = 1 - (sum_e c_e) /
/// (T experts) is the sparsity of all backward passes since the last update, micro-batches adding
/// up. So lambda grows while tokens have more than k experts on average, shrinks while they have
/// fewer, and stays at exactly k. At uniform load with k experts to a token f_e = 1: then eq. 10 is
/// eq. 7, lambda times the mean over tokens of the sum of their weights. f_e is constant to the
/// derivative, and the loss reaches the router through the weights of chosen experts. Without real
/// tokens the loss is zero. `experts` are those that the pass allows to some token.
///
/// The paper has one lambda for all layers, moved by their mean sparsity, and divides the loss by
/// the number of layers; here every layer has its own. lambda is a buffer, so that a resumed
/// training goes on with it.
template <std::floating_point T>
class ReluL1Loss : public BalancerBase {
 public:
  static constexpr std::string_view kName = "relu_l1";
  struct Cache {
    RowVector<T> price;  ///< [experts], what each weight of the expert is multiplied by.
  };

  /// \throws ConfigError  unless k >= 1, initial > 0 and multiplier >= 1.
  explicit ReluL1Loss(ReluL1LossConfig config = {}) : config_(config) {
    expect_positive("ReluL1Loss", "initial", config_.initial);
    set_coefficient(config_.initial);
    check();
  }

  void check() const {
    expect_at_least<Index>("ReluL1Loss", "k", config_.k, 1);
    expect_at_least("ReluL1Loss", "multiplier", config_.multiplier, 1.0);
    expect_positive("ReluL1Loss", "coefficient", coefficient());
  }

  /// \return         The loss, already scaled by lambda.
  double forward(const Routing<T>& routing, Cache& cache) const;

  /// Adds `scale` times d(loss)/d(weights).
  void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                Cache& cache) const {
    for (Index a = 0; a < routing.assignments(); ++a) {
      gradient.weights[a] += static_cast<T>(scale) * cache.price[routing.expert[a]];
    }
  }

  void observe(const Routing<T>& routing) {
    tokens_ += routing.rows.real();
    assignments_ += routing.assignments();
  }

  /// Moves lambda and starts counting anew; without anything counted it stays. It does not shrink
  /// to zero, from which it could not come back.
  template <class S>
  void update(S& /*selector*/) {
    const Index wanted = config_.k * tokens_;
    const auto multiplier = static_cast<T>(config_.multiplier);
    T& lambda = coefficient_.value(0, 0);
    if (assignments_ > wanted) lambda *= multiplier;
    if (assignments_ < wanted) lambda = std::max(lambda / multiplier, kLeast);
    discard_self();
  }

  /// Forgets what was counted since the last update; for `weir::discard`.
  void discard_self() {
    tokens_ = 0;
    assignments_ = 0;
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("coefficient", self.coefficient_);
  }

  /// lambda.
  double coefficient() const { return static_cast<double>(coefficient_.value(0, 0)); }

  /// \throws ConfigError  unless it is above zero.
  void set_coefficient(double coefficient) {
    expect_positive("ReluL1Loss", "coefficient", coefficient);
    coefficient_.value.setConstant(1, 1, static_cast<T>(coefficient));
  }

  const ReluL1LossConfig& config() const { return config_; }

 private:
  static constexpr T kLeast = std::numeric_limits<T>::min();

  void set_prices(const Routing<T>& routing, RowVector<T>& price) const;

  ReluL1LossConfig config_;
  Buffer<T> coefficient_;  // [1, 1]
  Index tokens_ = 0;
  Index assignments_ = 0;
};

template <std::floating_point T>
double ReluL1Loss<T>::forward(const Routing<T>& routing, Cache& cache) const {
  set_prices(routing, cache.price);
  T sum = T(0);
  for (Index a = 0; a < routing.assignments(); ++a) {
    sum += cache.price[routing.expert[a]] * routing.weight[a];
  }
  return static_cast<double>(sum);
}

template <std::floating_point T>
void ReluL1Loss<T>::set_prices(const Routing<T>& routing, RowVector<T>& price) const {
  const T lambda = coefficient_.value(0, 0);
  const auto tokens = static_cast<T>(routing.rows.real());
  set_zero(price, routing.experts());
  if (routing.assignments() == 0) return;
  if (!config_.load_balance) {
    price.setConstant(lambda / tokens);
    return;
  }
  routing.add_load(0, routing.tokens(), price);
  price *= lambda * static_cast<T>(routing.open_experts()) /
           (static_cast<T>(config_.k) * tokens * tokens);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::ReluL1Loss<float>;
extern template class weir::ReluL1Loss<double>;
#endif
