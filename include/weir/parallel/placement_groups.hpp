// SPDX-License-Identifier: MIT
/// \file
/// What balancers and selectors have to know of a placement: which experts share a rank or a node.
#pragma once

#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/balance/expert_groups.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/parallel/placement.hpp>

namespace weir {

namespace detail {

/// \param what     "rank" or "node".
/// \param part_of  The part of a rank.
template <class PartOf>
ExpertGroups groups_of(std::string_view who, std::string_view what, const Placement& placement,
                       Index parts, PartOf&& part_of) {
  std::vector<Index> group_of;
  std::vector<Index> size(static_cast<std::size_t>(parts), 0);
  for (Index e = 0; e < placement.experts(); ++e) {
    const Index part = part_of(placement.owner(e));
    for (const Index r : placement.ranks_of(e)) {
      if (part_of(r) != part) {
        throw_error<ConfigError>(who, ": expert ", e, " is on ", what, "s ", part, " and ",
                                 part_of(r), ", expected it on one");
      }
    }
    group_of.push_back(part);
    ++size[static_cast<std::size_t>(part)];
  }
  for (std::size_t p = 0; p < size.size(); ++p) {
    if (size[p] > 0) continue;
    throw_error<ConfigError>(who, ": ", what, " ", p, " has no expert, expected at least one");
  }
  return ExpertGroups(std::move(group_of));
}

inline GroupLimit limit_of(std::string_view who, std::string_view what, const ExpertGroups& groups,
                           Index allowed, Index summed) {
  if (groups.experts() % groups.count() != 0) {
    throw_error<ConfigError>(who, ": the placement has ", groups.experts(), " experts on ",
                             groups.count(), " ", what, "s, expected as many on each");
  }
  const Index size = groups.experts() / groups.count();
  for (Index e = 0; e < groups.experts(); ++e) {
    const Index first = e / size * size;
    if (groups.group_of(e) == groups.group_of(first)) continue;
    throw_error<ConfigError>(who, ": expert ", e, " is on ", what, " ", groups.group_of(e),
                             ", expected it on ", what, " ", groups.group_of(first), " as expert ",
                             first, ": groups are ", size, " neighbours each");
  }
  const GroupLimit limit{.count = groups.count(), .allowed = allowed, .summed = summed};
  limit.check(who, groups.experts(), 1);
  return limit;
}

}  // namespace detail

/// The experts of each rank, as DeviceLoss and CommunicationLoss want them.
/// \throws ConfigError  if an expert is on several ranks, or a rank has none.
inline ExpertGroups rank_groups(const Placement& placement) {
  return detail::groups_of("rank_groups", "rank", placement, placement.ranks(),
                           [](Index rank) { return rank; });
}

/// The experts of each node.
/// \throws ConfigError  if an expert is on several nodes, or a node has none.
inline ExpertGroups node_groups(const Placement& placement) {
  return detail::groups_of("node_groups", "node", placement, placement.nodes().nodes(),
                           [&](Index rank) { return placement.nodes().node_of(rank); });
}

/// Limits each token to the experts of `allowed` ranks (device-limited routing, DeepSeek-V2), for
/// the settings of selectors. The count is also that of DeviceCapacity's devices.
/// \param summed   How many scores of a rank's experts make its own, see GroupLimit.
/// \throws ConfigError  as `rank_groups`; unless each rank has as many experts, all neighbours; as
///                      GroupLimit::check.
inline GroupLimit limit_to_ranks(const Placement& placement, Index allowed, Index summed = 1) {
  return detail::limit_of("limit_to_ranks", "rank", rank_groups(placement), allowed, summed);
}

/// Limits each token to the experts of `allowed` nodes (node-limited routing, DeepSeek-V3), so that
/// it is sent to no more nodes, whichever ranks of them its experts are on.
/// \throws ConfigError  as `node_groups`; unless each node has as many experts, all neighbours; as
///                      GroupLimit::check.
inline GroupLimit limit_to_nodes(const Placement& placement, Index allowed, Index summed = 1) {
  return detail::limit_of("limit_to_nodes", "node", node_groups(placement), allowed, summed);
}

}  // namespace weir
