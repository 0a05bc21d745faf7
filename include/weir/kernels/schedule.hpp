// SPDX-License-Identifier: MIT
/// \file
/// Sharing out many small pieces of work of different sizes.
#pragma once

#include <algorithm>

#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>

namespace weir::kernels {

/// A group's pieces of work, all of one cost (in multiply-adds), of which `together` in a row are
/// better done by one thread.
struct Pieces {
  Index count = 0;
  Index cost = 0;
  Index together = 1;
};

/// Calls `body(group, begin, end)` such that each piece of each group is in exactly one of the
/// ranges [begin, end). `pieces_of(group)` gives the group's `Pieces`. The work is cut by cost, not
/// by group: when one expert has most of the tokens, all threads work on that expert.
template <class PiecesOf, class Body>
void parallel_pieces_of(Index groups, PiecesOf&& pieces_of, Body&& body) {
  constexpr Index kWorthwhile = 100'000;  // Multiply-adds below which waking a thread costs more.
  constexpr Index kTasksPerThread = 16;
  constexpr Index kPiecesPerTask = 4;  // So that a thread can do several side by side.
  Index total = 0;
  Index count = 0;
  for (Index g = 0; g < groups; ++g) {
    const Pieces pieces = pieces_of(g);
    total += pieces.count * pieces.cost;
    count += pieces.count;
  }
  if (total == 0) return;
  const Index most_tasks = std::min<Index>(kTasksPerThread * threads(),
                                           std::max<Index>(threads(), count / kPiecesPerTask));
  const Index tasks = threads() == 1 ? 1 : std::clamp<Index>(total / kWorthwhile, 1, most_tasks);
  parallel_for(tasks, [&](Index task) {
    // This task has the pieces that begin in [from, to) on the line of all work.
    const Index from = total / tasks * task + std::min(task, total % tasks);
    const Index to = total / tasks * (task + 1) + std::min(task + 1, total % tasks);
    Index start = 0;
    for (Index g = 0; g < groups && start < to; ++g) {
      const Pieces pieces = pieces_of(g);
      const Index end = start + pieces.count * pieces.cost;
      if (end > from && pieces.cost > 0) {
        const Index step = count >= tasks * pieces.together ? pieces.together : 1;
        const auto first_from = [&](Index position) {
          const Index steps = (position - start + step * pieces.cost - 1) / (step * pieces.cost);
          return std::clamp<Index>(step * steps, 0, pieces.count);
        };
        const Index first = from <= start ? 0 : first_from(from);
        const Index last = first_from(to);
        if (first < last) body(g, first, last);
      }
      start = end;
    }
  });
}

}  // namespace weir::kernels
