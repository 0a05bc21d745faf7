// SPDX-License-Identifier: MIT
/// \file
/// Entropies of the router's probabilities as a loss (Shen et al. 2023, arXiv:2306.04640).
#pragma once

#include <cmath>
#include <concepts>
#include <string_view>

#include <weir/core/parallel.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// How sure the router is of a token, and how level it is over all of them:
///
///     loss = token * H_token + mean * H_mean
///     H_token = -1/T sum_t sum_e p_te ln p_te
///     H_mean  = -sum_e P_e ln P_e,    P_e = 1/T sum_t p_te
///
/// over the T real tokens; zero if there are none, and 0 ln 0 = 0. Either coefficient may have
/// either sign. H_token alone is the dynamic loss that keeps TopP from choosing every expert (Huang
/// et al. 2024, arXiv:2403.07652, eq. 7). H_mean - H_token is the mutual information of token and
/// expert: ModuleFormer's loss, its negative, is `EntropyLoss::mutual_information` (Shen et al.
/// 2023, arXiv:2306.04640; of task and expert: Chen et al. 2022, arXiv:2212.08066). H_token is a
/// mean over tokens; H_mean is not, so that each micro-batch is levelled by itself.
///
/// At uniform load H_mean = ln experts, where load is the mean probability; H_token is anything
/// from 0 to that.
///
/// A probability of zero gets no gradient: the softmax would let none through.
template <std::floating_point T>
struct EntropyLoss {
  static constexpr std::string_view kName = "entropy";

  T token = T(0);  ///< Positive: sure of each token.
  T mean = T(0);   ///< Negative: level over the tokens.

  /// Minus the mutual information of token and expert, times `coefficient`.
  static EntropyLoss mutual_information(T coefficient) { return {coefficient, -coefficient}; }

  /// \throws ConfigError  if a coefficient is not finite.
  void check() const {
    if (!std::isfinite(token)) fail<ConfigError>("EntropyLoss: token = ", token, kExpected);
    if (!std::isfinite(mean)) fail<ConfigError>("EntropyLoss: mean = ", mean, kExpected);
  }

  /// \return         The loss, already scaled by the coefficients.
  T loss(const Routing<T>& routing) const {
    const Index tokens = routing.real_tokens();
    if (tokens == 0) return T(0);
    RowVector<T>& of_token = routing.per_token;
    of_token.setZero(routing.tokens());
    for_each_real_token(routing, [&](Index t) {
      for (const T p : routing.probabilities.row(t)) of_token[t] -= p_ln_p(p);
    });
    mean_probability(routing, tokens, routing.scratch[0]);
    T of_mean = T(0);
    for (const T p : routing.scratch[0]) of_mean -= p_ln_p(p);
    return token * of_token.sum() / static_cast<T>(tokens) + mean * of_mean;
  }

  /// Adds d(loss)/d(probabilities).
  void add_gradient(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    const Index tokens = routing.real_tokens();
    if (tokens == 0) return;
    RowVector<T>& p_mean = routing.scratch[0];
    mean_probability(routing, tokens, p_mean);
    const T per_token = T(1) / static_cast<T>(tokens);
    for_each_real_token(routing, [&](Index t) {
      for (Index e = 0; e < routing.experts(); ++e) {
        const T p = routing.probabilities(t, e);
        if (!(p > T(0))) continue;
        gradient.probabilities(t, e) -=
            per_token * (token * (std::log(p) + T(1)) + mean * (std::log(p_mean[e]) + T(1)));
      }
    });
  }

 private:
  static constexpr std::string_view kExpected = ", expected a finite number";

  static T p_ln_p(T p) { return p > T(0) ? p * std::log(p) : T(0); }

  static void mean_probability(const Routing<T>& routing, Index tokens, RowVector<T>& p) {
    p.setZero(routing.experts());
    for (Index t = 0; t < routing.tokens(); ++t) {
      if (!routing.is_padding(t)) p += routing.probabilities.row(t);
    }
    p /= static_cast<T>(tokens);
  }

  /// Calls `body(t)` on all threads.
  template <class Body>
  static void for_each_real_token(const Routing<T>& routing, Body&& body) {
    constexpr Index kCostOfLogarithm = 32;
    parallel_rows(routing.tokens(), kCostOfLogarithm * routing.experts(),
                  [&](Index begin, Index end) {
                    for (Index t = begin; t < end; ++t) {
                      if (!routing.is_padding(t)) body(t);
                    }
                  });
  }
};

}  // namespace weir
