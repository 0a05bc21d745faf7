// SPDX-License-Identifier: MIT
/// \file
/// What capacity policies have in common that add to what another one does.
#pragma once

#include <utility>

#include <weir/core/pass.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// A capacity policy that does what the one inside does: a base for wrappers, which replace what
/// they change. A wrapper with a cache of its own derives it from `Cache`, and hands `cache.inner`
/// to the policy inside.
template <class Inner>
class CapacityWrapper : public CapacityBase {
 public:
  template <class T>
  struct Cache {
    typename Inner::template Cache<T> inner;
  };

  /// \throws ConfigError  as the inner policy.
  void check() const { inner_.check(); }

  template <class T>
  void forward(const Pass& pass, Routing<T>& routing, Cache<T>& cache) const {
    inner_.forward(pass, routing, cache.inner);
  }

  template <class T>
  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache<T>& cache) const {
    inner_.backward(routing, gradient, cache.inner);
  }

  /// Lets the inner policy learn.
  template <class T>
  void observe(const Routing<T>& routing) {
    inner_.observe(routing);
  }

  /// The members of the inner policy, under its own names.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.inner());
  }

  Inner& inner() { return inner_; }
  const Inner& inner() const { return inner_; }

 protected:
  explicit CapacityWrapper(Inner inner) : inner_(std::move(inner)) {}

  Inner inner_;
};

}  // namespace weir
