// SPDX-License-Identifier: MIT
/// \file
/// Agreement on the number of groups between a router and what comes after it.
#pragma once

#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// \param who      Whose setting `groups` is, for the message.
/// \throws ConfigError  if the router has groups (HierarchicalRouter), and another number of them.
template <class R>
void expect_groups_of(const R& router, std::string_view who, Index groups) {
  if constexpr (requires { router.groups(); }) {
    if (router.groups() != groups) {
      fail<ConfigError>(who, ": groups = ", groups, ", expected ", router.groups(),
                        " as the router");
    }
  }
}

}  // namespace weir
