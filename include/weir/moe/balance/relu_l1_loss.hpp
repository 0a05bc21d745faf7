// SPDX-License-Identifier: MIT
/// \file
/// Adaptive L1 regularisation of ReLU routing (ReMoE, Wang et al. 2024, arXiv:2412.14711, section
/// 3.3-3.4).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of ReluL1Loss.
struct ReluL1Config {
  Index k = 2;               ///< The mean number of experts per token that is wanted.
  double initial = 1e-8;     ///< The coefficient lambda at first.
  double multiplier = 1.2;   ///< alpha.
  bool load_balance = true;  ///< Weights the experts by their load.
};

/// Keeps the weights of ReluRouting small, as much so as it takes for a token to have k experts on
/// average:
///
///     loss = lambda / T * sum_t sum_e g_te                        eq. 7
///     loss = lambda / T * sum_t sum_e f_e g_te,                   eq. 10, with load_balance
///                        f_e = experts / (k T) * c_e
///     lambda <- lambda * alpha^sign((1 - k / experts) - S)        eq. 8, in `update`
///
/// T counts real tokens, c_e the assignments to expert e, dropped or not; S = 1 - (sum_e c_e) /
/// (T experts) is the sparsity of all backward passes since the last update, micro-batches adding
/// up. So lambda grows while tokens have more than k experts on average, shrinks while they have
/// fewer, and stays at exactly k. At uniform load, of k experts to a token, f_e = 1: then eq. 10 is
/// eq. 7, lambda times the mean over tokens of the sum of their weights. f_e is constant to the
/// derivative, and the loss reaches the router through the weights of chosen experts. Without real
/// tokens the loss is zero.
///
/// The paper has one lambda for all layers, moved by their mean sparsity, and divides the loss by
/// the number of layers; here every layer has its own.
template <std::floating_point T>
class ReluL1Loss {
 public:
  static constexpr std::string_view kName = "relu_l1";

  /// \throws ConfigError  unless k >= 1, initial > 0 and multiplier >= 1.
  explicit ReluL1Loss(ReluL1Config config = {})
      : config_(config), coefficient_(static_cast<T>(config.initial)) {
    check();
  }

  void check() const {
    expect_at_least<Index>("ReluL1Loss", "k", config_.k, 1);
    expect_positive("ReluL1Loss", "initial", config_.initial);
    expect_at_least("ReluL1Loss", "multiplier", config_.multiplier, 1.0);
  }

  /// \return         The loss, already scaled by lambda.
  T loss(const Routing<T>& routing) const {
    if (routing.assignments() == 0) return T(0);
    RowVector<T>& f = routing.scratch[0];
    factors(routing, f);
    T sum = T(0);
    for (std::size_t a = 0; a < routing.expert.size(); ++a) {
      sum += f[routing.expert[a]] * routing.weight[a];
    }
    return sum;
  }

  /// Adds d(loss)/d(weights).
  void add_gradient(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    if (routing.assignments() == 0) return;
    RowVector<T>& f = routing.scratch[0];
    factors(routing, f);
    for (Index a = 0; a < routing.assignments(); ++a) {
      gradient.weights[a] += f[routing.expert[static_cast<std::size_t>(a)]];
    }
  }

  void observe(const Routing<T>& routing) {
    tokens_ += routing.real_tokens();
    assignments_ += routing.assignments();
  }

  /// Moves lambda and starts counting anew; without anything counted it stays.
  template <class S>
  void update(S&) {
    const Index wanted = config_.k * tokens_;
    if (assignments_ > wanted) coefficient_ *= static_cast<T>(config_.multiplier);
    if (assignments_ < wanted) coefficient_ /= static_cast<T>(config_.multiplier);
    tokens_ = 0;
    assignments_ = 0;
  }

  /// lambda.
  T coefficient() const { return coefficient_; }

  /// To go on with an earlier training.
  /// \throws ConfigError  unless it is above zero.
  void set_coefficient(T coefficient) {
    expect_positive("ReluL1Loss", "coefficient", coefficient);
    coefficient_ = coefficient;
  }

  const ReluL1Config& config() const { return config_; }

 private:
  /// What a weight of each expert is multiplied by.
  void factors(const Routing<T>& routing, RowVector<T>& f) const {
    const auto tokens = static_cast<T>(routing.real_tokens());
    if (!config_.load_balance) {
      f.setConstant(routing.experts(), coefficient_ / tokens);
      return;
    }
    f.setZero(routing.experts());
    routing.add_load(0, routing.tokens(), f);
    f *= coefficient_ * static_cast<T>(routing.experts()) /
         (static_cast<T>(config_.k) * tokens * tokens);
  }

  ReluL1Config config_;
  T coefficient_;
  Index tokens_ = 0;
  Index assignments_ = 0;
};

}  // namespace weir
