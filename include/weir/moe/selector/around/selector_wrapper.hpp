// SPDX-License-Identifier: MIT
/// \file
/// What selectors have in common that change what another one does.
#pragma once

#include <utility>

#include <weir/core/expert_map.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/selection_bias.hpp>

namespace weir {

/// The base of a selector around another one. Everything is the inner selector's, except for
/// `forward`, which the wrapper adds. A wrapper whose cache holds more derives it from this one.
template <class Inner>
class SelectorWrapper : public SelectorBase<typename Inner::Scalar> {
 public:
  using T = typename Inner::Scalar;
  static constexpr bool kBiasesLogits = Inner::kBiasesLogits;

  struct Cache {
    typename Inner::Cache inner;
  };

  /// \throws ConfigError  as the inner selector.
  void check(Index experts) const { inner_.check(experts); }

  /// \throws ConfigError  as the inner selector.
  template <class R>
  void check_router(const R& router) const {
    inner_.check_router(router);
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& cache) const {
    inner_.backward(routing, gradient, cache.inner);
  }

  /// The members of the inner selector, under their own names.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.inner());
  }

  /// The bias of the inner selector, where it has one, for BiasBalance and QuantileBalance.
  Buffer<T>& selection_bias() requires BiasedSelector<Inner> { return inner_.selection_bias(); }
  const Buffer<T>& selection_bias() const requires BiasedSelector<Inner> {
    return inner_.selection_bias();
  }

  /// The inner one's, where it has that.
  void remap_experts(const ExpertMap& map) requires requires(Inner& inner) {
    inner.remap_experts(map);
  }
  { inner_.remap_experts(map); }

  /// The inner one's, where it has that.
  void set_k(Index k) requires requires(Inner& inner) { inner.set_k(k); }
  { inner_.set_k(k); }

  Inner& inner() { return inner_; }
  const Inner& inner() const { return inner_; }

 protected:
  explicit SelectorWrapper(Inner inner) : inner_(std::move(inner)) {}

  Inner inner_;
};

}  // namespace weir
