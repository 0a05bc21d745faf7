// SPDX-License-Identifier: MIT
/// \file
/// Top-k without those that fall far behind the best: ik_llama.cpp's smart expert reduction.
#pragma once

#include <concepts>
#include <limits>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/k_best.hpp>
#include <weir/moe/selector/variable_choice.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/top_k.hpp>

namespace weir {

/// Settings of Threshold.
struct ThresholdConfig {
  Index k = 2;      ///< The most experts of a token.
  Index k_min = 1;  ///< The fewest.
  double threshold = 0.2;
  bool renormalise = false;  ///< Off by default, as in SoftmaxTopK.
  double scale = 1.0;
};

/// Of the k experts of largest probability p = softmax(logits), keeps the first k_min, and of the
/// others those within reach of the best:
///
///     S = {number j from the top, 0 <= j < k : j < k_min or p_j >= threshold * p_0}
///     g_e = scale * p_e                                raw
///     g_e = scale * p_e / sum_{j in S} p_j             renormalised
///
/// Equal probabilities: the lowest index first. threshold = 0 is SoftmaxTopK. The choice is
/// constant to the derivative. (ik_llama.cpp, option `-ser k_min,threshold`, pull request 239;
/// meant for inference with a model trained with plain top-k.)
template <std::floating_point T>
class Threshold : public SelectorBase<T> {
 public:
  using Cache = VariableChoice;

  explicit Threshold(ThresholdConfig config = {}) : config_(config) {}

  /// \throws ConfigError  unless 1 <= k_min <= k <= experts, 0 <= threshold <= 1 and scale > 0.
  void check(Index experts) const;

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& cache) const;

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& /*cache*/) const;

  const ThresholdConfig& config() const { return config_; }

 private:
  T divisor(const Routing<T>& routing, Index t) const {
    if (!config_.renormalise) return T(1);
    T sum = T(0);
    for (const Index e : routing.experts_of(t)) sum += routing.probabilities(t, e);
    return sum;
  }

  ThresholdConfig config_;
};

template <std::floating_point T>
void Threshold<T>::check(Index experts) const {
  expect_k("Threshold", config_.k, experts);
  if (config_.k_min < 1 || config_.k_min > config_.k) {
    throw_error<ConfigError>("Threshold: k_min = ", config_.k_min,
                             ", expected 1 <= k_min <= k = ", config_.k);
  }
  expect_in("Threshold", "threshold", config_.threshold, 0.0, 1.0);
  expect_positive("Threshold", "scale", config_.scale);
}

template <std::floating_point T>
void Threshold<T>::forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing,
                           Cache& cache) const {
  check(logits.cols());
  routing.begin("Threshold", logits, pass, config_.k);
  const Index experts = routing.experts();
  const auto choose = [&](Index t, Index* chosen) {
    T* p = routing.probabilities.row(t).data();
    softmax_row<T>(row_span(routing.logits, t), span_of(p, experts));
    set_forbidden(routing, t, -std::numeric_limits<T>::infinity(), p);
    top_k<T>(span_of(p, experts), span_of(chosen, config_.k));
    set_forbidden(routing, t, T(0), p);
    const T least = static_cast<T>(config_.threshold) * p[chosen[0]];
    Index n = config_.k_min;
    while (n < config_.k && p[chosen[n]] >= least) ++n;  // They are sorted.
    return n;
  };
  assign_chosen(routing, config_.k, 16 * experts, cache, choose);
  routing.rows.for_each_real(2 * config_.k, [&](Index t) {
    const T factor = static_cast<T>(config_.scale) / divisor(routing, t);
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      routing.weight[a] = factor * routing.probabilities(t, routing.expert[a]);
    }
  });
}

template <std::floating_point T>
void Threshold<T>::backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                            Cache& /*cache*/) const {
  const Index experts = routing.experts();
  routing.rows.for_each_real(8 * experts, [&](Index t) {
    // With n = sum_S p: d g_i / d p_j = scale / n * (1[i = j] - p_i / n)
    const T* p = routing.probabilities.row(t).data();
    T* dp = gradient.probabilities.row(t).data();
    const T n = divisor(routing, t);
    T inner = T(0);
    for (Index a = routing.first(t); config_.renormalise && a < routing.last(t); ++a) {
      inner += gradient.weights[a] * p[routing.expert[a]] / n;
    }
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      dp[routing.expert[a]] += static_cast<T>(config_.scale) / n * (gradient.weights[a] - inner);
    }
    add_softmax_backward_row<T>(span_of(p, experts), span_of(dp, experts),
                                row_span(gradient.logits, t));
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::Threshold<float>;
extern template class weir::Threshold<double>;
#endif
