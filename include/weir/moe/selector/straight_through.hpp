// SPDX-License-Identifier: MIT
/// \file
/// Hard weights that are differentiated as if they were soft: the straight-through estimator.
#pragma once

#include <concepts>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

namespace weir {

/// The k experts of largest probability, whose outputs are not weighted by it, while the router
/// learns as if they were:
///
///     g_e = h_e + p_e - stop(p_e)
///
///     h_e = scale,        p_e as a raw SoftmaxTopK has it              the chosen ones summed up
///     h_e = scale / k,    p_e as a SoftmaxTopK renormalised with norm 1 has it       their mean
///
/// p_e are the weights of `soft`, and scale is its setting. In the forward pass g = h, in the
/// derivative g = p: it is not that of the forward pass, but of one with soft weights. In
/// evaluation it is the same. An expert that was not chosen is not run, and so has no part in the
/// derivative but through the softmax. With k = 1 renormalised nothing reaches the router.
///
/// Behind a GumbelRouter with k = 1 this is straight-through Gumbel-softmax. (Bengio et al. 2013,
/// arXiv:1308.3432, the estimator; Jang et al. 2016, arXiv:1611.01144, section 2.2.) Causal.
template <std::floating_point T>
struct StraightThrough {
  using Scalar = T;
  static constexpr bool kImposable = true;  ///< See Replay.

  SoftmaxTopK<T> soft = {.k = 1};

  /// \throws ConfigError  as SoftmaxTopK; if it is renormalised with a norm other than 1.
  void check(Index experts) const {
    soft.check(experts);
    if (soft.renormalise && soft.norm != 1.0) {
      fail<ConfigError>("StraightThrough: soft.norm = ", soft.norm, ", expected 1");
    }
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void select(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing) const {
    check(logits.cols());
    soft.select(logits, pass, routing);
    const double parts = soft.renormalise ? static_cast<double>(soft.k) : 1.0;
    routing.weight.assign(routing.weight.size(), static_cast<T>(soft.scale / parts));
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    soft.backward(routing, gradient);  // Which makes p of the probabilities, not of the weights.
  }
};

}  // namespace weir
