// SPDX-License-Identifier: MIT
/// \file
/// What most balancing losses are made of: mean probabilities, each times a price.
#pragma once

#include <weir/core/token_rows.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Workspace of `priced_probability`, in the cache of a loss.
template <class T>
struct PriceSpace {
  RowVector<T> price, probability;
};

/// The mean over the groups of tokens that `scope` makes of
///
///     sum_e u_e * P_e
///
/// P_e is the mean probability of expert e over the real tokens of the group, u_e its price there.
/// Groups without real tokens do not count; the result is zero if there is no other.
///
/// \param price    `price(begin, end, tokens, u)` sets u [experts] for the tokens `begin` to `end`,
///                 of which `tokens` > 0 are real.
template <class T, class Price>
T priced_probability(const Routing<T>& routing, Scope scope, Price&& price, PriceSpace<T>& space) {
  T sum = T(0);
  Index groups = 0;
  RowVector<T>& p = space.probability;
  routing.rows.for_each_group(scope, [&](Index begin, Index end) {
    const Index tokens = routing.rows.real(begin, end);
    if (tokens == 0) return;
    ++groups;
    price(begin, end, tokens, space.price);
    p.setZero(routing.experts());
    for (Index t = begin; t < end; ++t) {
      if (!routing.rows.is_padding(t)) p += routing.probabilities.row(t);
    }
    sum += p.dot(space.price) / static_cast<T>(tokens);
  });
  return groups > 0 ? sum / static_cast<T>(groups) : T(0);
}

/// Adds `factor` times the derivative of `priced_probability` with respect to the probabilities,
/// the prices being constant.
template <class T, class Price>
void add_priced_probability_gradient(const Routing<T>& routing, Scope scope, T factor,
                                     Price&& price, PriceSpace<T>& space,
                                     RoutingGradient<T>& gradient) {
  Index groups = 0;
  routing.rows.for_each_group(
      scope, [&](Index begin, Index end) { groups += routing.rows.real(begin, end) > 0 ? 1 : 0; });
  RowVector<T>& u = space.price;
  routing.rows.for_each_group(scope, [&](Index begin, Index end) {
    const Index tokens = routing.rows.real(begin, end);
    if (tokens == 0) return;
    price(begin, end, tokens, u);
    u *= factor / static_cast<T>(groups * tokens);
    for (Index t = begin; t < end; ++t) {
      if (!routing.rows.is_padding(t)) gradient.probabilities.row(t) += u;
    }
  });
}

}  // namespace weir
