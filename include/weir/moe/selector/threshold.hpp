// SPDX-License-Identifier: MIT
/// \file
/// Top-k without those that fall far behind the best: ik_llama.cpp's smart expert reduction.
#pragma once

#include <concepts>

#include <weir/core/parallel.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/variable_choice.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/top_k.hpp>

namespace weir {

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
struct Threshold {
  using Scalar = T;

  Index k = 2;
  Index k_min = 1;
  double threshold = 0.2;
  bool renormalise = false;
  double scale = 1.0;

  /// \throws ConfigError  unless 1 <= k_min <= k <= experts, 0 <= threshold <= 1 and scale > 0.
  void check(Index experts) const {
    if (k < 1 || k > experts) {
      fail<ConfigError>("Threshold: k = ", k, ", expected 1 <= k <= experts = ", experts);
    }
    if (k_min < 1 || k_min > k) {
      fail<ConfigError>("Threshold: k_min = ", k_min, ", expected 1 <= k_min <= k = ", k);
    }
    if (!(threshold >= 0.0 && threshold <= 1.0)) {
      fail<ConfigError>("Threshold: threshold = ", threshold, ", expected 0 <= threshold <= 1");
    }
    expect_positive("Threshold", "scale", scale);
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void select(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing) const {
    check(logits.cols());
    routing.begin("Threshold", logits, pass, k);
    const Index experts = routing.experts();
    const auto choose = [&](Index t, Index* chosen) {
      T* p = routing.probabilities.row(t).data();
      softmax_row(routing.logits.row(t).data(), experts, p);
      routing.forbid(t, p);
      top_k(p, experts, k, chosen);
      routing.clear_forbidden(t, p);
      const T least = static_cast<T>(threshold) * p[chosen[0]];
      Index n = k_min;
      while (n < k && p[chosen[n]] >= least) ++n;  // They are sorted.
      return n;
    };
    assign_chosen(routing, k, 16 * experts, choose);
    for (Index t = 0; t < routing.tokens(); ++t) {
      if (routing.is_padding(t)) routing.probabilities.row(t).setZero();
      const T factor = static_cast<T>(scale) / divisor(routing, t);
      for (Index a = routing.first(t); a < routing.last(t); ++a) {
        const auto i = static_cast<std::size_t>(a);
        routing.weight[i] = factor * routing.probabilities(t, routing.expert[i]);
      }
    }
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    const Index experts = routing.experts();
    parallel_rows(routing.tokens(), 8 * experts, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        if (routing.is_padding(t)) continue;
        // With n = sum_S p: d g_i / d p_j = scale / n * (1[i = j] - p_i / n)
        const T* p = routing.probabilities.row(t).data();
        T* dp = gradient.probabilities.row(t).data();
        const T n = divisor(routing, t);
        T inner = T(0);
        for (Index a = routing.first(t); renormalise && a < routing.last(t); ++a) {
          inner += gradient.weights[a] * p[routing.expert[static_cast<std::size_t>(a)]] / n;
        }
        for (Index a = routing.first(t); a < routing.last(t); ++a) {
          dp[routing.expert[static_cast<std::size_t>(a)]] +=
              static_cast<T>(scale) / n * (gradient.weights[a] - inner);
        }
        add_softmax_backward_row(p, dp, experts, gradient.logits.row(t).data());
      }
    });
  }

 private:
  T divisor(const Routing<T>& routing, Index t) const {
    if (!renormalise || routing.is_padding(t)) return T(1);
    T sum = T(0);
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      sum += routing.probabilities(t, routing.expert[static_cast<std::size_t>(a)]);
    }
    return sum;
  }
};

}  // namespace weir
