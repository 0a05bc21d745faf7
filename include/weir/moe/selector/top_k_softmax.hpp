// SPDX-License-Identifier: MIT
/// \file
/// The k best logits, then a softmax over those: Mixtral, gpt-oss, Shazeer's noisy gating.
#pragma once

#include <concepts>

#include <weir/core/parallel.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/ops/softmax.hpp>

namespace weir {

/// Chooses the k experts S of largest logit z, with the weights
///
///     g_e = scale * exp(z_e) / sum_{j in S} exp(z_j)
///
/// Equal logits: the lowest index first. The choice is constant to the derivative. In exact
/// arithmetic these are the weights of a renormalised SoftmaxTopK. With k = 1 the weight is
/// constant, so that the task's loss does not reach the router.
/// (Shazeer et al. 2017, arXiv:1701.06538, eq. 3 and 5, there on noisy logits; Jiang et al. 2024,
/// arXiv:2401.04088, section 2.1.)
template <std::floating_point T>
struct TopKSoftmax {
  using Scalar = T;
  static constexpr bool kImposable = true;  ///< See Replay.

  Index k = 2;
  double scale = 1.0;
  GroupLimit groups = {};  ///< By the logits, as in Megatron-Core.

  /// \throws ConfigError  unless 1 <= k <= experts, scale > 0 and the groups fit.
  void check(Index experts) const {
    if (k < 1 || k > experts) {
      fail<ConfigError>("TopKSoftmax: k = ", k, ", expected 1 <= k <= experts = ", experts);
    }
    expect_positive("TopKSoftmax", "scale", scale);
    groups.check("TopKSoftmax", experts, k);
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void select(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing) const {
    check(logits.cols());
    routing.begin("TopKSoftmax", logits, pass, k);
    routing.assign_each(k);
    const Index experts = routing.experts();
    parallel_rows(routing.tokens(), 16 * experts, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        if (routing.is_padding(t)) {
          routing.probabilities.row(t).setZero();
          continue;
        }
        const T* z = routing.logits.row(t).data();
        Index* chosen = routing.expert.data() + routing.first(t);
        T* weight = routing.weight.data() + routing.first(t);
        softmax_row(z, experts, routing.probabilities.row(t).data());
        const T* const among = routing.imposed != nullptr ? z : groups.candidates(z, experts);
        routing.choose(t, among, k, chosen);
        for (Index i = 0; i < k; ++i) weight[i] = z[chosen[i]];
        softmax_row(weight, k, weight);
        for (Index i = 0; i < k; ++i) weight[i] *= static_cast<T>(scale);
      }
    });
    routing.expect_allowed("TopKSoftmax");
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    const Index experts = routing.experts();
    parallel_rows(routing.tokens(), 8 * experts, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        if (routing.is_padding(t)) continue;
        const Index* chosen = routing.expert.data() + routing.first(t);
        const T* weight = routing.weight.data() + routing.first(t);
        const T* d_weight = gradient.weights.data() + routing.first(t);
        T* dz = gradient.logits.row(t).data();
        // With g = scale * q, q the softmax over S: dz_i = g_i * (dg_i - sum_j q_j dg_j).
        T inner = T(0);
        for (Index i = 0; i < k; ++i) inner += weight[i] * d_weight[i];
        inner /= static_cast<T>(scale);
        for (Index i = 0; i < k; ++i) dz[chosen[i]] += weight[i] * (d_weight[i] - inner);
        add_softmax_backward_row(routing.probabilities.row(t).data(),
                                 gradient.probabilities.row(t).data(), experts, dz);
      }
    });
  }
};

}  // namespace weir
