// SPDX-License-Identifier: MIT
/// \file
/// Router z-loss of ST-MoE (Zoph et al. 2022, arXiv:2202.08906, eq. 5).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/core/parallel.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/logsumexp.hpp>

namespace weir {

/// Keeps the router's logits small, so that rounding cannot change the routing:
///
///     loss = coefficient / T * sum_t (log sum_e exp(z_te))^2
///     dloss/dz_te = 2 * coefficient / T * lse_t * softmax(z_t)_e
///
/// over the T real tokens, so that parts of a batch add up to it; zero if there are none. Adding a
/// constant to all logits of a token does not change its routing, but it does change this loss. At
/// uniform load as at any other it is what the logits are: coefficient * (ln experts)^2 if zero.
template <std::floating_point T>
struct ZLoss {
  static constexpr std::string_view kName = "z";

  T coefficient = T(0.001);

  /// \throws ConfigError  if the coefficient is negative.
  void check() const { expect_at_least("ZLoss", "coefficient", coefficient, T(0)); }

  /// \return         The loss, already scaled by `coefficient`.
  T loss(const Routing<T>& routing) const {
    const Index tokens = routing.real_tokens();
    if (tokens == 0) return T(0);
    RowVector<T>& squares = routing.per_token;
    squares.resize(routing.tokens());
    for_each_real_token(routing, [&](Index t) {
      const T lse = logsumexp(&routing.logits(t, 0), routing.experts());
      squares[t] = lse * lse;
    });
    T sum = T(0);
    for (Index t = 0; t < routing.tokens(); ++t) sum += routing.is_padding(t) ? T(0) : squares[t];
    return coefficient * sum / static_cast<T>(tokens);
  }

  /// Adds d(loss)/d(logits).
  void add_gradient(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    const Index tokens = routing.real_tokens();
    for_each_real_token(routing, [&](Index t) {
      const T* const z = &routing.logits(t, 0);
      T* const dz = &gradient.logits(t, 0);
      const T lse = logsumexp(z, routing.experts());
      const T factor = T(2) * coefficient * lse / static_cast<T>(tokens);
      loops::add_exp_shifted(routing.experts(), factor, z, lse, dz);
    });
  }

 private:
  /// Calls `body(t)` on all threads.
  template <class Body>
  static void for_each_real_token(const Routing<T>& routing, Body&& body) {
    constexpr Index kCost = 8;  // Of an exponential and what goes with it.
    parallel_rows(routing.tokens(), kCost * routing.experts(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        if (!routing.is_padding(t)) body(t);
      }
    });
  }
};

}  // namespace weir
