// SPDX-License-Identifier: MIT
/// \file
/// The vectors by which a router knows its experts.
#pragma once

#include <string_view>
#include <type_traits>

#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>

namespace weir {

namespace detail {

/// Visits a router, and keeps what the vectors of its experts are in.
template <class P>
struct ExpertVectorFinder {
  Index experts;
  P* found = nullptr;

  void operator()(std::string_view name, P& parameter) {
    if (name != "weight" && name != "embedding") return;
    if (found == nullptr && parameter.value.rows() == experts) found = &parameter;
  }

  template <class Other>
  void operator()(std::string_view /*name*/, Other& /*other*/) {}
};

}  // namespace detail

/// The parameter [experts, n] of a router whose row e stands for expert e, or null if it has none:
/// its own parameter "weight" (LinearRouter, NoisyRouter) or "embedding" (CosineRouter). A router
/// around another one shows the inner parameters under the inner names, and so has the same.
/// \param router   A Router, const or not; so is the parameter.
template <class R>
auto* expert_vectors(R& router) {
  using Plain = Parameter<typename R::Scalar>;
  using P = std::conditional_t<std::is_const_v<R>, const Plain, Plain>;
  detail::ExpertVectorFinder<P> find{router.experts()};
  R::visit(router, find);
  return find.found;
}

}  // namespace weir
