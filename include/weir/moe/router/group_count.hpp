// SPDX-License-Identifier: MIT
/// \file
/// Routers of groups of experts, and agreement on the number of groups with what comes after them.
#pragma once

#include <concepts>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A router of two levels: of groups, and of the experts in each; HierarchicalRouter, or a router
/// around one.
template <class R>
concept GroupedRouter = requires(const R& router) {
  { router.groups() } -> std::convertible_to<Index>;
};

/// \param who      Whose setting `groups` is, for the message.
/// \throws ConfigError  if the router has groups, and another number of them.
template <class R>
void expect_groups_of(const R& router, std::string_view who, Index groups) {
  if constexpr (GroupedRouter<R>) {
    if (router.groups() != groups) {
      fail<ConfigError>(who, ": groups = ", groups, ", expected ", router.groups(),
                        " as the router");
    }
  }
}

}  // namespace weir
