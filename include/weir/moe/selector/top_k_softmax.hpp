// SPDX-License-Identifier: MIT
/// \file
/// The k best logits, then a softmax over those: Mixtral, gpt-oss, Shazeer's noisy gating.
#pragma once

#include <concepts>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/moe/selector/k_best.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of TopKSoftmax.
struct TopKSoftmaxConfig {
  Index k = 2;
  double scale = 1.0;
  GroupLimit groups = {};  ///< Limits the choice by the logits, as in Megatron-Core.
};

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
class TopKSoftmax : public SelectorBase<T> {
 public:
  using typename SelectorBase<T>::Cache;

  explicit TopKSoftmax(TopKSoftmaxConfig config = {}) : config_(config) {}

  /// \throws ConfigError  unless 1 <= k <= experts, scale > 0 and the groups fit.
  void check(Index experts) const {
    expect_k("TopKSoftmax", config_.k, experts);
    expect_positive("TopKSoftmax", "scale", config_.scale);
    config_.groups.check("TopKSoftmax", experts, config_.k);
  }

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

  const TopKSoftmaxConfig& config() const { return config_; }

  /// How many experts each token has from the next pass on. `check` tells whether it fits.
  void set_k(Index k) { config_.k = k; }

 private:
  void route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed,
             Routing<T>& routing) const;

  TopKSoftmaxConfig config_;
};

template <std::floating_point T>
void TopKSoftmax<T>::backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                              Cache& /*cache*/) const {
  const Index experts = routing.experts();
  routing.rows.for_each_real(8 * experts, [&](Index t) {
    const Index* chosen = routing.expert.data() + routing.first(t);
    const T* weight = routing.weight.data() + routing.first(t);
    const T* d_weight = gradient.weights.data() + routing.first(t);
    T* dz = gradient.logits.row(t).data();
    // With g = scale * q, q the softmax over S: dz_i = g_i * (dg_i - sum_j q_j dg_j).
    T inner = T(0);
    for (Index i = 0; i < config_.k; ++i) inner += weight[i] * d_weight[i];
    inner /= static_cast<T>(config_.scale);
    for (Index i = 0; i < config_.k; ++i) dz[chosen[i]] += weight[i] * (d_weight[i] - inner);
    add_softmax_backward_row<T>(row_span(routing.probabilities, t),
                                row_span(gradient.probabilities, t), span_of(dz, experts));
  });
}

template <std::floating_point T>
void TopKSoftmax<T>::route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed,
                           Routing<T>& routing) const {
  check(logits.cols());
  const Index k = config_.k;
  route_k_best(
      {"TopKSoftmax", k, config_.groups, imposed}, logits, pass, routing,
      [&](Index t, T* /*p*/) -> const T* { return routing.logits.row(t).data(); },
      [&](Index t, const Index* chosen, T* weight, T* p) {
        const T* z = routing.logits.row(t).data();
        softmax_row<T>(row_span(routing.logits, t), span_of(p, routing.experts()));
        for (Index i = 0; i < k; ++i) weight[i] = z[chosen[i]];
        softmax_row<T>(span_of(weight, k), span_of(weight, k));
        loops::scale(k, static_cast<T>(config_.scale), weight, weight);
      });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::TopKSoftmax<float>;
extern template class weir::TopKSoftmax<double>;
#endif
