// SPDX-License-Identifier: MIT
/// \file
/// What most balancing losses are made of: mean probabilities, each times a price.
#pragma once

#include <type_traits>

#include <weir/core/function_ref.hpp>
#include <weir/core/token_rows.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// The prices of the experts, u [experts], in the group of the tokens `begin` to `end`, of which
/// `tokens` > 0 are real.
template <class T>
using PriceOf = FunctionRef<void(Index begin, Index end, Index tokens, RowVector<T>& u)>;

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
template <class T>
T priced_probability(const Routing<T>& routing, Scope scope, std::type_identity_t<PriceOf<T>> price,
                     PriceSpace<T>& space) {
  T sum = T(0);
  Index groups = 0;
  RowVector<T>& p = space.probability;
  routing.rows.for_each_group(scope, [&](Index begin, Index end) {
    const Index tokens = routing.rows.real(begin, end);
    if (tokens == 0) return;
    ++groups;
    price(begin, end, tokens, space.price);
    set_zero(p, routing.experts());
    for (Index t = begin; t < end; ++t) {
      if (!routing.rows.is_padding(t)) p += routing.probabilities.row(t);
    }
    sum += p.dot(space.price) / static_cast<T>(tokens);
  });
  return groups > 0 ? sum / static_cast<T>(groups) : T(0);
}

/// Adds `factor` times the derivative of `priced_probability` with respect to the probabilities,
/// the prices being constant.
template <class T>
void add_priced_probability_gradient(const Routing<T>& routing, Scope scope, T factor,
                                     std::type_identity_t<PriceOf<T>> price, PriceSpace<T>& space,
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

#ifdef WEIR_COMPILED
extern template float weir::priced_probability<float>(const weir::Routing<float>&, weir::Scope,
                                                      weir::PriceOf<float>,
                                                      weir::PriceSpace<float>&);
extern template double weir::priced_probability<double>(const weir::Routing<double>&, weir::Scope,
                                                        weir::PriceOf<double>,
                                                        weir::PriceSpace<double>&);
extern template void weir::add_priced_probability_gradient<float>(const weir::Routing<float>&,
                                                                  weir::Scope, float,
                                                                  weir::PriceOf<float>,
                                                                  weir::PriceSpace<float>&,
                                                                  weir::RoutingGradient<float>&);
extern template void weir::add_priced_probability_gradient<double>(const weir::Routing<double>&,
                                                                   weir::Scope, double,
                                                                   weir::PriceOf<double>,
                                                                   weir::PriceSpace<double>&,
                                                                   weir::RoutingGradient<double>&);
#endif
