// SPDX-License-Identifier: MIT
/// \file
/// Router z-loss of ST-MoE (Zoph et al. 2022, arXiv:2202.08906, eq. 5).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/logsumexp.hpp>

namespace weir {

/// Settings of ZLoss.
struct ZLossConfig {
  double coefficient = 0.001;
};

/// Keeps the router's logits small, so that rounding cannot change the routing:
///
///     loss = coefficient / T * sum_t (log sum_e exp(z_te))^2
///     dloss/dz_te = 2 * coefficient / T * lse_t * softmax(z_t)_e
///
/// over the T real tokens, so that parts of a batch add up to it; zero if there are none. Adding a
/// constant to all logits of a token does not change its routing, but it does change this loss. The
/// load does not matter to it: logits of zero give coefficient * (ln experts)^2.
template <std::floating_point T>
class ZLoss : public BalancerBase {
 public:
  static constexpr std::string_view kName = "z";
  struct Cache {
    RowVector<T> lse;  ///< [tokens], zero for padding.
  };

  explicit ZLoss(ZLossConfig config = {}) : config_(config) { check(); }

  /// \throws ConfigError  if the coefficient is negative.
  void check() const { expect_at_least("ZLoss", "coefficient", config_.coefficient, 0.0); }

  /// \return         The loss, already scaled by `coefficient`.
  double forward(const Routing<T>& routing, Cache& cache) const;

  /// Adds `scale` times d(loss)/d(logits).
  void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                Cache& cache) const;

  const ZLossConfig& config() const { return config_; }

 private:
  static constexpr Index kCostOfExp = 8;

  ZLossConfig config_;
};

template <std::floating_point T>
double ZLoss<T>::forward(const Routing<T>& routing, Cache& cache) const {
  const Index tokens = routing.rows.real();
  if (tokens == 0) return 0.0;
  set_zero(cache.lse, routing.tokens());
  routing.rows.for_each_real(kCostOfExp * routing.experts(), [&](Index t) {
    cache.lse[t] = logsumexp<T>(row_span(routing.logits, t));
  });
  T sum = T(0);
  for (const T lse : cache.lse) sum += lse * lse;
  return config_.coefficient * static_cast<double>(sum / static_cast<T>(tokens));
}

template <std::floating_point T>
void ZLoss<T>::backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                        Cache& cache) const {
  const double twice = 2.0 * scale * config_.coefficient;
  const auto factor = static_cast<T>(twice / static_cast<double>(routing.rows.real()));
  routing.rows.for_each_real(kCostOfExp * routing.experts(), [&](Index t) {
    const T lse = cache.lse[t];
    loops::add_exp_shifted(routing.experts(), factor * lse, &routing.logits(t, 0), lse,
                           &gradient.logits(t, 0));
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::ZLoss<float>;
extern template class weir::ZLoss<double>;
#endif
