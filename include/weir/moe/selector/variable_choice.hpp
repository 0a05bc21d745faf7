// SPDX-License-Identifier: MIT
/// \file
/// Routings in which the number of experts differs from token to token.
#pragma once

#include <algorithm>
#include <cstdint>

#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// What selectors of a variable number of experts keep in their caches.
struct VariableChoice {
  List<Index> chosen;  ///< [tokens * most], workspace of `assign_chosen`.
};

/// Gives each real token the experts that `choose(t, chosen)` writes to `chosen` [most], best
/// first, and the number of which it returns. The weights are zero, for the selector to set.
///
/// \param row_cost What `choose` takes, as in `parallel_rows`.
template <class T, class Choose>
void assign_chosen(Routing<T>& routing, Index most, Index row_cost, VariableChoice& space,
                   Choose&& choose) {
  const Index tokens = routing.tokens();
  space.chosen.resize(tokens * most);
  routing.offsets.assign(tokens + 1, 0);
  routing.rows.for_each_real(row_cost, [&](Index t) {
    routing.offsets[t + 1] = choose(t, space.chosen.data() + t * most);
  });
  for (Index t = 0; t < tokens; ++t) routing.offsets[t + 1] += routing.first(t);
  const Index count = routing.offsets.back();
  routing.expert.resize(count);
  routing.weight.assign(count, T(0));
  routing.kept.assign(count, std::uint8_t{1});
  for (Index t = 0; t < tokens; ++t) {
    std::copy_n(space.chosen.data() + t * most, routing.last(t) - routing.first(t),
                routing.expert.data() + routing.first(t));
  }
}

}  // namespace weir
