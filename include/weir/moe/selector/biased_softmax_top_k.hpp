// SPDX-License-Identifier: MIT
/// \file
/// Softmax over all experts, then the k best after a selection bias.
#pragma once

#include <concepts>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/parameter.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/k_best.hpp>
#include <weir/moe/selector/selection_bias.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of BiasedSoftmaxTopK.
struct BiasedSoftmaxTopKConfig {
  Index k = 2;
  double scale = 1.0;
};

/// Chooses the k experts S of largest p_e + b_e, p = softmax(logits), with the weights
///
///     g_e = scale * p_e
///
/// Equal biased probabilities: the lowest index first. The bias b is a buffer: saved, not trained
/// by gradient, moved by a balancer, QuantileBalance or BiasBalance. It enters the choice alone,
/// which is constant to the derivative. (Megatron-Core's quantile balancing, with b = -beta.)
template <std::floating_point T>
class BiasedSoftmaxTopK : public SelectorBase<T> {
 public:
  using typename SelectorBase<T>::Cache;
  static constexpr bool kBiasesProbabilities = true;

  /// A bias of zeros.
  /// \throws ConfigError  unless 1 <= k <= experts and scale > 0.
  explicit BiasedSoftmaxTopK(Index experts, BiasedSoftmaxTopKConfig config = {})
      : config_(config), soft_({.k = config.k, .scale = config.scale}) {
    expect_at_least<Index>("BiasedSoftmaxTopK", "experts", experts, 1);
    bias_.value.setZero(1, experts);
    check(experts);
  }

  /// \throws ConfigError     unless 1 <= k <= experts, scale > 0 and the bias is [1, experts].
  /// \throws NonFiniteError  if the bias is not finite.
  void check(Index experts) const {
    expect_k("BiasedSoftmaxTopK", config_.k, experts);
    expect_positive("BiasedSoftmaxTopK", "scale", config_.scale);
    expect_selection_bias("BiasedSoftmaxTopK", bias_, experts);
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token, or the bias, is not finite.
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& /*cache*/) const {
    route(logits, pass, nullptr, routing);
  }

  /// `forward` with an imposed choice, see Replay.
  void forward_imposed(MatrixIn<T> logits, const Pass& pass, const RoutingTrace& imposed,
                       Routing<T>& routing, Cache& /*cache*/) const {
    route(logits, pass, &imposed, routing);
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& cache) const {
    soft_.backward(routing, gradient, cache);
  }

  /// Buffer `bias`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("bias", self.bias_);
  }

  /// b, [1, experts].
  Buffer<T>& selection_bias() { return bias_; }
  const Buffer<T>& selection_bias() const { return bias_; }
  const BiasedSoftmaxTopKConfig& config() const { return config_; }

 private:
  void route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed,
             Routing<T>& routing) const;

  BiasedSoftmaxTopKConfig config_;
  SoftmaxTopK<T> soft_;  // Has the same weights, as functions of the logits.
  Buffer<T> bias_;
};

template <std::floating_point T>
void BiasedSoftmaxTopK<T>::route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed,
                                 Routing<T>& routing) const {
  check(logits.cols());
  const Index experts = logits.cols();
  route_k_best(
      {.who = "BiasedSoftmaxTopK", .k = config_.k, .imposed = imposed}, logits, pass, routing,
      [&](Index t, T* p) -> const T* {
        softmax_row<T>(row_span(routing.logits, t), span_of(p, experts));
        loops::add<T>(experts, p, bias_.value.data(), p);
        return p;
      },
      [&](Index t, const Index* chosen, T* weight, T* p) {
        softmax_row<T>(row_span(routing.logits, t), span_of(p, experts));
        for (Index i = 0; i < config_.k; ++i) {
          weight[i] = static_cast<T>(config_.scale) * p[chosen[i]];
        }
      });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::BiasedSoftmaxTopK<float>;
extern template class weir::BiasedSoftmaxTopK<double>;
#endif
