// SPDX-License-Identifier: MIT
/// \file
/// Top-k of a balanced transport plan: Megatron-Core's Sinkhorn routing, after S-BASE (Clark et al.
/// 2022, arXiv:2202.01169).
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <utility>

#include <weir/core/parallel.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/softmax.hpp>

namespace weir {

/// In training, chooses the k largest entries of each row of the plan pi, which spreads the tokens
/// evenly over the experts:
///
///     K = exp(z), d1 = 1, and until mean_e |change of d1_e| <= tolerance
///
///     d0_t = 1 / (T * (sum_e d1_e K_te + eps))
///     d1_e = 1 / (experts * (sum_t d0_t K_te + eps)),            eps = 1e-8
///
///     pi_te = d0_t K_te d1_e
///
/// In evaluation, the k largest logits. The weight of a chosen expert is the router's in both:
///
///     g_e = sigmoid(z_e)                     k = 1
///     g_e = softmax(z)_e over all experts    k > 1, not renormalised
///
/// T counts the real tokens of the batch. A token's experts are listed by pi (by z in evaluation),
/// equal ones by index. Because the k best of a level plan need not be level, loads are even only
/// roughly. The choice is constant to the derivative, which reaches the logits through g and the
/// probabilities (softmax(z)).
///
/// Not causal in training: the plan of a token depends on all others. Causal in evaluation.
///
/// (Clark et al. 2022, arXiv:2202.01169, section 3.1; Megatron-Core, moe_utils.py, `sinkhorn`, and
/// router.py, `sinkhorn_load_balancing`. Megatron-Core iterates without a limit, and overflows
/// where exp(z) does.)
template <std::floating_point T>
struct Sinkhorn {
  using Scalar = T;
  static constexpr bool kImposable = true;  ///< See Replay.

  Index k = 1;
  double tolerance = 1e-4;
  Index iterations = 1000;  ///< At most; the plan is then taken as it is.

  /// \throws ConfigError  unless 1 <= k <= experts, tolerance > 0 and iterations >= 1.
  void check(Index experts) const {
    if (k < 1 || k > experts) {
      fail<ConfigError>("Sinkhorn: k = ", k, ", expected 1 <= k <= experts = ", experts);
    }
    expect_positive("Sinkhorn", "tolerance", tolerance);
    expect_at_least<Index>("Sinkhorn", "iterations", iterations, 1);
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void select(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing) const {
    check(logits.cols());
    routing.begin("Sinkhorn", logits, pass, k);
    routing.assign_each(k);
    if (pass.training) balance(routing);
    const Index experts = routing.experts();
    parallel_rows(routing.tokens(), 16 * experts, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        T* const p = routing.probabilities.row(t).data();
        if (routing.is_padding(t)) {
          routing.probabilities.row(t).setZero();
          continue;
        }
        const T* const z = routing.logits.row(t).data();
        Index* const chosen = routing.expert.data() + routing.first(t);
        T* const weight = routing.weight.data() + routing.first(t);
        if (pass.training) {
          // A row of log pi, but for a constant: nothing that matters is lost to underflow.
          for (Index e = 0; e < experts; ++e) p[e] = z[e] + std::log(routing.scratch[0][e]);
          routing.choose(t, p, k, chosen);
        } else {
          routing.choose(t, z, k, chosen);
        }
        softmax_row(z, experts, p);
        for (Index i = 0; i < k; ++i) {
          weight[i] = k == 1 ? T(1) / (T(1) + std::exp(-z[chosen[i]])) : p[chosen[i]];
        }
      }
    });
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    const Index experts = routing.experts();
    parallel_rows(routing.tokens(), 8 * experts, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        if (routing.is_padding(t)) continue;
        const Index* const chosen = routing.expert.data() + routing.first(t);
        const T* const weight = routing.weight.data() + routing.first(t);
        const T* const d_weight = gradient.weights.data() + routing.first(t);
        T* const dp = gradient.probabilities.row(t).data();
        T* const dz = gradient.logits.row(t).data();
        if (k == 1) {
          dz[chosen[0]] += weight[0] * (T(1) - weight[0]) * d_weight[0];
        } else {
          for (Index i = 0; i < k; ++i) dp[chosen[i]] += d_weight[i];
        }
        add_softmax_backward_row(routing.probabilities.row(t).data(), dp, experts, dz);
      }
    });
  }

  /// The plan pi, [tokens, experts], that training chooses from; zero for padding.
  Matrix<T> plan(MatrixIn<T> logits, const Pass& pass = {}) const {
    check(logits.cols());
    Routing<T> routing;
    routing.begin("Sinkhorn", logits, pass, k);
    balance(routing);
    Matrix<T> pi = std::move(routing.probabilities);
    for (Index t = 0; t < pi.rows(); ++t) {
      pi.row(t) = (routing.per_token[t] * pi.row(t)).cwiseProduct(routing.scratch[0]);
    }
    return pi;
  }

 private:
  static constexpr double kEpsilon = 1e-8;

  /// Starts d1: 1 for the experts that some token may go to, the number of which is returned; 0 for
  /// the others, which the plan leaves out.
  static Index reach(const Routing<T>& routing, RowVector<T>& d1) {
    d1.setConstant(routing.experts(), routing.restricted ? T(0) : T(1));
    for (Index t = 0; routing.restricted && t < routing.tokens(); ++t) {
      if (routing.is_padding(t)) continue;
      for (Index e = 0; e < routing.experts(); ++e) {
        if (!routing.is_forbidden(t, e)) d1[e] = T(1);
      }
    }
    return std::count(d1.begin(), d1.end(), T(1));
  }

  /// Leaves d1 in scratch[0] and, each row being scaled to a largest entry of 1, K in
  /// probabilities and d0 in per_token. eps is scaled along: the plan stays the same.
  void balance(Routing<T>& routing) const {
    const Index tokens = routing.tokens();
    const Index experts = routing.experts();
    Matrix<T>& kernel = routing.probabilities;
    parallel_rows(tokens, 16 * experts, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        const T largest = routing.logits.row(t).maxCoeff();
        if (routing.is_padding(t) || !std::isfinite(largest)) {
          kernel.row(t).setZero();
        } else {
          for (Index e = 0; e < experts; ++e) {
            kernel(t, e) = std::exp(routing.logits(t, e) - largest);
          }
        }
      }
    });
    RowVector<T>& d1 = routing.scratch[0];
    RowVector<T>& sum = routing.scratch[1];
    RowVector<T>& d0 = routing.per_token;
    const Index reachable = reach(routing, d1);
    d0.setZero(tokens);
    const auto real = static_cast<T>(routing.real_tokens());
    if (real == T(0)) return;
    for (Index i = 0; i < iterations; ++i) {
      parallel_rows(tokens, 2 * experts, [&](Index begin, Index end) {
        for (Index t = begin; t < end; ++t) {
          if (routing.is_padding(t)) continue;
          const T epsilon = static_cast<T>(kEpsilon) * std::exp(-routing.logits.row(t).maxCoeff());
          d0[t] = T(1) / (real * (kernel.row(t).dot(d1) + epsilon));
        }
      });
      sum.setZero(experts);
      for (Index t = 0; t < tokens; ++t) sum += d0[t] * kernel.row(t);
      T change = T(0);
      for (Index e = 0; e < experts; ++e) {
        if (d1[e] == T(0)) continue;
        const T next = T(1) / (static_cast<T>(reachable) * (sum[e] + static_cast<T>(kEpsilon)));
        change += std::abs(next - d1[e]);
        d1[e] = next;
      }
      if (change / static_cast<T>(reachable) <= static_cast<T>(tolerance)) return;
    }
  }
};

}  // namespace weir
