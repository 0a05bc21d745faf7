// SPDX-License-Identifier: MIT
/// \file
/// Top-k whose choice has a derivative: CoLT5, ST-MoE of lucidrains.
#pragma once

#include <algorithm>
#include <concepts>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/k_best.hpp>
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
  bool renormalise = true;   ///< On by default, as in st-moe-pytorch: the lambdas of the chosen
                             ///< experts do not sum to a given number.
  double least_sum = 1e-9;   ///< The least that renormalised weights are divided by, as in
                             ///< st-moe-pytorch; the lambdas of chosen experts are far above it.
  double ratio = 9.0 / 8.0;  ///< The relaxation is of ratio * k experts, at most of all.
  CoordinateDescentConfig descent = {};
};

/// Chooses the k experts S of largest probability p = softmax(logits), and takes their weights, or
/// the derivatives of these, from a relaxation lambda of the choice (`coordinate_descent`):
///
///     lambda = soft top-k of p with k' = min(ratio * k, experts)
///     h_e = lambda_e                           kRelaxed
///     h_e = p_e (1 + lambda_e - stop(lambda_e))     kStraightThrough
///     g_e = h_e,  or  h_e / max(sum_{j in S} h_j, least_sum)  if renormalised
///
/// The constraint that the lambdas sum to k' makes the weights compete with those of experts that
/// were not chosen. A lambda at its bound of 1 has no derivative; if all chosen ones are there,
/// kRelaxed teaches the router nothing, and a smaller `descent.epsilon` makes that more likely.
/// Equal probabilities: the lowest index first. Forbidden experts are not among the `experts` of
/// k'. Causal.
///
/// (kRelaxed renormalised: st-moe-pytorch with `differentiable_topk`. kStraightThrough, not
/// renormalised: the values of `topk` in colt5-attention. The relaxation: Ainslie et al. 2023,
/// arXiv:2303.09752, whose ratio this is, there of tokens; Lei et al. 2023, arXiv:2304.04947.)
template <std::floating_point T>
class RelaxedTopK : public SelectorBase<T> {
 public:
  struct Cache {
    Matrix<T> multiplier;  ///< [tokens, iterations], the results of `coordinate_descent`, unless
                           ///< nothing needs them.
  };

  /// \throws ConfigError  unless k >= 1, ratio >= 1, least_sum > 0 and the settings of the descent
  ///                      are in range.
  explicit RelaxedTopK(RelaxedTopKConfig config = {}) : config_(config) {
    expect_at_least<Index>("RelaxedTopK", "k", config_.k, 1);
    expect_at_least("RelaxedTopK", "ratio", config_.ratio, 1.0);
    expect_positive("RelaxedTopK", "least_sum", config_.least_sum);
    config_.descent.check("RelaxedTopK");
  }

  /// \throws ConfigError  unless k <= experts.
  void check(Index experts) const { expect_k("RelaxedTopK", config_.k, experts); }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& cache) const {
    route(logits, pass, nullptr, routing, cache);
  }

  /// `forward` with an imposed choice, see Replay.
  void forward_imposed(MatrixIn<T> logits, const Pass& pass, const RoutingTrace& imposed,
                       Routing<T>& routing, Cache& cache) const {
    route(logits, pass, &imposed, routing, cache);
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& cache) const;

  const RelaxedTopKConfig& config() const { return config_; }

 private:
  T least_sum() const { return static_cast<T>(config_.least_sum); }

  /// What a token takes for each expert.
  Index cost() const { return 16 * (1 + config_.descent.iterations); }

  /// h of an expert with the probability p.
  T raw_weight(T p, const T* a) const {
    return config_.weight == RelaxedWeight::kRelaxed
               ? coordinate_descent_lambda(config_.descent, p, a)
               : p;
  }

  void route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed, Routing<T>& routing,
             Cache& cache) const;

  RelaxedTopKConfig config_;
};

template <std::floating_point T>
void RelaxedTopK<T>::backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                              Cache& cache) const {
  const Index k = config_.k;
  const Index experts = routing.experts();
  routing.rows.for_each_real(experts * cost(), [&](Index t) {
    const T* p = routing.probabilities.row(t).data();
    const T* a = cache.multiplier.row(t).data();
    const Index* chosen = routing.expert.data() + routing.first(t);
    const T* weight = routing.weight.data() + routing.first(t);
    T* dh = gradient.weights.data() + routing.first(t);  // First dL/dg.
    T* dp = gradient.probabilities.row(t).data();
    if (config_.renormalise) {
      T sum = T(0);
      T inner = T(0);
      for (Index i = 0; i < k; ++i) {
        sum += raw_weight(p[chosen[i]], a);
        inner += dh[i] * weight[i];
      }
      if (!(sum > least_sum())) inner = T(0);
      for (Index i = 0; i < k; ++i) dh[i] = (dh[i] - inner) / std::max(sum, least_sum());
    }
    if (config_.weight == RelaxedWeight::kStraightThrough) {
      for (Index i = 0; i < k; ++i) {
        dp[chosen[i]] += dh[i];
        dh[i] *= p[chosen[i]];
      }
    }
    add_coordinate_descent_backward(config_.descent, p, routing.logits.row(t).data(), experts, a,
                                    chosen, dh, k, dp);
    add_softmax_backward_row<T>(span_of(p, experts), span_of(dp, experts),
                                row_span(gradient.logits, t));
  });
}

template <std::floating_point T>
void RelaxedTopK<T>::route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed,
                           Routing<T>& routing, Cache& cache) const {
  check(logits.cols());
  const Index k = config_.k;
  const Index experts = logits.cols();
  const bool relaxes = config_.weight == RelaxedWeight::kRelaxed || pass.training;
  set_shape(cache.multiplier, relaxes ? logits.rows() : 0, config_.descent.iterations);
  const KBest best{.who = "RelaxedTopK", .k = k, .imposed = imposed, .cost = cost()};
  route_k_best(
      best, logits, pass, routing,
      [&](Index t, T* p) -> const T* {
        softmax_row<T>(row_span(routing.logits, t), span_of(p, experts));
        return p;
      },
      [&](Index t, const Index* chosen, T* weight, const T* p) {
        T* const a = relaxes ? cache.multiplier.row(t).data() : nullptr;
        if (relaxes) {
          coordinate_descent(config_.descent, p, routing.logits.row(t).data(), experts,
                             config_.ratio * static_cast<double>(k), a);
        }
        for (Index i = 0; i < k; ++i) weight[i] = raw_weight(p[chosen[i]], a);
        if (!config_.renormalise) return;
        T sum = T(0);
        for (Index i = 0; i < k; ++i) sum += weight[i];
        for (Index i = 0; i < k; ++i) weight[i] /= std::max(sum, least_sum());
      });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::RelaxedTopK<float>;
extern template class weir::RelaxedTopK<double>;
#endif
