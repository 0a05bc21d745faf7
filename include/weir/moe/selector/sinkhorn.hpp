// SPDX-License-Identifier: MIT
/// \file
/// Top-k of a balanced transport plan: Megatron-Core's Sinkhorn routing, after S-BASE (Clark et al.
/// 2022, arXiv:2202.01169).
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/parallel.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/k_best.hpp>
#include <weir/ops/softmax.hpp>

namespace weir {

/// Settings of Sinkhorn.
struct SinkhornConfig {
  Index k = 1;
  double tolerance = 1e-4;
  Index iterations = 1000;  ///< The most iterations; the plan is then taken as it is.
};

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
class Sinkhorn : public SelectorBase<T> {
 public:
  /// Workspace of the plan.
  struct Cache {
    Matrix<T> kernel;     ///< [tokens, experts], K, each row scaled to a largest entry of 1.
    RowVector<T> d0;      ///< [tokens], scaled to make up for that.
    RowVector<T> d1;      ///< [experts]
    RowVector<T> column;  ///< [experts], sum_t d0_t K_te.
  };

  explicit Sinkhorn(SinkhornConfig config = {}) : config_(config) {}

  /// \throws ConfigError  unless 1 <= k <= experts, tolerance > 0 and iterations >= 1.
  void check(Index experts) const {
    expect_k("Sinkhorn", config_.k, experts);
    expect_positive("Sinkhorn", "tolerance", config_.tolerance);
    expect_at_least<Index>("Sinkhorn", "iterations", config_.iterations, 1);
  }

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

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& /*cache*/) const;

  /// The plan pi, [tokens, experts], that training chooses from; zero for padding.
  Matrix<T> plan(MatrixIn<T> logits, const Pass& pass = {}) const;

  const SinkhornConfig& config() const { return config_; }

 private:
  static constexpr double kEpsilon = 1e-8;

  void route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed, Routing<T>& routing,
             Cache& cache) const;

  /// Starts d1: 1 for the experts that some token may go to, the number of which is returned; 0 for
  /// the others, which the plan leaves out.
  static Index reach(const Routing<T>& routing, RowVector<T>& d1);

  /// Leaves the plan's factors in the cache. With each row of K, eps is scaled too, so that the
  /// plan stays the same.
  void balance(const Routing<T>& routing, Cache& cache) const;

  SinkhornConfig config_;
};

template <std::floating_point T>
void Sinkhorn<T>::backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                           Cache& /*cache*/) const {
  const Index experts = routing.experts();
  routing.rows.for_each_real(8 * experts, [&](Index t) {
    const Index* const chosen = routing.expert.data() + routing.first(t);
    const T* const weight = routing.weight.data() + routing.first(t);
    const T* const d_weight = gradient.weights.data() + routing.first(t);
    T* const dp = gradient.probabilities.row(t).data();
    T* const dz = gradient.logits.row(t).data();
    if (config_.k == 1) {
      dz[chosen[0]] += weight[0] * (T(1) - weight[0]) * d_weight[0];
    } else {
      for (Index i = 0; i < config_.k; ++i) dp[chosen[i]] += d_weight[i];
    }
    add_softmax_backward_row<T>(row_span(routing.probabilities, t), span_of(dp, experts),
                                span_of(dz, experts));
  });
}

template <std::floating_point T>
Matrix<T> Sinkhorn<T>::plan(MatrixIn<T> logits, const Pass& pass) const {
  check(logits.cols());
  Routing<T> routing;
  routing.begin("Sinkhorn", logits, pass, config_.k);
  Cache cache;
  balance(routing, cache);
  Matrix<T> pi = std::move(cache.kernel);
  for (Index t = 0; t < pi.rows(); ++t) {
    pi.row(t) = (cache.d0[t] * pi.row(t)).cwiseProduct(cache.d1);
  }
  return pi;
}

template <std::floating_point T>
void Sinkhorn<T>::route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed,
                        Routing<T>& routing, Cache& cache) const {
  check(logits.cols());
  const KBest best{.who = "Sinkhorn", .k = config_.k, .imposed = imposed};
  begin_k_best<T>(best, logits, pass, routing);
  if (pass.training) balance(routing, cache);
  choose_k_best(
      best, routing,
      [&](Index t, T* p) -> const T* {
        const T* const z = routing.logits.row(t).data();
        if (!pass.training) return z;
        // A row of log pi, up to a constant: nothing that matters is lost to underflow.
        for (Index e = 0; e < routing.experts(); ++e) p[e] = z[e] + std::log(cache.d1[e]);
        return p;
      },
      [&](Index t, const Index* chosen, T* weight, T* p) {
        const T* const z = routing.logits.row(t).data();
        softmax_row<T>(span_of(z, routing.experts()), span_of(p, routing.experts()));
        for (Index i = 0; i < config_.k; ++i) {
          weight[i] = config_.k == 1 ? T(1) / (T(1) + std::exp(-z[chosen[i]])) : p[chosen[i]];
        }
      });
}

template <std::floating_point T>
Index Sinkhorn<T>::reach(const Routing<T>& routing, RowVector<T>& d1) {
  d1.setConstant(routing.experts(), routing.restricted ? T(0) : T(1));
  for (Index t = 0; routing.restricted && t < routing.tokens(); ++t) {
    if (routing.rows.is_padding(t)) continue;
    for (Index e = 0; e < routing.experts(); ++e) {
      if (!routing.is_forbidden(t, e)) d1[e] = T(1);
    }
  }
  return std::count(d1.begin(), d1.end(), T(1));
}

template <std::floating_point T>
void Sinkhorn<T>::balance(const Routing<T>& routing, Cache& cache) const {
  const Index tokens = routing.tokens();
  const Index experts = routing.experts();
  set_zero(cache.kernel, tokens, experts);
  routing.rows.for_each_real(16 * experts, [&](Index t) {
    const T largest = routing.logits.row(t).maxCoeff();
    if (!std::isfinite(largest)) return;
    for (Index e = 0; e < experts; ++e) {
      cache.kernel(t, e) = std::exp(routing.logits(t, e) - largest);
    }
  });
  RowVector<T>& d1 = cache.d1;
  const Index reachable = reach(routing, d1);
  set_zero(cache.d0, tokens);
  const auto real = static_cast<T>(routing.rows.real());
  if (real == T(0)) return;
  for (Index i = 0; i < config_.iterations; ++i) {
    routing.rows.for_each_real(2 * experts, [&](Index t) {
      const T epsilon = static_cast<T>(kEpsilon) * std::exp(-routing.logits.row(t).maxCoeff());
      cache.d0[t] = T(1) / (real * (cache.kernel.row(t).dot(d1) + epsilon));
    });
    set_zero(cache.column, experts);
    for (Index t = 0; t < tokens; ++t) cache.column += cache.d0[t] * cache.kernel.row(t);
    T change = T(0);
    for (Index e = 0; e < experts; ++e) {
      if (d1[e] == T(0)) continue;
      const T next =
          T(1) / (static_cast<T>(reachable) * (cache.column[e] + static_cast<T>(kEpsilon)));
      change += std::abs(next - d1[e]);
      d1[e] = next;
    }
    if (change / static_cast<T>(reachable) <= static_cast<T>(config_.tolerance)) return;
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::Sinkhorn<float>;
extern template class weir::Sinkhorn<double>;
#endif
