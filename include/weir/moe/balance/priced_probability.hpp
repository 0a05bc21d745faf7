// SPDX-License-Identifier: MIT
/// \file
/// What most balancing losses are made of: mean probabilities, each times a price.
#pragma once

#include <weir/moe/routing.hpp>

namespace weir {

/// The mean over the groups of tokens that `scope` makes of
///
///     sum_e u_e * P_e
///
/// P_e is the mean probability of expert e over the real tokens of the group, u_e its price there.
/// Groups without real tokens do not count; zero if there is no other.
///
/// \param price    `price(begin, end, tokens, u)` sets u [experts] for the tokens `begin` to `end`,
///                 of which `tokens` > 0 are real. u is routing.scratch[0].
template <class T, class Price>
T priced_probability(const Routing<T>& routing, Scope scope, Price&& price) {
  T sum = T(0);
  Index groups = 0;
  RowVector<T>& u = routing.scratch[0];
  RowVector<T>& p = routing.scratch[1];
  routing.for_each_group(scope, [&](Index begin, Index end) {
    const Index tokens = routing.real_tokens(begin, end);
    if (tokens == 0) return;
    ++groups;
    price(begin, end, tokens, u);
    p.setZero(routing.experts());
    for (Index t = begin; t < end; ++t) {
      if (!routing.is_padding(t)) p += routing.probabilities.row(t);
    }
    sum += p.dot(u) / static_cast<T>(tokens);
  });
  return groups > 0 ? sum / static_cast<T>(groups) : T(0);
}

/// Adds `factor` times the derivative of `priced_probability` with respect to the probabilities,
/// the prices being constant.
template <class T, class Price>
void add_priced_probability_gradient(const Routing<T>& routing, Scope scope, T factor,
                                     Price&& price, RoutingGradient<T>& gradient) {
  Index groups = 0;
  routing.for_each_group(scope, [&](Index begin, Index end) {
    groups += routing.real_tokens(begin, end) > 0 ? 1 : 0;
  });
  RowVector<T>& u = routing.scratch[0];
  routing.for_each_group(scope, [&](Index begin, Index end) {
    const Index tokens = routing.real_tokens(begin, end);
    if (tokens == 0) return;
    price(begin, end, tokens, u);
    u *= factor / static_cast<T>(groups * tokens);
    for (Index t = begin; t < end; ++t) {
      if (!routing.is_padding(t)) gradient.probabilities.row(t) += u;
    }
  });
}

}  // namespace weir
