// SPDX-License-Identifier: MIT
/// \file
/// Which experts the passes of a step allowed, for rules that leave the others alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Makes `allowed[e]` 1 for each expert e that the pass allowed to any real token.
/// \param allowed  [experts]
template <class T>
void mark_allowed(const Routing<T>& routing, List<std::uint8_t>& allowed) {
  for (Index t = 0; t < routing.tokens(); ++t) {
    if (routing.rows.is_padding(t)) continue;
    for (Index e = 0; e < routing.experts(); ++e) {
      if (!routing.is_forbidden(t, e)) allowed[e] = 1;
    }
    if (std::count(allowed.begin(), allowed.end(), std::uint8_t{0}) == 0) return;
  }
}

}  // namespace weir
