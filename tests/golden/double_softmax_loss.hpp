// SPDX-License-Identifier: MIT
/// \file
/// What Hugging Face's code for DBRX makes of a balancing loss.
#pragma once

#include <utility>

#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/softmax.hpp>

namespace weir::golden {

/// It takes the softmax of probabilities for the probabilities. f_e is as it should be, because the
/// softmax keeps the order.
template <class Balance>
class DoubleSoftmaxLoss : public BalancerBase {
 public:
  struct Cache {
    typename Balance::Cache inner;
    Routing<double> doubled;
  };

  explicit DoubleSoftmaxLoss(Balance balance) : balance_(std::move(balance)) {}

  double forward(const Routing<double>& routing, Cache& cache) const {
    cache.doubled = routing;
    softmax<double>(routing.probabilities, cache.doubled.probabilities);
    return balance_.forward(cache.doubled, cache.inner);
  }

  void backward(const Routing<double>& /*routing*/, double scale, RoutingGradient<double>& gradient,
                Cache& cache) const {
    RoutingGradient<double> inner;
    inner.reset(cache.doubled);
    balance_.backward(cache.doubled, scale, inner, cache.inner);
    add_softmax_backward<double>(cache.doubled.probabilities, inner.probabilities,
                                 gradient.probabilities);
  }

 private:
  Balance balance_;
};

}  // namespace weir::golden
