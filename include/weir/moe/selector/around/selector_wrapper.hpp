// SPDX-License-Identifier: MIT
/// \file
/// What selectors have in common that change what another one does.
#pragma once

#include <utility>

#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// The part of a selector around another that is the inner one's: a base for `select` to be added
/// to.
template <class Inner>
class SelectorWrapper {
 public:
  using Scalar = typename Inner::Scalar;
  using T = Scalar;
  static constexpr bool kBiasesProbabilities = requires {  // For QuantileBalance.
    requires Inner::kBiasesProbabilities;
  };

  /// \throws ConfigError  as the inner selector.
  void check(Index experts) const { inner_.check(experts); }

  /// \throws ConfigError  as the inner selector.
  template <class R>
  void check_router(const R& router) const {
    if constexpr (requires { inner_.check_router(router); }) inner_.check_router(router);
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    inner_.backward(routing, gradient);
  }

  /// The buffers of the inner selector, under its own names.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    if constexpr (requires { Inner::visit(self.inner(), visit); }) {
      Inner::visit(self.inner(), visit);
    }
  }

  /// Of the inner selector, where it has one, for BiasBalance.
  auto& selection_bias() requires requires(Inner& inner) { inner.selection_bias(); }
  { return inner_.selection_bias(); }

  Inner& inner() { return inner_; }
  const Inner& inner() const { return inner_; }

 protected:
  explicit SelectorWrapper(Inner inner) : inner_(std::move(inner)) {}

  Inner inner_;
};

}  // namespace weir
