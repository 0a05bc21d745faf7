// SPDX-License-Identifier: MIT
/// \file
/// The k best probabilities after a selection bias, with weights of those without it: ERNIE 4.5.
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

/// Settings of BiasedProbabilityTopK.
struct BiasedProbabilityTopKConfig {
  Index k = 2;
  bool renormalise = true;
  double scale = 1.0;
};

/// Chooses the k experts S of largest biased probability p_e + b_e, p = softmax(z), with weights
/// made of the probabilities as they are:
///
///     g_e = scale * p_e / sum_{j in S} p_j       renormalised
///     g_e = scale * p_e                          raw
///
/// Equal sums: the lowest index first. The bias b is a buffer: saved, not trained by gradient,
/// moved by BiasBalance. It enters the choice alone, which is constant to the derivative.
/// BiasedSoftmaxTopK adds its bias to the logits instead, SigmoidTopK to independent scores.
/// (Baidu 2025, "ERNIE 4.5 Technical Report"; `Ernie4_5_MoeSparseMoeBlock` of Hugging Face's
/// transformers, which keeps the sum from falling below 1e-12.)
template <std::floating_point T>
class BiasedProbabilityTopK : public SelectorBase<T> {
 public:
  using typename SelectorBase<T>::Cache;

  /// A bias of zeros.
  /// \throws ConfigError  unless 1 <= k <= experts and scale > 0.
  explicit BiasedProbabilityTopK(Index experts, BiasedProbabilityTopKConfig config = {})
      : config_(config),
        soft_({.k = config.k, .renormalise = config.renormalise, .scale = config.scale}) {
    expect_at_least<Index>("BiasedProbabilityTopK", "experts", experts, 1);
    bias_.value.setZero(1, experts);
    check(experts);
  }

  /// \throws ConfigError     unless 1 <= k <= experts, scale > 0 and the bias is [1, experts].
  /// \throws NonFiniteError  if the bias is not finite.
  void check(Index experts) const {
    expect_k("BiasedProbabilityTopK", config_.k, experts);
    expect_positive("BiasedProbabilityTopK", "scale", config_.scale);
    expect_selection_bias("BiasedProbabilityTopK", bias_, experts);
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
  const BiasedProbabilityTopKConfig& config() const { return config_; }

 private:
  void route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed,
             Routing<T>& routing) const;

  BiasedProbabilityTopKConfig config_;
  SoftmaxTopK<T> soft_;  // Has the same weights, as functions of the logits.
  Buffer<T> bias_;
};

template <std::floating_point T>
void BiasedProbabilityTopK<T>::route(MatrixIn<T> logits, const Pass& pass,
                                     const RoutingTrace* imposed, Routing<T>& routing) const {
  check(logits.cols());
  const Index experts = logits.cols();
  route_k_best(
      {.who = "BiasedProbabilityTopK", .k = config_.k, .imposed = imposed, .cost = 32}, logits,
      pass, routing,
      [&](Index t, T* p) -> const T* {
        softmax_row<T>(row_span(routing.logits, t), span_of(p, experts));
        loops::add<T>(experts, p, bias_.value.data(), p);
        return p;
      },
      [&](Index t, const Index* chosen, T* weight, T* p) {
        softmax_row<T>(row_span(routing.logits, t), span_of(p, experts));
        soft_.weigh(&routing.logits(t, 0), p, chosen, weight);
      });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::BiasedProbabilityTopK<float>;
extern template class weir::BiasedProbabilityTopK<double>;
#endif
