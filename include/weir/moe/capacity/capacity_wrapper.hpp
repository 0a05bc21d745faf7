// SPDX-License-Identifier: MIT
/// \file
/// What capacity policies have in common that add to what another one does.
#pragma once

#include <utility>

#include <weir/moe/routing.hpp>

namespace weir {

/// The part of a capacity policy around another that is the inner one's: a base for `apply` to be
/// added to.
template <class Inner>
class CapacityWrapper {
 public:
  /// \throws ConfigError  as the inner policy.
  void check() const { inner_.check(); }

  /// What the inner policy learns from, where it learns.
  template <class T>
  void observe(const Routing<T>& routing) requires requires(Inner& inner) {
    inner.observe(routing);
  }
  { inner_.observe(routing); }

  void update() requires requires(Inner& inner) { inner.update(); }
  { inner_.update(); }

  /// The buffers of the inner policy, under its own names.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    if constexpr (requires { Inner::visit(self.inner(), visit); }) {
      Inner::visit(self.inner(), visit);
    }
  }

  Inner& inner() { return inner_; }
  const Inner& inner() const { return inner_; }

 protected:
  explicit CapacityWrapper(Inner inner) : inner_(std::move(inner)) {}

  Inner inner_;
};

}  // namespace weir
