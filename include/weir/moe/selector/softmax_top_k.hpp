// SPDX-License-Identifier: MIT
/// \file
/// Softmax over all experts, then the k best: Switch, Grok-1, DBRX, OLMoE, DeepSeek-V2 and others.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/moe/selector/k_best.hpp>
#include <weir/ops/softmax.hpp>

namespace weir {

/// Settings of SoftmaxTopK.
struct SoftmaxTopKConfig {
  Index k = 2;
  bool renormalise = false;  ///< Off by default, as in Switch and DeepSeek-V2: probabilities are
                             ///< weights as they are, and with k = 1 they are what the router
                             ///< learns from.
  double scale = 1.0;
  double norm = 1.0;       ///< The p of the p-norm that renormalised weights have.
  GroupLimit groups = {};  ///< Limits the choice by the probabilities.
};

/// Chooses the k experts S of largest probability p = softmax(logits), with the weights
///
///     g_e = scale * p_e                                        raw
///     g_e = scale * p_e / (sum_{j in S} p_j^norm)^(1/norm)     renormalised
///
/// Equal probabilities: the lowest index first. The choice is constant to the derivative.
/// Raw: Switch (Fedus et al. 2021, arXiv:2101.03961, eq. 1-2), Grok-1, OLMoE; with a scale and a
/// group limit: DeepSeek-V2 (arXiv:2405.04434). Renormalised: GShard (Lepikhin et al. 2020,
/// arXiv:2006.16668), Qwen3-MoE, and DBRX, whose norm is a setting. With k = 1 and renormalisation
/// the weight is constant, so that the task's loss does not reach the router. Renormalised weights
/// are made of the logits, also where a group limit or an imposed choice leaves a token experts
/// whose probabilities are zero to rounding.
template <std::floating_point T>
class SoftmaxTopK : public SelectorBase<T> {
 public:
  using typename SelectorBase<T>::Cache;

  explicit SoftmaxTopK(SoftmaxTopKConfig config = {}) : config_(config) {}

  /// \throws ConfigError  unless 1 <= k <= experts, scale > 0, norm >= 1 (it may be infinite) and
  ///                      the groups fit.
  void check(Index experts) const;

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& /*cache*/) const {
    route(logits, pass, nullptr, routing);
  }

  /// `forward` with an imposed choice, see Replay.
  void forward_imposed(MatrixIn<T> logits, const Pass& pass, const RoutingTrace& imposed,
                       Routing<T>& routing, Cache& /*cache*/) const {
    route(logits, pass, &imposed, routing);
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& /*cache*/) const;

  const SoftmaxTopKConfig& config() const { return config_; }

  /// How many experts each token has from the next pass on. `check` tells whether it fits.
  void set_k(Index k) { config_.k = k; }

  /// Sets the weights [k] of the experts `chosen` [k] of a token, however they were chosen.
  /// \param z        [experts], its logits.
  /// \param p        [experts], their softmax.
  void weigh(const T* z, const T* p, const Index* chosen, T* weight) const;

 private:
  void route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed,
             Routing<T>& routing) const;

  static T power(T base, double exponent) {
    return exponent == 1.0   ? base
           : exponent == 0.0 ? T(1)
                             : static_cast<T>(std::pow(static_cast<double>(base), exponent));
  }

  /// Of the renormalised weights u_i of a token, divided by the scale, number i: p relative to the
  /// largest p that was chosen, divided by the norm of those.
  struct Renormalised {
    const T* z = nullptr;
    const Index* chosen = nullptr;
    T largest = T(0);  // Of the logits chosen.
    T norm = T(1);

    T operator()(Index i) const { return std::exp(z[chosen[i]] - largest) / norm; }
  };

  Renormalised renormalised(const T* z, const Index* chosen) const {
    Renormalised u{.z = z, .chosen = chosen, .largest = z[chosen[0]]};
    for (Index i = 1; i < config_.k; ++i) u.largest = std::max(u.largest, z[chosen[i]]);
    T sum = T(0);  // At least 1.
    for (Index i = 0; i < config_.k; ++i) sum += power(u(i), config_.norm);
    u.norm = power(sum, 1.0 / config_.norm);
    return u;
  }

  SoftmaxTopKConfig config_;
};

template <std::floating_point T>
void SoftmaxTopK<T>::check(Index experts) const {
  expect_k("SoftmaxTopK", config_.k, experts);
  expect_positive("SoftmaxTopK", "scale", config_.scale);
  if (!(config_.norm >= 1.0)) {
    throw_error<ConfigError>("SoftmaxTopK: norm = ", config_.norm, ", expected >= 1");
  }
  config_.groups.check("SoftmaxTopK", experts, config_.k);
}

template <std::floating_point T>
void SoftmaxTopK<T>::backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                              Cache& /*cache*/) const {
  const Index k = config_.k;
  const Index experts = routing.experts();
  routing.rows.for_each_real(8 * experts, [&](Index t) {
    const T* p = routing.probabilities.row(t).data();
    const Index* chosen = routing.expert.data() + routing.first(t);
    const T* d_weight = gradient.weights.data() + routing.first(t);
    T* dp = gradient.probabilities.row(t).data();
    T* dz = gradient.logits.row(t).data();
    const auto scale = static_cast<T>(config_.scale);
    if (config_.renormalise) {
      // d u_i / d z_j = u_i * (1[i = j] - u_j^norm)
      const Renormalised u = renormalised(routing.logits.row(t).data(), chosen);
      T inner = T(0);
      for (Index i = 0; i < k; ++i) inner += d_weight[i] * u(i);
      for (Index i = 0; i < k; ++i) {
        dz[chosen[i]] += scale * (u(i) * d_weight[i] - inner * power(u(i), config_.norm));
      }
    } else {
      for (Index i = 0; i < k; ++i) dp[chosen[i]] += scale * d_weight[i];
    }
    add_softmax_backward_row<T>(span_of(p, experts), span_of(dp, experts),
                                row_span(gradient.logits, t));
  });
}

template <std::floating_point T>
void SoftmaxTopK<T>::route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed,
                           Routing<T>& routing) const {
  check(logits.cols());
  route_k_best(
      {"SoftmaxTopK", config_.k, config_.groups, imposed}, logits, pass, routing,
      [&](Index t, T* p) -> const T* {
        softmax_row<T>(row_span(routing.logits, t), span_of(p, routing.experts()));
        return p;
      },
      [&](Index t, const Index* chosen, T* weight, const T* p) {
        weigh(routing.logits.row(t).data(), p, chosen, weight);
      });
}

template <std::floating_point T>
void SoftmaxTopK<T>::weigh(const T* z, const T* p, const Index* chosen, T* weight) const {
  const auto scale = static_cast<T>(config_.scale);
  if (!config_.renormalise) {
    for (Index i = 0; i < config_.k; ++i) weight[i] = scale * p[chosen[i]];
    return;
  }
  const Renormalised u = renormalised(z, chosen);
  for (Index i = 0; i < config_.k; ++i) weight[i] = scale * u(i);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::SoftmaxTopK<float>;
extern template class weir::SoftmaxTopK<double>;
#endif
