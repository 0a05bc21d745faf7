// SPDX-License-Identifier: MIT
/// \file
/// Hard weights that are differentiated as if they were soft: the straight-through estimator.
#pragma once

#include <algorithm>
#include <concepts>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/moe/selector/k_best.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/ops/softmax.hpp>

namespace weir {

/// Settings of StraightThrough, with the meaning that they have in SoftmaxTopK.
struct StraightThroughConfig {
  Index k = 1;
  bool renormalise = false;  ///< Off by default: with k = 1 nothing would reach the router.
  double scale = 1.0;
  GroupLimit groups = {};
};

/// The k experts of largest probability, whose outputs are not weighted by it, while the router
/// learns as if they were:
///
///     g_e = h_e + p_e - stop(p_e)
///
///     h_e = scale,        p_e as a raw SoftmaxTopK has it              the chosen ones summed up
///     h_e = scale / k,    p_e as a renormalised SoftmaxTopK has it     their mean
///
/// In the forward pass g = h, in the derivative g = p: it is not that of the forward pass, but of
/// one with soft weights. In evaluation it is the same. An expert that was not chosen is not run,
/// and has no part in the derivative except through the softmax.
///
/// Behind a GumbelRouter with k = 1 this is straight-through Gumbel-softmax. (Bengio et al. 2013,
/// arXiv:1308.3432, the estimator; Jang et al. 2016, arXiv:1611.01144, section 2.2.) Causal.
template <std::floating_point T>
class StraightThrough : public SelectorBase<T> {
 public:
  using typename SelectorBase<T>::Cache;

  explicit StraightThrough(StraightThroughConfig config = {})
      : config_(config),
        soft_({.k = config.k,
               .renormalise = config.renormalise,
               .scale = config.scale,
               .groups = config.groups}) {}

  /// \throws ConfigError  unless 1 <= k <= experts, scale > 0 and the groups fit.
  void check(Index experts) const {
    expect_k("StraightThrough", config_.k, experts);
    expect_positive("StraightThrough", "scale", config_.scale);
    config_.groups.check("StraightThrough", experts, config_.k);
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& /*cache*/) const {
    route(logits, pass, nullptr, routing);
  }

  /// `forward` with an imposed choice, see Replay.
  void forward_imposed(MatrixIn<T> logits, const Pass& pass, const RoutingTrace& imposed,
                       Routing<T>& routing, Cache& /*cache*/) const {
    route(logits, pass, &imposed, routing);
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& cache) const {
    soft_.backward(routing, gradient, cache);  // It makes p of the probabilities, not the weights.
  }

  const StraightThroughConfig& config() const { return config_; }

 private:
  void route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed,
             Routing<T>& routing) const;

  StraightThroughConfig config_;
  SoftmaxTopK<T> soft_;
};

template <std::floating_point T>
void StraightThrough<T>::route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed,
                               Routing<T>& routing) const {
  check(logits.cols());
  const double parts = config_.renormalise ? static_cast<double>(config_.k) : 1.0;
  const auto hard = static_cast<T>(config_.scale / parts);
  route_k_best(
      {"StraightThrough", config_.k, config_.groups, imposed}, logits, pass, routing,
      [&](Index t, T* p) -> const T* {
        softmax_row<T>(row_span(routing.logits, t), span_of(p, routing.experts()));
        return p;
      },
      [&](Index /*t*/, const Index* /*chosen*/, T* weight, const T* /*p*/) {
        std::fill_n(weight, config_.k, hard);
      });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::StraightThrough<float>;
extern template class weir::StraightThrough<double>;
#endif
