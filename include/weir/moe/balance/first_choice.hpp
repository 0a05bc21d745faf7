// SPDX-License-Identifier: MIT
/// \file
/// The first choices of tokens, which some balancing losses count.
#pragma once

#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Calls `body(t, e)` for each of the tokens `begin` to `end` that has any expert; e is the first
/// choice of token t, dropped or not.
template <class Body>
void for_each_first_choice(const Assignments& assignments, Index begin, Index end, Body&& body) {
  for (Index t = begin; t < end; ++t) {
    if (assignments.first(t) == assignments.last(t)) continue;
    body(t, assignments.expert[assignments.first(t)]);
  }
}

}  // namespace weir
