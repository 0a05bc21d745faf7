// SPDX-License-Identifier: MIT
/// \file
/// Top-k of a balanced transport plan: Megatron-Core's Sinkhorn routing, after S-BASE (Clark et al.
/// 2022, arXiv:2202.01169).
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/parallel.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/k_best.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of Sinkhorn.
struct SinkhornConfig {
  Index k = 1;
  double tolerance = 1e-4;
  Index iterations = 1000;  ///< The most iterations; the plan is then taken as it is.
  double epsilon = 0.0;     ///< Added to the sums; 1e-8 in Megatron-Core. The plan then depends on
                            ///< the size of exp(z): small ones are not levelled.
};

/// In training, chooses the k largest entries of each row of the plan pi, which spreads the tokens
/// evenly over the experts:
///
///     K = exp(z), d1 = 1, and until mean_e |change of d1_e| <= tolerance
///
///     d0_t = 1 / (T * (sum_e d1_e K_te + epsilon))
///     d1_e = 1 / (experts * (sum_t d0_t K_te + epsilon))
///
///     pi_te = d0_t K_te d1_e
///
/// In evaluation, the k largest logits. The weight of a chosen expert is the router's in both:
///
///     g_e = sigmoid(z_e)                     k = 1
///     g_e = softmax(z)_e over all experts    k > 1, not renormalised
///
/// T counts the real tokens of the batch, `experts` those that the pass allows to some token. All
/// of this is computed with logarithms of d0 and d1: no logits are too far apart for it and,
/// without an epsilon, adding a constant to all logits of a token changes nothing but rounding. A
/// token's experts are listed by pi (by z in evaluation), equal ones by index. Because the k best
/// of a level plan need not be level, loads are even only roughly. The choice is constant to the
/// derivative, which reaches the logits through g and the probabilities (softmax(z)).
///
/// Not causal in training: the plan of a token depends on all others. Causal in evaluation.
///
/// (Clark et al. 2022, arXiv:2202.01169, section 3.1; Megatron-Core, moe_utils.py, `sinkhorn`, and
/// router.py, `sinkhorn_load_balancing`. Megatron-Core iterates without a limit, overflows where
/// exp(z) does, and has an epsilon of 1e-8.)
template <std::floating_point T>
class Sinkhorn : public SelectorBase<T> {
 public:
  /// Workspace of the plan.
  struct Cache {
    Matrix<T> rows;       ///< [tokens, experts], T * pi as d0 leaves it.
    RowVector<T> log_d1;  ///< [experts], -infinity where the expert is not open.
    RowVector<T> lse;     ///< [tokens], log(sum_e d1_e K_te + epsilon).
    RowVector<T> column;  ///< [experts], the sums of the columns of `rows`.
  };

  explicit Sinkhorn(SinkhornConfig config = {}) : config_(config) {}

  /// \throws ConfigError  unless 1 <= k <= experts, tolerance > 0, iterations >= 1 and
  ///                      epsilon >= 0.
  void check(Index experts) const {
    expect_k("Sinkhorn", config_.k, experts);
    expect_positive("Sinkhorn", "tolerance", config_.tolerance);
    expect_at_least<Index>("Sinkhorn", "iterations", config_.iterations, 1);
    expect_at_least("Sinkhorn", "epsilon", config_.epsilon, 0.0);
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
  void route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed, Routing<T>& routing,
             Cache& cache) const;

  /// log(exp(x) + epsilon)
  T with_epsilon(T x) const {
    if (!(config_.epsilon > 0.0)) return x;
    const T log_epsilon = std::log(static_cast<T>(config_.epsilon));
    return std::max(x, log_epsilon) + std::log1p(std::exp(-std::abs(x - log_epsilon)));
  }

  /// Sets each real token's row of the plan, and the logarithm of what it was divided by, from
  /// log d1.
  void set_rows(const Routing<T>& routing, Cache& cache) const;

  /// log sum_t pi_te * T for expert e, also where pi is zero to rounding.
  static T log_column(const Routing<T>& routing, const Cache& cache, Index e);

  /// Leaves log d1 in the cache, and the rows from which it was found.
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
  Matrix<T> pi = Matrix<T>::Zero(routing.tokens(), routing.experts());
  const T log_tokens = std::log(static_cast<T>(std::max(routing.rows.real(), Index(1))));
  for (Index t = 0; t < pi.rows(); ++t) {
    if (routing.rows.is_padding(t)) continue;
    for (const Index e : routing.open) {
      pi(t, e) = std::exp(routing.logits(t, e) + cache.log_d1[e] - cache.lse[t] - log_tokens);
    }
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
        for (Index e = 0; e < routing.experts(); ++e) p[e] = z[e] + cache.log_d1[e];
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
void Sinkhorn<T>::set_rows(const Routing<T>& routing, Cache& cache) const {
  const Index experts = routing.experts();
  routing.rows.for_each_real(16 * experts, [&](Index t) {
    T* const row = cache.rows.row(t).data();
    loops::add<T>(experts, &routing.logits(t, 0), cache.log_d1.data(), row);
    const T top = loops::max(experts, row);
    loops::exp_shifted(experts, row, top, row);
    const T sum = loops::sum(experts, row);
    const T lse = top + std::log(sum);
    cache.lse[t] = with_epsilon(lse);
    loops::scale(experts, std::exp(lse - cache.lse[t]) / sum, row, row);
  });
}

template <std::floating_point T>
T Sinkhorn<T>::log_column(const Routing<T>& routing, const Cache& cache, Index e) {
  if (cache.column[e] > std::sqrt(std::numeric_limits<T>::min())) {
    return std::log(cache.column[e]);
  }
  const auto log_entry = [&](Index t) {
    return routing.logits(t, e) + cache.log_d1[e] - cache.lse[t];
  };
  T largest = -std::numeric_limits<T>::infinity();
  for (Index t = 0; t < routing.tokens(); ++t) {
    if (!routing.rows.is_padding(t)) largest = std::max(largest, log_entry(t));
  }
  if (!std::isfinite(largest)) return std::log(std::numeric_limits<T>::min());
  T sum = T(0);
  for (Index t = 0; t < routing.tokens(); ++t) {
    if (!routing.rows.is_padding(t)) sum += std::exp(log_entry(t) - largest);
  }
  return largest + std::log(sum);
}

template <std::floating_point T>
void Sinkhorn<T>::balance(const Routing<T>& routing, Cache& cache) const {
  const Index tokens = routing.tokens();
  const Index experts = routing.experts();
  set_zero(cache.rows, tokens, experts);
  set_zero(cache.lse, tokens);
  set_shape(cache.log_d1, experts);
  cache.log_d1.setConstant(-std::numeric_limits<T>::infinity());
  for (const Index e : routing.open) cache.log_d1[e] = T(0);
  const auto real = static_cast<T>(routing.rows.real());
  if (real == T(0)) return;
  const auto open = static_cast<T>(routing.open_experts());
  for (Index i = 0; i < config_.iterations; ++i) {
    set_rows(routing, cache);
    set_zero(cache.column, experts);
    for (Index t = 0; t < tokens; ++t) cache.column += cache.rows.row(t);
    double change = 0.0;
    for (const Index e : routing.open) {
      // sum_t d0_t K_te = sum_t pi_te / d1_e, of which T * pi are the rows.
      const T log_sum = log_column(routing, cache, e) - std::log(real) - cache.log_d1[e];
      const T step = -std::log(open) - with_epsilon(log_sum) - cache.log_d1[e];
      if (step == T(0)) continue;  // Where d1 is beyond the largest number, inf - inf is NaN.
      const auto before = static_cast<double>(cache.log_d1[e]);
      cache.log_d1[e] += step;
      change += std::exp(before) * std::abs(std::expm1(static_cast<double>(step)));
    }
    if (change / static_cast<double>(open) <= config_.tolerance) return;
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::Sinkhorn<float>;
extern template class weir::Sinkhorn<double>;
#endif
