// SPDX-License-Identifier: MIT
/// \file
/// The weights of a token made to sum to one again after its assignments have been dropped:
/// DeepSpeed, NLLB.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/moe/capacity/capacity_wrapper.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

namespace detail {

/// N of token t, and whether it is the sum: not where that is below epsilon.
template <class T>
std::pair<T, bool> kept_divisor(const Routing<T>& routing, Index t) {
  T sum = T(0);
  for (Index a = routing.first(t); a < routing.last(t); ++a) {
    const auto i = static_cast<std::size_t>(a);
    if (routing.kept[i] != 0) sum += routing.selector_weight[i];
  }
  constexpr T kEpsilon = std::numeric_limits<T>::epsilon();
  return sum > kEpsilon ? std::pair(sum, true) : std::pair(kEpsilon, false);
}

inline constexpr Index kCostOfRenormalising = 32;

}  // namespace detail

/// Any capacity policy, after which the weights of what each token kept are
///
///     g'_e = scale * g_e / N,    N = max(sum_{j kept} g_j, epsilon)
///
/// epsilon is that of the scalar type. Without this policy, the weights stay those that the
/// selector made of all choices: what a dropped expert would have had is lost (Mesh TensorFlow,
/// Switch, ST-MoE, Tutel). With it, a token that kept anything is served with full weight, and one
/// that kept a single expert gets it with a constant weight, through which no gradient reaches the
/// router. Whether the selector has normalised before makes no difference to the values, but where
/// epsilon counts. The weights of dropped assignments stay as they are.
///
/// (DeepSpeed's top-2 gating; NLLB Team 2022, arXiv:2207.04672, as in Hugging Face's NLLB-MoE with
/// normalize_router_prob_before_dropping off.) As causal as the inner policy.
///
/// What comes after it (the experts, the balancers) sees g'; `select_backward` carries the gradient
/// back to g.
template <class Inner>
class RenormaliseKept : public CapacityWrapper<Inner> {
 public:
  /// \throws ConfigError  unless scale > 0.
  explicit RenormaliseKept(Inner inner, double scale = 1.0)
      : CapacityWrapper<Inner>(std::move(inner)), scale_(scale) {
    expect_positive("RenormaliseKept", "scale", scale);
  }

  /// \throws ConfigError  as the inner policy.
  template <class T>
  void apply(Routing<T>& routing) const {
    inner_.apply(routing);
    routing.selector_weight.assign(routing.weight.begin(), routing.weight.end());
    routing.renormalised_to = static_cast<T>(scale_);
    parallel_rows(routing.tokens(), detail::kCostOfRenormalising, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        const T factor = routing.renormalised_to / detail::kept_divisor(routing, t).first;
        for (Index a = routing.first(t); a < routing.last(t); ++a) {
          const auto i = static_cast<std::size_t>(a);
          if (routing.kept[i] != 0) routing.weight[i] *= factor;
        }
      }
    });
  }

  double scale() const { return scale_; }

 private:
  using CapacityWrapper<Inner>::inner_;
  double scale_;
};

/// Carries the gradient of the weights and probabilities of `routing` over to its logits: through
/// the renormalisation of what was kept, if there was one, and the selector's `backward`.
///
///     dL/dg_e = (scale * dL/dg'_e - sum_{j kept} dL/dg'_j g'_j) / N      for kept e
///     dL/dg_e = dL/dg'_e                                                 for dropped e
///
/// Where N is epsilon it is constant, and the sum falls away. `routing` is left as it was.
template <class Selector, class T>
void select_backward(const Selector& selector, Routing<T>& routing, RoutingGradient<T>& gradient) {
  if (routing.renormalised_to == T(0)) return selector.backward(routing, gradient);
  parallel_rows(routing.tokens(), detail::kCostOfRenormalising, [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      const auto [divisor, is_sum] = detail::kept_divisor(routing, t);
      T inner = T(0);
      for (Index a = routing.first(t); is_sum && a < routing.last(t); ++a) {
        const auto i = static_cast<std::size_t>(a);
        if (routing.kept[i] != 0) inner += gradient.weights[a] * routing.weight[i];
      }
      for (Index a = routing.first(t); a < routing.last(t); ++a) {
        if (routing.kept[static_cast<std::size_t>(a)] == 0) continue;
        T& d_weight = gradient.weights[a];
        d_weight = (routing.renormalised_to * d_weight - inner) / divisor;
      }
    }
  });
  // The selector's backward may want its own weights back.
  std::swap(routing.weight, routing.selector_weight);
  selector.backward(routing, gradient);
  std::swap(routing.weight, routing.selector_weight);
}

}  // namespace weir
