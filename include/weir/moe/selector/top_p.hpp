// SPDX-License-Identifier: MIT
/// \file
/// As many experts as it takes to reach a probability: dynamic routing (Huang et al. 2024).
#pragma once

#include <concepts>

#include <weir/core/parallel.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/variable_choice.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/top_k.hpp>

namespace weir {

/// Chooses the fewest experts S whose probabilities, p = softmax(logits) from the largest on, add
/// up to the threshold, with the weights
///
///     g_e = p_e,   S = the first n experts, n = min{n : p_1 + ... + p_n >= threshold}
///
/// A token has at least one expert, and more of them the less certain its router is. Equal
/// probabilities: the lowest index first. An expert whose probability is exactly zero is never
/// chosen; with threshold = 1 all others are, up to rounding. The choice is constant to the
/// derivative. EntropyLoss keeps the number of experts from growing in training.
/// (Huang et al. 2024, arXiv:2403.07652, eq. 3-5.)
template <std::floating_point T>
struct TopP {
  using Scalar = T;

  double threshold = 0.4;

  /// \throws ConfigError  unless 0 < threshold <= 1 and experts >= 1.
  void check(Index experts) const {
    expect_at_least<Index>("TopP", "experts", experts, 1);
    if (!(threshold > 0.0 && threshold <= 1.0)) {
      fail<ConfigError>("TopP: threshold = ", threshold, ", expected 0 < threshold <= 1");
    }
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void select(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing) const {
    check(logits.cols());
    routing.begin("TopP", logits, pass);
    const Index experts = routing.experts();
    const auto choose = [&](Index t, Index* chosen) {
      T* p = routing.probabilities.row(t).data();
      softmax_row(routing.logits.row(t).data(), experts, p);
      top_k(p, experts, experts, chosen);
      T sum = p[chosen[0]];
      Index n = 1;
      for (; n < experts && sum < static_cast<T>(threshold) && p[chosen[n]] > T(0); ++n) {
        sum += p[chosen[n]];
      }
      return n;
    };
    assign_chosen(routing, experts, 32 * experts, choose);
    for (Index t = 0; t < routing.tokens(); ++t) {
      if (routing.is_padding(t)) routing.probabilities.row(t).setZero();
      for (Index a = routing.first(t); a < routing.last(t); ++a) {
        const auto i = static_cast<std::size_t>(a);
        routing.weight[i] = routing.probabilities(t, routing.expert[i]);
      }
    }
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    const Index experts = routing.experts();
    parallel_rows(routing.tokens(), 8 * experts, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        if (routing.is_padding(t)) continue;
        T* dp = gradient.probabilities.row(t).data();
        for (Index a = routing.first(t); a < routing.last(t); ++a) {
          dp[routing.expert[static_cast<std::size_t>(a)]] += gradient.weights[a];
        }
        add_softmax_backward_row(routing.probabilities.row(t).data(), dp, experts,
                                 gradient.logits.row(t).data());
      }
    });
  }
};

}  // namespace weir
