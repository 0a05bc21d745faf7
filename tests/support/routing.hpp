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
  selector.select(logits, pass, routing);
  return routing;
}

/// The gradient of a balancer's loss with respect to the logits, through `selector`.
template <class Selector, class Balancer>
Matrix<double> logit_gradient(const Selector& selector, const Balancer& balancer,
                              const Routing<double>& routing) {
  RoutingGradient<double> gradient;
  gradient.reset(routing);
  balancer.add_gradient(routing, gradient);
  selector.backward(routing, gradient);
  return gradient.logits;
}

}  // namespace weir::test
