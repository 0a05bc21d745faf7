// SPDX-License-Identifier: MIT
/// \file
/// Agreement of a router of two levels with what comes after it.
#pragma once

#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// \param who      The type whose setting `groups` is, for the message.
/// \throws ConfigError  if the router chooses from groups first, and from another number of them.
template <class R>
void expect_groups_of(const R& router, std::string_view who, Index groups) {
  if (router.groups() == 0 || router.groups() == groups) return;
  throw_error<ConfigError>(who, ": groups = ", groups, ", expected ", router.groups(),
                           " as the router");
}

}  // namespace weir
