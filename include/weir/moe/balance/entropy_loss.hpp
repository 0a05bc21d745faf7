// SPDX-License-Identifier: MIT
/// \file
/// Entropy of the router, the dynamic loss of Huang et al. 2024 (arXiv:2403.07652, eq. 7).
#pragma once

#include <cmath>
#include <concepts>
#include <string_view>

#include <weir/core/parallel.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Rewards a router for being certain, so that TopP does not come to choose every expert:
///
///     loss = coefficient * mean_t ( -sum_e p_te log p_te )
///
/// p are the probabilities, 0 log 0 = 0. The mean is over real tokens; without any the loss is
/// zero. A probability of exactly zero gets no gradient, which is the limit of that of its logit.
template <std::floating_point T>
struct EntropyLoss {
  static constexpr std::string_view kName = "entropy";

  T coefficient = T(1e-4);

  /// \throws ConfigError  if the coefficient is negative.
  void check() const { expect_at_least("EntropyLoss", "coefficient", coefficient, T(0)); }

  /// \return         The loss, already scaled by `coefficient`.
  T loss(const Routing<T>& routing) const {
    const Index real = routing.real_tokens();
    if (real == 0) return T(0);
    routing.per_token.setZero(routing.tokens());
    parallel_rows(routing.tokens(), 16 * routing.experts(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        T sum = T(0);
        for (Index e = 0; e < routing.experts(); ++e) {
          const T p = routing.probabilities(t, e);
          if (p > T(0)) sum -= p * std::log(p);
        }
        routing.per_token[t] = sum;  // Zero for padding, as its probabilities are.
      }
    });
    return coefficient * routing.per_token.sum() / static_cast<T>(real);
  }

  /// Adds d(loss)/d(probabilities).
  void add_gradient(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    const Index real = routing.real_tokens();
    if (real == 0) return;
    const T scale = coefficient / static_cast<T>(real);
    parallel_rows(routing.tokens(), 16 * routing.experts(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        for (Index e = 0; e < routing.experts(); ++e) {
          const T p = routing.probabilities(t, e);
          if (p > T(0)) gradient.probabilities(t, e) -= scale * (std::log(p) + T(1));
        }
      }
    });
  }
};

}  // namespace weir
