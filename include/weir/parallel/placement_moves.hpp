// SPDX-License-Identifier: MIT
/// \file
/// From one placement to another.
#pragma once

#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/parallel/placement.hpp>

namespace weir {

/// Rank `from` gives rank `to` a copy of an expert, with all that belongs to it.
struct ExpertCopy {
  Index expert = 0, from = 0, to = 0;

  bool operator==(const ExpertCopy&) const = default;
};

/// A rank forgets an expert.
struct ExpertDrop {
  Index expert = 0, rank = 0;

  bool operator==(const ExpertDrop&) const = default;
};

/// What turns one placement into another: first all copies, then all drops, so that each copy finds
/// what it copies. Both are in the order of experts, then of ranks.
struct PlacementMoves {
  std::vector<ExpertCopy> copies;
  std::vector<ExpertDrop> drops;

  /// How many copies go to another node.
  Index across(const RankNodes& nodes) const {
    Index sum = 0;
    for (const ExpertCopy& copy : copies) sum += nodes.share_node(copy.from, copy.to) ? 0 : 1;
    return sum;
  }
};

/// A copy comes from the replica that tokens of its rank went to, which is one of its node if there
/// is any.
/// \throws ConfigError  unless both placements are of the same experts, ranks and nodes.
inline PlacementMoves placement_moves(const Placement& before, const Placement& after) {
  if (before.experts() != after.experts() || before.nodes() != after.nodes()) {
    throw_error<ConfigError>("placement_moves: after has ", after.experts(), " experts on ",
                             after.ranks(), " ranks of ", after.nodes().nodes(),
                             " nodes, expected those of before: ", before.experts(), " on ",
                             before.ranks(), " of ", before.nodes().nodes());
  }
  PlacementMoves moves;
  for (Index e = 0; e < before.experts(); ++e) {
    for (const Index to : after.ranks_of(e)) {
      if (!before.holds(to, e)) moves.copies.push_back({e, before.destination(e, to), to});
    }
    for (const Index rank : before.ranks_of(e)) {
      if (!after.holds(rank, e)) moves.drops.push_back({e, rank});
    }
  }
  return moves;
}

}  // namespace weir
