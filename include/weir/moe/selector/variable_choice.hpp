// SPDX-License-Identifier: MIT
/// \file
/// Routings in which the number of experts differs from token to token.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <weir/core/parallel.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Gives each real token the experts that `choose(t, chosen)` writes to `chosen` [most], best
/// first, and the number of which it returns; the weights are zero as yet. Uses the workspace of
/// `routing`.
/// \param row_cost What `choose` takes, as in `parallel_rows`.
template <class T, class Choose>
void assign_chosen(Routing<T>& routing, Index most, Index row_cost, Choose&& choose) {
  const Index tokens = routing.tokens();
  std::vector<Index>& chosen = routing.workspace;
  chosen.resize(static_cast<std::size_t>(tokens * most));
  parallel_rows(tokens, row_cost, [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      routing.offsets[static_cast<std::size_t>(t) + 1] =
          routing.is_padding(t) ? 0 : choose(t, chosen.data() + t * most);
    }
  });
  for (Index t = 0; t < tokens; ++t) {
    routing.offsets[static_cast<std::size_t>(t) + 1] += routing.first(t);
  }
  const auto count = static_cast<std::size_t>(routing.offsets.back());
  routing.expert.resize(count);
  routing.weight.assign(count, T(0));
  routing.kept.assign(count, std::uint8_t{1});
  for (Index t = 0; t < tokens; ++t) {
    std::copy_n(chosen.data() + t * most, routing.last(t) - routing.first(t),
                routing.expert.data() + routing.first(t));
  }
}

}  // namespace weir
