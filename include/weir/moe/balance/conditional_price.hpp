// SPDX-License-Identifier: MIT
/// \file
/// The mean price of some experts under the probabilities that a token gives them.
#pragma once

#include <weir/core/types.hpp>

namespace weir {

/// The experts S of one token that are left once others are ruled out: those of `begin` to `end`
/// for which `is_in(expert)`.
///
///     price = sum_{e in S} u_e q_e,    q_e = p_e / (sum_{j in S} p_j + epsilon)
///
/// p are the probabilities of the token, u prices of the experts; both [experts]. Where all
/// probabilities in S and epsilon are zero, so are the price and its gradient.
template <class T, class IsIn>
struct ConditionalPrice {
  const T* p;
  const T* u;
  Index begin, end;
  IsIn is_in;
  T epsilon;

  T value() const {
    const T mass = total();
    return mass > T(0) ? weighted() / mass : T(0);
  }

  /// Adds `factor` times the derivative with respect to the probabilities, the prices being
  /// constant.
  /// \param dp       [experts]
  void add_gradient(T factor, T* dp) const {
    const T mass = total();
    if (!(mass > T(0))) return;
    const T mean = weighted() / mass;
    for (Index e = begin; e < end; ++e) {
      if (is_in(e)) dp[e] += factor * (u[e] - mean) / mass;
    }
  }

 private:
  T total() const {
    T sum = epsilon;
    for (Index e = begin; e < end; ++e) {
      if (is_in(e)) sum += p[e];
    }
    return sum;
  }

  T weighted() const {
    T sum = T(0);
    for (Index e = begin; e < end; ++e) {
      if (is_in(e)) sum += u[e] * p[e];
    }
    return sum;
  }
};

}  // namespace weir
