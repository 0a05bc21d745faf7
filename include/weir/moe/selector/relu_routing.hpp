// SPDX-License-Identifier: MIT
/// \file
/// ReLU routing: every expert with a positive logit (ReMoE, Wang et al. 2024).
#pragma once

#include <concepts>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/variable_choice.hpp>
#include <weir/ops/top_k.hpp>

namespace weir {

/// Sends a token to all experts with a positive logit z, with the weights
///
///     g_e = max(z_e, 0)
///
/// so that the layer is continuous: an expert comes in with the weight zero. A token may have no
/// expert at all, or every one; ReluL1Loss brings the mean number to what is wanted. The largest
/// logit comes first, among equal ones the lowest index. The derivative is that of the ReLU, with 0
/// at z = 0. The probabilities that balancers see are g_e / sum_j g_j, whatever the scale of
/// the weights; all zero where there is no expert. (Wang et al. 2024, arXiv:2412.14711, eq. 4.)
template <std::floating_point T>
class ReluRouting : public SelectorBase<T> {
 public:
  using Cache = VariableChoice;

  /// \throws ConfigError  unless experts >= 1.
  void check(Index experts) const { expect_at_least<Index>("ReluRouting", "experts", experts, 1); }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& cache) const;

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& /*cache*/) const;

 private:
  /// The sum of the weights of a token that has experts, divided by the largest.
  static T relative_sum(const Routing<T>& routing, Index t) {
    const auto experts = routing.experts_of(t);
    T sum = T(0);
    for (const Index e : experts) sum += routing.logits(t, e) / routing.logits(t, experts[0]);
    return sum;
  }
};

template <std::floating_point T>
void ReluRouting<T>::forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing,
                             Cache& cache) const {
  check(logits.cols());
  routing.begin("ReluRouting", logits, pass);
  const Index experts = routing.experts();
  const auto choose = [&](Index t, Index* chosen) {
    const T* z = routing.logits.row(t).data();
    Index n = 0;
    for (Index e = 0; e < experts; ++e) n += z[e] > T(0) ? 1 : 0;
    top_k<T>(span_of(z, experts), span_of(chosen, n));
    return n;
  };
  assign_chosen(routing, experts, 16 * experts, cache, choose);
  routing.rows.for_each_real(4 * experts, [&](Index t) {
    auto p = routing.probabilities.row(t);
    p.setZero();
    if (routing.first(t) == routing.last(t)) return;
    const T total = relative_sum(routing, t);
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      routing.weight[a] = routing.logits(t, routing.expert[a]);
      p[routing.expert[a]] = routing.weight[a] / routing.weight[routing.first(t)] / total;
    }
  });
}

template <std::floating_point T>
void ReluRouting<T>::backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                              Cache& /*cache*/) const {
  routing.rows.for_each_real(8 * routing.experts(), [&](Index t) {
    // With s = sum g: d p_i / d g_j = (1[i = j] - p_i) / s
    const auto p = routing.probabilities.row(t);
    const auto dp = gradient.probabilities.row(t);
    if (routing.first(t) == routing.last(t)) return;
    const T total = relative_sum(routing, t);
    const T largest = routing.weight[routing.first(t)];
    T inner = T(0);
    for (const Index e : routing.experts_of(t)) inner += dp[e] * p[e];
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      const Index e = routing.expert[a];
      gradient.logits(t, e) += gradient.weights[a] + (dp[e] - inner) / total / largest;
    }
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::ReluRouting<float>;
extern template class weir::ReluRouting<double>;
#endif
