// SPDX-License-Identifier: MIT
/// \file
/// Routings for tests, and gradients through them.
#pragma once

#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>

namespace weir::test {

/// What `selector` makes of `logits`.
template <class Selector>
Routing<double> route(const Selector& selector, const Matrix<double>& logits,
                      const Pass& pass = {}) {
  Routing<double> routing;
  typename Selector::Cache cache;
  selector.forward(logits, pass, routing, cache);
  return routing;
}

/// What `capacity` makes of a routing.
template <class Capacity, class T>
void limit(const Capacity& capacity, Routing<T>& routing, const Pass& pass = {}) {
  typename Capacity::template Cache<T> cache;
  capacity.forward(pass, routing, cache);
}

/// The loss of a balancer.
template <class Balancer, class T>
double loss_of(const Balancer& balancer, const Routing<T>& routing) {
  typename Balancer::Cache cache;
  return static_cast<double>(balancer.forward(routing, cache));
}

/// The gradient of a balancer's loss, `scale` times.
template <class Balancer, class T>
RoutingGradient<T> gradient_of(const Balancer& balancer, const Routing<T>& routing,
                               double scale = 1.0) {
  typename Balancer::Cache cache;
  RoutingGradient<T> gradient;
  gradient.reset(routing);
  static_cast<void>(balancer.forward(routing, cache));
  balancer.backward(routing, scale, gradient, cache);
  return gradient;
}

/// The gradient of a balancer's loss with respect to the logits, through `selector`, which has made
/// the routing of its `logits`.
template <class Selector, class Balancer>
Matrix<double> logit_gradient(const Selector& selector, const Balancer& balancer,
                              const Matrix<double>& logits, const Pass& pass = {}) {
  Routing<double> routing;
  typename Selector::Cache cache;
  selector.forward(logits, pass, routing, cache);
  RoutingGradient<double> gradient = gradient_of(balancer, routing);
  selector.backward(routing, gradient, cache);
  return gradient.logits;
}

}  // namespace weir::test
