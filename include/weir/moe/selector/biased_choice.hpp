// SPDX-License-Identifier: MIT
/// \file
/// What selectors have in common that choose by a selection bias and weigh by the softmax.
#pragma once

#include <concepts>

#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/k_best.hpp>
#include <weir/moe/selector/selection_bias.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// The base of BiasedSoftmaxTopK and BiasedProbabilityTopK: chooses the k experts of largest
/// s_e + b_e, with the weights of SoftmaxTopK, to which b does not belong. The derived class has
///
///     static constexpr std::string_view kName                its name, for messages
///     static constexpr Index kCost                           see KBest
///     static void score(std::span<const T> z, std::span<T> s)   s from a token's logits
template <std::floating_point T, class Config, class Derived>
class BiasedChoice : public SelectorBase<T> {
 public:
  using typename SelectorBase<T>::Cache;

  /// A bias of zeros.
  /// \throws ConfigError  unless 1 <= k <= experts and scale > 0.
  explicit BiasedChoice(Index experts, Config config = {})
      : config_(config),
        soft_({.k = config.k, .renormalise = config.renormalise, .scale = config.scale}) {
    expect_at_least<Index>(Derived::kName, "experts", experts, 1);
    bias_.value.setZero(1, experts);
    check(experts);
  }

  /// \throws ConfigError     unless 1 <= k <= experts, scale > 0 and the bias is [1, experts].
  /// \throws NonFiniteError  if the bias is not finite.
  void check(Index experts) const {
    expect_k(Derived::kName, config_.k, experts);
    expect_positive(Derived::kName, "scale", config_.scale);
    expect_selection_bias(Derived::kName, bias_, experts);
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token, or the bias, is not finite.
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& /*cache*/) const {
    route(logits, pass, nullptr, routing);
  }

  /// `forward` with an imposed choice, see Replay.
  void forward_imposed(MatrixIn<T> logits, const Pass& pass, const RoutingTrace& imposed,
                       Routing<T>& routing, Cache& /*cache*/) const {
    route(logits, pass, &imposed, routing);
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& cache) const {
    soft_.backward(routing, gradient, cache);
  }

  /// The bias of a cold expert is zero.
  /// \throws ConfigError  if the map does not fit.
  void remap_experts(const ExpertMap& map) {
    map.check("BiasedChoice::remap_experts", bias_.value.cols());
    bias_.value = map.columns(bias_.value, T(0));
  }

  /// Buffer `bias`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("bias", self.bias_);
  }

  /// b, [1, experts].
  Buffer<T>& selection_bias() { return bias_; }
  const Buffer<T>& selection_bias() const { return bias_; }
  const Config& config() const { return config_; }

  /// How many experts each token has from the next pass on. `check` tells whether it fits.
  void set_k(Index k) {
    config_.k = k;
    soft_.set_k(k);
  }

 private:
  void route(MatrixIn<T> logits, const Pass& pass, const RoutingTrace* imposed,
             Routing<T>& routing) const;

  Config config_;
  SoftmaxTopK<T> soft_;  // Has the same weights, as functions of the logits.
  Buffer<T> bias_;
};

template <std::floating_point T, class Config, class Derived>
void BiasedChoice<T, Config, Derived>::route(MatrixIn<T> logits, const Pass& pass,
                                             const RoutingTrace* imposed,
                                             Routing<T>& routing) const {
  check(logits.cols());
  const Index experts = logits.cols();
  route_k_best(
      {.who = Derived::kName, .k = config_.k, .imposed = imposed, .cost = Derived::kCost}, logits,
      pass, routing,
      [&](Index t, T* p) -> const T* {
        Derived::score(row_span(routing.logits, t), span_of(p, experts));
        loops::add<T>(experts, p, bias_.value.data(), p);
        return p;
      },
      [&](Index t, const Index* chosen, T* weight, T* p) {
        softmax_row<T>(row_span(routing.logits, t), span_of(p, experts));
        soft_.weigh(&routing.logits(t, 0), p, chosen, weight);
      });
}

}  // namespace weir
