// SPDX-License-Identifier: MIT
/// \file
/// Softmax over all experts, then the k best: Switch, Grok-1, DBRX, OLMoE, DeepSeek-V2 and others.
#pragma once

#include <cmath>
#include <concepts>

#include <weir/core/parallel.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/ops/softmax.hpp>

namespace weir {

/// Chooses the k experts S of largest probability p = softmax(logits), with the weights
///
///     g_e = scale * p_e                                        raw
///     g_e = scale * p_e / (sum_{j in S} p_j^norm)^(1/norm)     renormalised
///
/// Equal probabilities: the lowest index first. The choice is constant to the derivative.
/// Raw: Switch (Fedus et al. 2021, arXiv:2101.03961, eq. 1-2), Grok-1, OLMoE; with a scale and a
/// group limit: DeepSeek-V2 (arXiv:2405.04434). Renormalised: GShard (Lepikhin et al. 2020,
/// arXiv:2006.16668), Qwen3-MoE, and DBRX, whose norm is a setting. With k = 1 and renormalisation
/// the weight is constant, so that the task's loss does not reach the router.
template <std::floating_point T>
struct SoftmaxTopK {
  using Scalar = T;
  static constexpr bool kImposable = true;  ///< See Replay.

  Index k = 2;
  bool renormalise = false;
  double scale = 1.0;
  double norm = 1.0;       ///< Of the renormalisation.
  GroupLimit groups = {};  ///< By the probabilities.

  /// \throws ConfigError  unless 1 <= k <= experts, scale > 0, norm >= 1 and the groups fit.
  void check(Index experts) const {
    if (k < 1 || k > experts) {
      fail<ConfigError>("SoftmaxTopK: k = ", k, ", expected 1 <= k <= experts = ", experts);
    }
    expect_positive("SoftmaxTopK", "scale", scale);
    expect_at_least("SoftmaxTopK", "norm", norm, 1.0);
    groups.check("SoftmaxTopK", experts, k);
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void select(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing) const {
    check(logits.cols());
    routing.begin("SoftmaxTopK", logits, pass, k);
    routing.assign_each(k);
    const Index experts = routing.experts();
    parallel_rows(routing.tokens(), 16 * experts, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        T* p = routing.probabilities.row(t).data();
        if (routing.is_padding(t)) {
          routing.probabilities.row(t).setZero();
          continue;
        }
        softmax_row(routing.logits.row(t).data(), experts, p);
        Index* chosen = routing.expert.data() + routing.first(t);
        T* weight = routing.weight.data() + routing.first(t);
        routing.forbid(t, p);
        const T* const among = routing.imposed != nullptr ? p : groups.candidates(p, experts);
        routing.choose(t, among, k, chosen);
        routing.clear_forbidden(t, p);
        const T factor = static_cast<T>(scale) / divisor(p, chosen);
        for (Index i = 0; i < k; ++i) weight[i] = factor * p[chosen[i]];
      }
    });
    routing.expect_allowed("SoftmaxTopK");
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    const Index experts = routing.experts();
    parallel_rows(routing.tokens(), 8 * experts, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        if (routing.is_padding(t)) continue;
        const T* p = routing.probabilities.row(t).data();
        const Index* chosen = routing.expert.data() + routing.first(t);
        const T* d_weight = gradient.weights.data() + routing.first(t);
        T* dp = gradient.probabilities.row(t).data();
        // d g_i / d p_j = scale / N * (1[i = j] - p_i / N * (p_j / N)^(norm - 1))
        const T n = divisor(p, chosen);
        const T factor = static_cast<T>(scale) / n;
        T inner = T(0);
        for (Index i = 0; i < k; ++i) inner += d_weight[i] * p[chosen[i]];
        for (Index i = 0; i < k; ++i) {
          const T through_norm =
              renormalise ? inner / n * power(p[chosen[i]] / n, norm - 1.0) : T(0);
          dp[chosen[i]] += factor * (d_weight[i] - through_norm);
        }
        add_softmax_backward_row(p, dp, experts, gradient.logits.row(t).data());
      }
    });
  }

 private:
  static T power(T base, double exponent) {
    return exponent == 1.0   ? base
           : exponent == 0.0 ? T(1)
                             : static_cast<T>(std::pow(static_cast<double>(base), exponent));
  }

  T divisor(const T* p, const Index* chosen) const {
    if (!renormalise) return T(1);
    const T largest = p[chosen[0]];  // Relative to it, the sum of the powers is at least 1.
    T sum = T(0);
    for (Index i = 0; i < k; ++i) sum += power(p[chosen[i]] / largest, norm);
    return largest * power(sum, 1.0 / norm);
  }
};

}  // namespace weir
