// SPDX-License-Identifier: MIT
/// \file
/// Top-k whose choice has a derivative: CoLT5, ST-MoE of lucidrains.
#pragma once

#include <algorithm>
#include <concepts>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/coordinate_descent.hpp>
#include <weir/ops/softmax.hpp>

namespace weir {

/// What a chosen expert's output is multiplied by in RelaxedTopK.
enum class RelaxedWeight {
  kRelaxed,          ///< lambda_e, how much of the expert is among the k largest.
  kStraightThrough,  ///< p_e in the forward pass, p_e lambda_e with lambda_e at 1 in the
                     ///< derivative.
};

/// Settings of RelaxedTopK.
struct RelaxedTopKConfig {
  Index k = 2;
  RelaxedWeight weight = RelaxedWeight::kRelaxed;
  bool renormalise = true;
  double ratio = 9.0 / 8.0;  ///< The relaxation is of ratio * k experts, at most of all.
  CoordinateDescentConfig descent = {};
};

/// Chooses the k experts S of largest probability p = softmax(logits), and takes their weights, or
/// the derivatives of these, from a relaxation lambda of the choice (CoordinateDescent):
///
///     lambda = soft top-k of p with k' = min(ratio * k, experts)
///     h_e = lambda_e                           kRelaxed
///     h_e = p_e (1 + lambda_e - stop(lambda_e))     kStraightThrough
///     g_e = h_e,  or  h_e / max(sum_{j in S} h_j, 1e-9)  if renormalised
///
/// The constraint that the lambdas sum to k' makes the weights compete with those of experts that
/// were not chosen. A lambda at its bound of 1 has no derivative; where all chosen ones are, all
/// that kRelaxed has is none: smaller `descent.epsilon` makes it so. Equal probabilities: the
/// lowest index first. Forbidden experts are not among the `experts` of k'. Causal.
///
/// (kRelaxed renormalised: st-moe-pytorch with `differentiable_topk`. kStraightThrough, not
/// renormalised: the values of `topk` in colt5-attention. The relaxation: Ainslie et al. 2023,
/// arXiv:2303.09752, whose ratio this is, there of tokens; Lei et al. 2023, arXiv:2304.04947.)
template <std::floating_point T>
class RelaxedTopK {
 public:
  using Scalar = T;
  static constexpr bool kImposable = true;  ///< See Replay.

  /// \throws ConfigError  unless k >= 1, ratio >= 1 and the descent's settings are in range.
  explicit RelaxedTopK(RelaxedTopKConfig config = {}) : config_(config) {
    expect_at_least<Index>("RelaxedTopK", "k", config_.k, 1);
    expect_at_least("RelaxedTopK", "ratio", config_.ratio, 1.0);
    CoordinateDescent<T>::check("RelaxedTopK", config_.descent);
  }

  /// \throws ConfigError  unless k <= experts.
  void check(Index experts) const {
    if (config_.k > experts) {
      fail<ConfigError>("RelaxedTopK: k = ", config_.k, ", expected 1 <= k <= experts = ", experts);
    }
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void select(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing) const {
    check(logits.cols());
    const Index k = config_.k;
    routing.begin("RelaxedTopK", logits, pass, k);
    routing.assign_each(k);
    const Index experts = routing.experts();
    parallel_rows(routing.tokens(), row_cost(experts), [&](Index begin, Index end) {
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
        routing.choose(t, p, k, chosen);
        routing.clear_forbidden(t, p);
        if (config_.weight == RelaxedWeight::kRelaxed) {
          const CoordinateDescent<T> relaxed = relax(routing, t);
          for (Index i = 0; i < k; ++i) weight[i] = relaxed.lambda(chosen[i]);
        } else {
          for (Index i = 0; i < k; ++i) weight[i] = p[chosen[i]];
        }
        if (!config_.renormalise) continue;
        T sum = T(0);
        for (Index i = 0; i < k; ++i) sum += weight[i];
        for (Index i = 0; i < k; ++i) weight[i] /= std::max(sum, kLeastSum);
      }
    });
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    const Index k = config_.k;
    const Index experts = routing.experts();
    parallel_rows(routing.tokens(), 2 * row_cost(experts), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        if (routing.is_padding(t)) continue;
        const T* p = routing.probabilities.row(t).data();
        const Index* chosen = routing.expert.data() + routing.first(t);
        const T* weight = routing.weight.data() + routing.first(t);
        T* dh = gradient.weights.data() + routing.first(t);  // As yet dL/dg.
        T* dp = gradient.probabilities.row(t).data();
        const bool is_relaxed = config_.weight == RelaxedWeight::kRelaxed;
        const CoordinateDescent<T> relaxed = relax(routing, t);
        if (config_.renormalise) {
          T sum = T(0);
          T inner = T(0);
          for (Index i = 0; i < k; ++i) {
            sum += is_relaxed ? relaxed.lambda(chosen[i]) : p[chosen[i]];
            inner += dh[i] * weight[i];
          }
          if (!(sum > kLeastSum)) inner = T(0);
          for (Index i = 0; i < k; ++i) dh[i] = (dh[i] - inner) / std::max(sum, kLeastSum);
        }
        if (!is_relaxed) {
          for (Index i = 0; i < k; ++i) {
            dp[chosen[i]] += dh[i];
            dh[i] *= p[chosen[i]];
          }
        }
        relaxed.backward(chosen, dh, k, dp);
        add_softmax_backward_row(p, dp, experts, gradient.logits.row(t).data());
      }
    });
  }

  const RelaxedTopKConfig& config() const { return config_; }

 private:
  static constexpr T kLeastSum = T(1e-9);

  Index row_cost(Index experts) const { return 16 * experts * (1 + config_.descent.iterations); }

  CoordinateDescent<T> relax(const Routing<T>& routing, Index t) const {
    return {config_.descent, routing.probabilities.row(t).data(), routing.logits.row(t).data(),
            routing.experts(), config_.ratio * static_cast<double>(config_.k)};
  }

  RelaxedTopKConfig config_;
};

}  // namespace weir
