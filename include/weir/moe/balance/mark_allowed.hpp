// SPDX-License-Identifier: MIT
/// \file
/// Which experts the passes of a step allowed, for rules that leave the others alone.
#pragma once

#include <cstdint>

#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Makes `allowed[e]` 1 for each expert e that the pass allowed to any real token.
/// \param allowed  [experts]
template <class T>
void mark_allowed(const Routing<T>& routing, List<std::uint8_t>& allowed) {
  if (routing.rows.real() == 0) return;
  for (const Index e : routing.open) allowed[e] = 1;
}

}  // namespace weir
