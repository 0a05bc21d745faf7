// SPDX-License-Identifier: MIT
/// \file
/// What Hugging Face's code for DBRX makes of a balancing loss.
#pragma once

#include <weir/moe/routing.hpp>
#include <weir/ops/softmax.hpp>

namespace weir::golden {

/// It takes the softmax of probabilities for the probabilities. f_e is as it should be, the softmax
/// keeping the order.
template <class Balance>
struct DoubleSoftmaxLoss {
  Balance balance;

  double loss(const Routing<double>& routing) const {
    return balance.loss(with_double_softmax(routing));
  }

  void add_gradient(const Routing<double>& routing, RoutingGradient<double>& gradient) const {
    const Routing<double> doubled = with_double_softmax(routing);
    RoutingGradient<double> inner;
    inner.reset(doubled);
    balance.add_gradient(doubled, inner);
    add_softmax_backward<double>(doubled.probabilities, inner.probabilities,
                                 gradient.probabilities);
  }

 private:
  static Routing<double> with_double_softmax(Routing<double> routing) {
    softmax<double>(routing.probabilities, routing.probabilities);
    return routing;
  }
};

}  // namespace weir::golden
