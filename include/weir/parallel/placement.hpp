// SPDX-License-Identifier: MIT
/// \file
/// Which rank holds which expert.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/balance/expert_groups.hpp>
#include <weir/parallel/rank_nodes.hpp>

namespace weir {

/// The rank that tokens of rank `source` go to for an expert, see Placement.
/// \param holders  The ranks that hold the expert, in ascending order; at least one.
inline Index nearest_replica(std::span<const Index> holders, Index source, const RankNodes& nodes) {
  if (holders.size() == 1) return holders.front();
  Index near = 0;
  for (const Index r : holders) {
    if (r == source) return r;
    near += nodes.share_node(r, source) ? 1 : 0;
  }
  // Of all holders, those of one node: ranks of a node agree on it, so that each of them has its
  // own part of the way there, see RowsSent::kPerNode.
  const auto count = static_cast<Index>(holders.size());
  const auto begins_node = [&](Index i) {
    return i == 0 || !nodes.share_node(element(holders, i), element(holders, i - 1));
  };
  Index first = 0;
  if (near == 0) {
    Index holding = 0;
    for (Index i = 0; i < count; ++i) holding += begins_node(i) ? 1 : 0;
    Index left = nodes.node_of(source) % holding;
    while (!begins_node(first) || left-- > 0) ++first;
    Index last = first + 1;
    while (last < count && !begins_node(last)) ++last;
    return element(holders, first + source % (last - first));
  }
  Index left = source % near;
  while (!nodes.share_node(element(holders, first), source) || left-- > 0) ++first;
  return element(holders, first);
}

/// The experts of a mixture on the ranks of a parallel program. Each expert is on one rank at
/// least; one that is on several has replicas. A rank keeps its experts in slots, in ascending
/// order of the experts; it may have none.
///
/// A token goes to one replica of its expert, which depends on nothing but the expert and the
/// token's rank (the source), so that all ranks agree without a word:
///
///     on the source itself, if it holds the expert;
///     else, if m >= 1 ranks of the source's node hold it, number source mod m of these;
///     else number source mod l of the l ranks of one node that hold it: of the n nodes with such
///     ranks, number (the source's node) mod n.
///
/// Ranks are counted in ascending order, nodes in the order of these ranks; ranks of a node that do
/// not follow each other among them count as nodes of their own.
class Placement {
 public:
  /// \param ranks_of  For each expert the ranks that hold it, in any order.
  /// \throws ConfigError  unless there is an expert and each has a rank, of those there are and no
  ///                      rank twice.
  Placement(const std::vector<std::vector<Index>>& ranks_of, RankNodes nodes);

  /// Neighbours together, as evenly as the numbers allow:
  ///
  ///     expert e is on rank floor(((e + 1) * ranks - 1) / experts)
  ///
  /// so that rank r holds floor((r + 1) * experts / ranks) - floor(r * experts / ranks) experts.
  /// \throws ConfigError  unless experts >= 1.
  static Placement contiguous(Index experts, RankNodes nodes);

  /// Expert e is on rank e mod ranks.
  /// \throws ConfigError  unless experts >= 1.
  static Placement round_robin(Index experts, RankNodes nodes);

  /// Groups of experts stay together. With as many groups as ranks or more, group g is on one rank,
  /// the groups going to the ranks as experts do in `contiguous`. With fewer, the ranks are cut
  /// into as many runs of neighbours, as evenly as the numbers allow, and the experts of a group
  /// are spread over the ranks of its run by the same rule.
  static Placement by_groups(const ExpertGroups& groups, RankNodes nodes);

  /// \param rank_of  The rank of each expert.
  /// \throws ConfigError  unless there is an expert and each is on one of the ranks.
  static Placement from_map(const std::vector<Index>& rank_of, RankNodes nodes);

  /// The same with one more replica.
  /// \throws ConfigError  unless there are such an expert and rank, and the rank does not yet hold
  ///                      the expert.
  Placement with_replica(Index expert, Index rank) const;

  Index experts() const { return of_expert_.count() - 1; }
  Index ranks() const { return nodes_.ranks(); }
  const RankNodes& nodes() const { return nodes_; }

  /// The ranks that hold an expert, in ascending order; at least one.
  std::span<const Index> ranks_of(Index expert) const {
    return span_of(rank_.data() + of_expert_[expert], of_expert_[expert + 1] - of_expert_[expert]);
  }
  /// How many ranks hold an expert.
  Index replicas(Index expert) const { return static_cast<Index>(ranks_of(expert).size()); }
  /// The lowest rank that holds an expert.
  Index owner(Index expert) const { return ranks_of(expert).front(); }
  bool has_replicas() const { return rank_.count() > experts(); }

  /// The experts that a rank holds, in ascending order; slot s has number s of them.
  std::span<const Index> experts_on(Index rank) const {
    return span_of(expert_.data() + on_rank_[rank], on_rank_[rank + 1] - on_rank_[rank]);
  }
  /// How many experts a rank holds, replicas among them.
  Index slots(Index rank) const { return static_cast<Index>(experts_on(rank).size()); }
  /// The most experts that a rank holds.
  Index most_slots() const;

  /// The slot of an expert on a rank, or -1 if the rank does not hold it.
  Index slot(Index expert, Index rank) const {
    const std::span<const Index> held = experts_on(rank);
    const auto found = std::lower_bound(held.begin(), held.end(), expert);
    return found != held.end() && *found == expert ? found - held.begin() : Index(-1);
  }
  bool holds(Index rank, Index expert) const { return slot(expert, rank) >= 0; }

  /// The rank that tokens of rank `source` go to for an expert.
  Index destination(Index expert, Index source) const;
  /// The same for each expert: [experts].
  List<Index> destinations(Index source) const;

  /// \throws ConfigError  unless it is a placement of `experts` experts.
  void expect_experts(std::string_view who, Index experts) const {
    if (experts == this->experts()) return;
    throw_error<ConfigError>(who, ": the placement has ", this->experts(), " experts, expected ",
                             experts, " as routed to");
  }

  bool operator==(const Placement&) const = default;

 private:
  /// Which of `parts` even parts of `count` things has thing i.
  static Index part_of(Index i, Index count, Index parts) { return ((i + 1) * parts - 1) / count; }
  /// The first thing of part p.
  static Index part_begin(Index p, Index count, Index parts) { return p * count / parts; }

  RankNodes nodes_;
  List<Index> of_expert_;  // [experts + 1], into `rank_`.
  List<Index> rank_;
  List<Index> on_rank_;  // [ranks + 1], into `expert_`.
  List<Index> expert_;
};

inline Placement::Placement(const std::vector<std::vector<Index>>& ranks_of, RankNodes nodes)
    : nodes_(std::move(nodes)) {
  if (ranks_of.empty()) throw_error<ConfigError>("Placement: experts = 0, expected >= 1");
  of_expert_.push_back(0);
  on_rank_.assign(ranks() + 1, 0);
  for (std::size_t e = 0; e < ranks_of.size(); ++e) {
    std::vector<Index> holders = ranks_of[e];
    if (holders.empty()) {
      throw_error<ConfigError>("Placement: expert ", e, " is on no rank, expected at least one");
    }
    std::sort(holders.begin(), holders.end());
    for (std::size_t i = 0; i < holders.size(); ++i) {
      const Index r = holders[i];
      if (r < 0 || r >= ranks()) {
        throw_error<ConfigError>("Placement: a rank of expert ", e, " = ", r,
                                 ", expected 0 <= rank < ranks = ", ranks());
      }
      if (i > 0 && holders[i - 1] == r) {
        throw_error<ConfigError>("Placement: expert ", e, " is on rank ", r,
                                 " twice, expected it once");
      }
      rank_.push_back(r);
      ++on_rank_[r + 1];
    }
    of_expert_.push_back(rank_.count());
  }
  for (Index r = 0; r < ranks(); ++r) on_rank_[r + 1] += on_rank_[r];
  List<Index> next = on_rank_;
  expert_.resize(rank_.count());
  for (Index e = 0; e < experts(); ++e) {
    for (const Index r : this->ranks_of(e)) expert_[next[r]++] = e;
  }
}

inline Placement Placement::contiguous(Index experts, RankNodes nodes) {
  expect_at_least<Index>("Placement", "experts", experts, 1);
  std::vector<Index> rank_of;
  for (Index e = 0; e < experts; ++e) rank_of.push_back(part_of(e, experts, nodes.ranks()));
  return from_map(rank_of, std::move(nodes));
}

inline Placement Placement::round_robin(Index experts, RankNodes nodes) {
  expect_at_least<Index>("Placement", "experts", experts, 1);
  std::vector<Index> rank_of;
  for (Index e = 0; e < experts; ++e) rank_of.push_back(e % nodes.ranks());
  return from_map(rank_of, std::move(nodes));
}

inline Placement Placement::by_groups(const ExpertGroups& groups, RankNodes nodes) {
  const Index ranks = nodes.ranks();
  std::vector<Index> rank_of;
  List<Index> met(groups.count(), 0);  // How many experts of the group came before.
  for (Index e = 0; e < groups.experts(); ++e) {
    const Index g = groups.group_of(e);
    if (groups.count() >= ranks) {
      rank_of.push_back(part_of(g, groups.count(), ranks));
      continue;
    }
    const Index begin = part_begin(g, ranks, groups.count());
    const Index end = part_begin(g + 1, ranks, groups.count());
    rank_of.push_back(begin + part_of(met[g]++, groups.size(g), end - begin));
  }
  return from_map(rank_of, std::move(nodes));
}

inline Placement Placement::from_map(const std::vector<Index>& rank_of, RankNodes nodes) {
  std::vector<std::vector<Index>> ranks_of;
  ranks_of.reserve(rank_of.size());
  for (const Index r : rank_of) ranks_of.push_back({r});
  return {ranks_of, std::move(nodes)};
}

inline Placement Placement::with_replica(Index expert, Index rank) const {
  if (expert < 0 || expert >= experts()) {
    throw_error<ConfigError>("Placement::with_replica: expert = ", expert,
                             ", expected 0 <= expert < experts = ", experts());
  }
  nodes_.expect_rank("Placement::with_replica", "rank", rank);
  if (holds(rank, expert)) {
    throw_error<ConfigError>("Placement::with_replica: rank ", rank, " already holds expert ",
                             expert);
  }
  std::vector<std::vector<Index>> ranks_of;
  for (Index e = 0; e < experts(); ++e) {
    const std::span<const Index> holders = this->ranks_of(e);
    ranks_of.emplace_back(holders.begin(), holders.end());
  }
  ranks_of[static_cast<std::size_t>(expert)].push_back(rank);
  return {ranks_of, nodes_};
}

inline Index Placement::most_slots() const {
  Index most = 0;
  for (Index r = 0; r < ranks(); ++r) most = std::max(most, slots(r));
  return most;
}

inline Index Placement::destination(Index expert, Index source) const {
  return nearest_replica(ranks_of(expert), source, nodes_);
}

inline List<Index> Placement::destinations(Index source) const {
  nodes_.expect_rank("Placement::destinations", "source", source);
  List<Index> ranks;
  ranks.reserve(experts());
  for (Index e = 0; e < experts(); ++e) ranks.push_back(destination(e, source));
  return ranks;
}

}  // namespace weir
