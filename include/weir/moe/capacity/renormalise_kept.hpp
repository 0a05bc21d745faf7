// SPDX-License-Identifier: MIT
/// \file
/// The weights of a token made to sum to one again after its assignments have been dropped:
/// DeepSpeed, NLLB.
#pragma once

#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/moe/capacity/capacity_wrapper.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of RenormaliseKept.
struct RenormaliseKeptConfig {
  double scale = 1.0;    ///< What the weights sum to.
  double epsilon = 0.0;  ///< The least N. DeepSpeed and Hugging Face take that of the scalar type,
                         ///< 1.19e-7 in float: smaller weights then stay small.
};

/// Any capacity policy, after which the outputs of what each token kept are multiplied by
///
///     g'_e = scale * g_e / N,    N = max(sum_{j kept} g_j, epsilon)
///
/// g being the weights before, which are left alone where N is zero. Without this policy, outputs
/// are multiplied by the weights that the selector made of all choices: what a dropped expert would
/// have had is lost (Mesh TensorFlow, Switch, ST-MoE, Tutel). With it, a token that kept anything
/// is served with full weight, and one that kept a single expert gets it with a constant weight,
/// through which no gradient reaches the router. Whether the selector has normalised before makes
/// no difference to the values, except where epsilon counts. The weights of dropped assignments
/// stay as they are.
///
/// (DeepSpeed's top-2 gating; NLLB Team 2022, arXiv:2207.04672, as in Hugging Face's NLLB-MoE with
/// normalize_router_prob_before_dropping off.) As causal as the inner policy.
///
/// The experts see g'; the selector and the balancers see the weights that the selector made.
template <class Inner>
class RenormaliseKept : public CapacityWrapper<Inner> {
 public:
  template <class T>
  struct Cache : CapacityWrapper<Inner>::template Cache<T> {
    List<T> before;  ///< g, if the inner policy has changed the selector's weights; else empty.
  };

  /// \throws ConfigError  unless scale > 0 and epsilon >= 0.
  explicit RenormaliseKept(Inner inner, RenormaliseKeptConfig config = {})
      : CapacityWrapper<Inner>(std::move(inner)), config_(config) {
    expect_positive("RenormaliseKept", "scale", config_.scale);
    expect_at_least("RenormaliseKept", "epsilon", config_.epsilon, 0.0);
  }

  /// \throws ConfigError  as the inner policy.
  template <class T>
  void forward(const Pass& pass, Routing<T>& routing, Cache<T>& cache) const {
    inner_.forward(pass, routing, cache.inner);
    cache.before.assign(routing.applied.begin(), routing.applied.end());
    const List<T>& g = before(routing, cache);
    routing.applied.assign(g.begin(), g.end());
    parallel_rows(routing.tokens(), kCost, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        const T n = divisor_of(routing, g, t).first;
        for (Index a = routing.first(t); a < routing.last(t); ++a) {
          if (routing.kept[a] != 0) routing.applied[a] = static_cast<T>(config_.scale) * (g[a] / n);
        }
      }
    });
  }

  /// Makes gradient.weights, that of g', the one of the selector's weights.
  ///
  ///     dL/dg_e = (scale * dL/dg'_e - sum_{j kept} dL/dg'_j g'_j) / N      for kept e
  ///     dL/dg_e = dL/dg'_e                                                 for dropped e
  ///
  /// Where N is epsilon it is constant, and the sum falls away; where N is zero dL/dg_e = dL/dg'_e.
  template <class T>
  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache<T>& cache) const {
    const List<T>& g = before(routing, cache);
    parallel_rows(routing.tokens(), kCost, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        const auto [n, is_from_sum] = divisor_of(routing, g, t);
        T mean = T(0);  // sum_j dL/dg'_j g_j / N
        for (Index a = routing.first(t); is_from_sum && a < routing.last(t); ++a) {
          if (routing.kept[a] != 0) mean += gradient.weights[a] * (g[a] / n);
        }
        for (Index a = routing.first(t); a < routing.last(t); ++a) {
          T& d = gradient.weights[a];
          if (routing.kept[a] != 0) d = static_cast<T>(config_.scale) * (d - mean) / n;
        }
      }
    });
    inner_.backward(routing, gradient, cache.inner);
  }

  const RenormaliseKeptConfig& config() const { return config_; }

 private:
  using CapacityWrapper<Inner>::inner_;

  static constexpr Index kCost = 32;  // Elementary operations per token, roughly.

  /// The weights that are to be renormalised.
  template <class T>
  static const List<T>& before(const Routing<T>& routing, const Cache<T>& cache) {
    return cache.before.empty() ? routing.weight : cache.before;
  }

  /// N of token t, and whether it is the sum, which it is not below epsilon. Instead of a zero, it
  /// is the scale, by which the weights are then multiplied again.
  template <class T>
  std::pair<T, bool> divisor_of(const Routing<T>& routing, const List<T>& g, Index t) const {
    T sum = T(0);
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      if (routing.kept[a] != 0) sum += g[a];
    }
    const auto epsilon = static_cast<T>(config_.epsilon);
    if (sum > epsilon) return {sum, true};
    return {epsilon > T(0) ? epsilon : static_cast<T>(config_.scale), false};
  }

  RenormaliseKeptConfig config_;
};

}  // namespace weir
