// SPDX-License-Identifier: MIT
#include <algorithm>
#include <set>
#include <span>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/parallel/placement.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::placement_test {

std::vector<Index> list(std::span<const Index> numbers) {
  return {numbers.begin(), numbers.end()};
}

/// The experts of each rank.
std::vector<std::vector<Index>> by_rank(const Placement& placement) {
  std::vector<std::vector<Index>> all;
  for (Index r = 0; r < placement.ranks(); ++r) all.push_back(list(placement.experts_on(r)));
  return all;
}

using Lists = std::vector<std::vector<Index>>;

TEST_CASE("Placements put experts where their names say", "[parallel][placement]") {
  const auto contiguous = [](Index experts, Index ranks) {
    return by_rank(Placement::contiguous(experts, RankNodes::single(ranks)));
  };
  CHECK(contiguous(6, 2) == Lists{{0, 1, 2}, {3, 4, 5}});
  CHECK(contiguous(8, 3) == Lists{{0, 1}, {2, 3, 4}, {5, 6, 7}});
  CHECK(contiguous(2, 3) == Lists{{}, {0}, {1}});
  CHECK(contiguous(1, 1) == Lists{{0}});
  const auto round_robin = [](Index experts, Index ranks) {
    return by_rank(Placement::round_robin(experts, RankNodes::single(ranks)));
  };
  CHECK(round_robin(5, 2) == Lists{{0, 2, 4}, {1, 3}});
  CHECK(round_robin(1, 2) == Lists{{0}, {}});
  CHECK(by_rank(Placement::from_map({2, 0, 2, 0}, RankNodes::single(3))) ==
        Lists{{1, 3}, {}, {0, 2}});
}

TEST_CASE("A contiguous placement is even and in order for any numbers", "[parallel][placement]") {
  for (Index experts = 1; experts <= 13; ++experts) {
    for (Index ranks = 1; ranks <= 9; ++ranks) {
      const Placement placement = Placement::contiguous(experts, RankNodes::single(ranks));
      INFO(experts << " experts on " << ranks << " ranks");
      Index next = 0;
      for (Index r = 0; r < ranks; ++r) {
        CHECK(placement.slots(r) == (r + 1) * experts / ranks - r * experts / ranks);
        for (const Index e : placement.experts_on(r)) {
          CHECK(e == next++);
          CHECK(placement.owner(e) == r);
        }
      }
      CHECK(next == experts);
      CHECK(placement.most_slots() == (experts + ranks - 1) / ranks);
    }
  }
}

TEST_CASE("Groups of experts share ranks", "[parallel][placement]") {
  const ExpertGroups groups({0, 1, 2, 0, 1, 2});
  const auto on = [&](Index ranks) {
    return by_rank(Placement::by_groups(groups, RankNodes::single(ranks)));
  };
  CHECK(on(1) == Lists{{0, 1, 2, 3, 4, 5}});
  CHECK(on(2) == Lists{{0, 3}, {1, 2, 4, 5}});  // Groups 0 | 1 and 2.
  CHECK(on(3) == Lists{{0, 3}, {1, 4}, {2, 5}});
  CHECK(on(6) == Lists{{0}, {3}, {1}, {4}, {2}, {5}});  // Two ranks for each group.
  CHECK(on(4) == Lists{{0, 3}, {1, 4}, {2}, {5}});      // 4 / 3 ranks for each.
  // A group for each node of four ranks.
  const RankNodes nodes = RankNodes::uniform(8, 4);
  const Placement placement = Placement::by_groups(ExpertGroups({1, 0, 1, 0, 1, 0, 0, 1}), nodes);
  for (Index e = 0; e < 8; ++e) {
    CHECK(nodes.node_of(placement.owner(e)) == ((e == 0 || e == 2 || e == 4 || e == 7) ? 1 : 0));
  }
  CHECK(placement.most_slots() == 1);
}

TEST_CASE("Replicas have slots of their own", "[parallel][placement]") {
  const Placement placement({{2, 0}, {1}, {1, 0, 2}}, RankNodes::single(3));
  CHECK(by_rank(placement) == Lists{{0, 2}, {1, 2}, {0, 2}});
  CHECK(list(placement.ranks_of(0)) == std::vector<Index>{0, 2});
  CHECK(placement.replicas(2) == 3);
  CHECK(placement.owner(0) == 0);
  CHECK(placement.has_replicas());
  CHECK(placement.slot(2, 1) == 1);
  CHECK(placement.slot(1, 0) == -1);
  CHECK(placement.holds(2, 0));
  CHECK_FALSE(placement.holds(0, 1));

  const Placement single = Placement::from_map({0, 1, 1}, RankNodes::single(3));
  CHECK_FALSE(single.has_replicas());
  CHECK(single.with_replica(0, 2).with_replica(2, 2).with_replica(2, 0) == placement);
}

TEST_CASE("Tokens go to the nearest replica, and different sources to different ones",
          "[parallel][placement]") {
  // Nodes {0, 1, 2}, {3, 4, 5}, {6, 7}.
  const RankNodes nodes = RankNodes::uniform(8, 3);
  const Placement placement({{4}, {1, 2, 4}, {0, 3, 4, 5}}, nodes);
  const auto destinations = [&](Index source) { return placement.destinations(source); };
  CHECK(destinations(0) == List<Index>{4, 1, 0});  // 0 mod 2: the first of ranks 1 and 2.
  CHECK(destinations(1) == List<Index>{4, 1, 0});
  CHECK(destinations(2) == List<Index>{4, 2, 0});
  CHECK(destinations(3) == List<Index>{4, 4, 3});
  CHECK(destinations(4) == List<Index>{4, 4, 4});
  CHECK(destinations(5) == List<Index>{4, 4, 5});
  CHECK(destinations(6) == List<Index>{4, 1, 0});  // Node 2 mod 2: the first; 6 mod 2.
  CHECK(destinations(7) == List<Index>{4, 2, 0});
  const Placement far({{0, 3, 4, 5}, {3, 4, 5}}, nodes);
  CHECK(far.destinations(6) == List<Index>{0, 3});
  CHECK(far.destinations(7) == List<Index>{0, 4});
  CHECK(far.destinations(1) == List<Index>{0, 4});
  CHECK(far.destinations(2) == List<Index>{0, 5});
}

TEST_CASE("A token never leaves its rank or node without need", "[parallel][placement]") {
  Rng rng(3);
  for (int round = 0; round < 50; ++round) {
    const Index ranks = 1 + rng.below(9);
    const RankNodes nodes = RankNodes::uniform(ranks, 1 + rng.below(4));
    Lists ranks_of;
    for (Index e = 0; e < 5; ++e) {
      std::set<Index> holders = {rng.below(ranks)};
      for (Index i = rng.below(4); i > 0; --i) holders.insert(rng.below(ranks));
      ranks_of.emplace_back(holders.begin(), holders.end());
    }
    const Placement placement(ranks_of, nodes);
    for (Index e = 0; e < 5; ++e) {
      const std::span<const Index> holders = placement.ranks_of(e);
      for (Index source = 0; source < ranks; ++source) {
        const Index to = placement.destination(e, source);
        CHECK(placement.holds(to, e));
        if (placement.holds(source, e)) CHECK(to == source);
        const bool near = std::any_of(holders.begin(), holders.end(),
                                      [&](Index r) { return nodes.share_node(r, source); });
        CHECK(nodes.share_node(to, source) == near);
      }
    }
  }
}

TEST_CASE("Nodes may have any ranks", "[parallel][placement]") {
  const RankNodes nodes({1, 0, 1, 0, 2});
  CHECK(nodes.ranks() == 5);
  CHECK(nodes.nodes() == 3);
  CHECK(nodes.size(0) == 2);
  CHECK(nodes.size(2) == 1);
  CHECK(nodes.share_node(0, 2));
  CHECK_FALSE(nodes.share_node(0, 1));
  CHECK(RankNodes::single(3) == RankNodes({0, 0, 0}));
  CHECK(RankNodes::uniform(5, 2) == RankNodes({0, 0, 1, 1, 2}));
  CHECK(RankNodes::uniform(2, 8) == RankNodes::single(2));
}

TEST_CASE("Placement and RankNodes say what is wrong", "[parallel][placement]") {
  const auto message = [](auto action) { return test::message_of<ConfigError>(action); };
  const RankNodes nodes = RankNodes::single(2);
  CHECK(message([] { RankNodes::single(0); }) == "RankNodes: ranks = 0, expected >= 1");
  CHECK(message([] { RankNodes::uniform(4, 0); }) ==
        "RankNodes: ranks_per_node = 0, expected >= 1");
  CHECK(message([] { RankNodes(std::vector<Index>{}); }) == "RankNodes: ranks = 0, expected >= 1");
  CHECK(message([] {
          RankNodes({0, 2, 0});
        }) == "RankNodes: node 1 has no rank, expected at least one");
  CHECK(message([] {
          RankNodes({0, -1});
        }) == "RankNodes: the node of rank 1 = -1, expected 0 <= node < ranks = 2");
  CHECK(message([&] { nodes.expect_rank("F", "source", 2); }) ==
        "F: source = 2, expected 0 <= source < ranks = 2");

  CHECK(message([&] { Placement::contiguous(0, nodes); }) ==
        "Placement: experts = 0, expected >= 1");
  CHECK(message([&] { Placement::round_robin(-1, nodes); }) ==
        "Placement: experts = -1, expected >= 1");
  CHECK(message([&] { Placement::from_map({}, nodes); }) ==
        "Placement: experts = 0, expected >= 1");
  CHECK(message([&] {
          Placement::from_map({0, 2}, nodes);
        }) == "Placement: a rank of expert 1 = 2, expected 0 <= rank < ranks = 2");
  CHECK(message([&] {
          Placement({{0}, {}}, nodes);
        }) == "Placement: expert 1 is on no rank, expected at least one");
  CHECK(message([&] {
          Placement({{0, 1, 0}}, nodes);
        }) == "Placement: expert 0 is on rank 0 twice, expected it once");

  const Placement placement = Placement::contiguous(4, nodes);
  CHECK(message([&] { static_cast<void>(placement.with_replica(4, 0)); }) ==
        "Placement::with_replica: expert = 4, expected 0 <= expert < experts = 4");
  CHECK(message([&] { static_cast<void>(placement.with_replica(0, 2)); }) ==
        "Placement::with_replica: rank = 2, expected 0 <= rank < ranks = 2");
  CHECK(message([&] { static_cast<void>(placement.with_replica(0, 0)); }) ==
        "Placement::with_replica: rank 0 already holds expert 0");
  CHECK(message([&] { placement.destinations(-1); }) ==
        "Placement::destinations: source = -1, expected 0 <= source < ranks = 2");
  CHECK(message([&] { placement.expect_experts("ExpertParallel", 5); }) ==
        "ExpertParallel: the placement has 4 experts, expected 5 as routed to");
}

}  // namespace weir::placement_test
