// SPDX-License-Identifier: MIT
/// \file
/// Entropies of the router's probabilities as a loss (Shen et al. 2023, arXiv:2306.04640).
#pragma once

#include <cmath>
#include <concepts>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of EntropyLoss: the coefficients of its two entropies. Either may have either sign.
struct EntropyLossConfig {
  double token = 0.0;  ///< A positive one makes the router sure of each token.
  double mean = 0.0;   ///< A negative one makes the router level over the tokens.
};

/// How sure the router is of a token, and how level it is over all of them:
///
///     loss = token * H_token + mean * H_mean
///     H_token = -1/T sum_t sum_e p_te ln p_te
///     H_mean  = -sum_e P_e ln P_e,    P_e = 1/T sum_t p_te
///
/// over the T real tokens; zero if there are none, and 0 ln 0 = 0. H_token alone is the dynamic
/// loss that keeps TopP from choosing every expert (Huang et al. 2024, arXiv:2403.07652, eq. 7).
/// H_mean - H_token is the mutual information of token and expert: ModuleFormer's loss, its
/// negative, is `EntropyLoss::mutual_information` (Shen et al. 2023, arXiv:2306.04640; for task and
/// expert: Chen et al. 2022, arXiv:2212.08066). H_token is a mean over tokens; H_mean is not, so
/// that each micro-batch is levelled by itself.
///
/// Where the mean probabilities are equal H_mean = ln experts; H_token is anything from 0 to that.
///
/// A probability of zero gets no gradient: the softmax would let none through.
template <std::floating_point T>
class EntropyLoss : public BalancerBase {
 public:
  static constexpr std::string_view kName = "entropy";
  struct Cache {
    RowVector<T> of_token;  ///< [tokens], the entropy of each token's probabilities.
    RowVector<T> mean;      ///< [experts], P.
  };

  explicit EntropyLoss(EntropyLossConfig config = {}) : config_(config) { check(); }

  /// Minus the mutual information of token and expert, times `coefficient`.
  static EntropyLoss mutual_information(double coefficient) {
    return EntropyLoss({.token = coefficient, .mean = -coefficient});
  }

  /// \throws ConfigError  if a coefficient is not finite.
  void check() const {
    expect_finite("EntropyLoss", "token", config_.token);
    expect_finite("EntropyLoss", "mean", config_.mean);
  }

  /// \return         The loss, already scaled by the coefficients.
  double forward(const Routing<T>& routing, Cache& cache) const;

  /// Adds `scale` times d(loss)/d(probabilities).
  void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                Cache& cache) const;

  const EntropyLossConfig& config() const { return config_; }

 private:
  static constexpr Index kCostOfLogarithm = 32;

  static T p_ln_p(T p) { return p > T(0) ? p * std::log(p) : T(0); }

  EntropyLossConfig config_;
};

template <std::floating_point T>
double EntropyLoss<T>::forward(const Routing<T>& routing, Cache& cache) const {
  const auto tokens = static_cast<T>(routing.rows.real());
  if (tokens == T(0)) return 0.0;
  set_zero(cache.of_token, routing.tokens());
  set_zero(cache.mean, routing.experts());
  routing.rows.for_each_real(kCostOfLogarithm * routing.experts(), [&](Index t) {
    for (const T p : routing.probabilities.row(t)) cache.of_token[t] -= p_ln_p(p);
  });
  for (Index t = 0; t < routing.tokens(); ++t) {
    if (!routing.rows.is_padding(t)) cache.mean += routing.probabilities.row(t);
  }
  cache.mean /= tokens;
  T of_mean = T(0);
  for (const T p : cache.mean) of_mean -= p_ln_p(p);
  return config_.token * static_cast<double>(cache.of_token.sum() / tokens) +
         config_.mean * static_cast<double>(of_mean);
}

template <std::floating_point T>
void EntropyLoss<T>::backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                              Cache& cache) const {
  const double per_token = scale / static_cast<double>(routing.rows.real());
  const auto of_token = static_cast<T>(per_token * config_.token);
  const auto of_mean = static_cast<T>(per_token * config_.mean);
  routing.rows.for_each_real(kCostOfLogarithm * routing.experts(), [&](Index t) {
    for (Index e = 0; e < routing.experts(); ++e) {
      const T p = routing.probabilities(t, e);
      if (!(p > T(0))) continue;
      gradient.probabilities(t, e) -=
          of_token * (std::log(p) + T(1)) + of_mean * (std::log(cache.mean[e]) + T(1));
    }
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::EntropyLoss<float>;
extern template class weir::EntropyLoss<double>;
#endif
