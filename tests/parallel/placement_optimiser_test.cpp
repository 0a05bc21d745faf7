// SPDX-License-Identifier: MIT
#include <algorithm>
#include <numeric>
#include <span>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/parallel/placement_moves.hpp>
#include <weir/parallel/placement_optimiser.hpp>

#include "analysis/traced.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::placement_optimiser_test {

/// Tokens of random experts that come in families: most tokens have experts of one family, which
/// `family_of` tells. Half of the tokens have the first of two families.
RoutedTokens families(Index tokens, Index experts, Index k, Index ranks, std::uint64_t seed,
                      const std::vector<Index>& family_of) {
  Rng rng(seed);
  RoutedTokens routed;
  routed.layer.experts = experts;
  const Index count = *std::max_element(family_of.begin(), family_of.end()) + 1;
  for (Index t = 0; t < tokens; ++t) {
    const Index family = rng.below(2) == 0 ? Index(0) : rng.below(count);
    std::vector<Index> chosen;
    while (static_cast<Index>(chosen.size()) < k) {
      const Index e = rng.below(experts);
      const bool own = family_of[static_cast<std::size_t>(e)] == family;
      if (!own && rng.below(8) != 0) continue;
      if (std::find(chosen.begin(), chosen.end(), e) == chosen.end()) chosen.push_back(e);
    }
    routed.layer.add(chosen);
    routed.source.push_back(t % ranks);
  }
  return routed;
}

Index cost_of(const RoutedTokens& tokens, const Placement& placement, RowsSent sent) {
  const TrafficSummary summary = summarise_traffic(tokens, placement, sent);
  const RowCosts costs;
  return summary.across * costs.across + (summary.total - summary.across) * costs.within;
}

/// The least cost of all placements without replicas that have `slots` experts on each rank.
Index least_cost(const RoutedTokens& tokens, const RankNodes& nodes, Index slots, RowsSent sent) {
  std::vector<Index> rank_of;
  for (Index r = 0; r < nodes.ranks(); ++r) {
    rank_of.insert(rank_of.end(), static_cast<std::size_t>(slots), r);
  }
  Index least = -1;
  do {
    const Index cost = cost_of(tokens, Placement::from_map(rank_of, nodes), sent);
    least = least < 0 ? cost : std::min(least, cost);
  } while (std::next_permutation(rank_of.begin(), rank_of.end()));
  return least;
}

TEST_CASE("The optimiser finds what trying all placements finds", "[parallel][optimiser]") {
  const auto seed = GENERATE(as<std::uint64_t>{}, 1, 2, 3);
  const auto sent = GENERATE(RowsSent::kPerRank, RowsSent::kPerNode);
  const RankNodes nodes = RankNodes::uniform(4, 2);
  const RoutedTokens tokens = families(60, 8, 3, 4, seed, {0, 1, 1, 0, 1, 0, 0, 1});
  const Placement found =
      optimise_placement(tokens, Placement::contiguous(8, nodes), {.sent = sent, .restarts = 30});
  CHECK(cost_of(tokens, found, sent) == least_cost(tokens, nodes, 2, sent));
  CHECK_FALSE(found.has_replicas());
  CHECK(found.most_slots() == 2);
}

TEST_CASE("What the search says a placement costs is what traffic counts",
          "[parallel][optimiser]") {
  Rng rng(5);
  for (const RowsSent sent : {RowsSent::kPerAssignment, RowsSent::kPerRank, RowsSent::kPerNode}) {
    const RankNodes nodes = RankNodes::uniform(5, 2);
    RoutedTokens tokens = families(40, 7, 3, 5, 9, {0, 1, 1, 0, 1, 0, 2});
    for (Index a = 0; a < tokens.layer.expert.count(); a += 7) tokens.layer.kept[a] = 0;
    PlacementSearch search(tokens, Placement::contiguous(7, nodes), sent, {}, 20);
    const auto check = [&] {
      CHECK(search.cost().rows == cost_of(tokens, search.placement(), sent));
      Traffic traffic(nodes, sent);
      traffic.add(tokens.layer, search.placement(), [&](Index t) { return tokens.source[t]; });
      Index excess = 0;
      for (Index r = 0; r < 5; ++r) excess += std::max<Index>(0, traffic.load(r) - 20);
      CHECK(search.cost().excess == excess);
    };
    check();
    for (int step = 0; step < 40; ++step) {
      const Index e = rng.below(7), f = rng.below(7), b = rng.below(5);
      const std::vector<Index> holders = search.ranks_of(e);
      const Index a = holders[static_cast<std::size_t>(rng.below(Index(holders.size())))];
      if (search.holds(b, e)) continue;
      const bool exchange = e != f && search.holds(b, f) && !search.holds(a, f);
      const Index from = !exchange && rng.below(2) == 0 ? Index(-1) : a;
      const Index other = exchange ? f : Index(-1);
      const Placement before = search.placement();
      const PlacementCost cost = search.cost();
      const PlacementCost tried = search.change(e, from, b, other, false);
      CHECK(search.placement() == before);
      CHECK(search.cost() == cost);
      const PlacementCost made = search.change(e, from, b, other, true);
      if (tried.excess <= cost.excess) CHECK(tried == made);
      CHECK(tried.excess == made.excess);
      check();
    }
  }
}

TEST_CASE("Grouping by co-activation saves traffic between nodes, on tokens held out as well",
          "[parallel][optimiser]") {
  std::vector<Index> family_of;
  for (Index e = 0; e < 24; ++e) family_of.push_back(e * 7 % 4);
  const RankNodes nodes = RankNodes::uniform(8, 2);
  const RoutedTokens seen = families(600, 24, 4, 8, 1, family_of);
  const RoutedTokens held_out = families(600, 24, 4, 8, 2, family_of);
  const Placement before = Placement::contiguous(24, nodes);
  const Placement after = optimise_placement(seen, before, {.restarts = 1});
  for (const RoutedTokens* const tokens : {&seen, &held_out}) {
    const PlacementComparison both = compare_placements(*tokens, before, after, RowsSent::kPerNode);
    CHECK(both.across_saved() > 0.2);
    CHECK(both.after.nodes_per_token < both.before.nodes_per_token);
    const RowSizes sizes{.dispatch = 7, .combine = 14};
    CHECK(both.across_bytes_saved(sizes) == 21 * (both.before.across - both.after.across));
    CHECK(both.total_bytes_saved(sizes) == 21 * (both.before.total - both.after.total));
  }
  CHECK(summarise_traffic(seen, co_activated_placement(seen, nodes), RowsSent::kPerNode).across <
        summarise_traffic(seen, before, RowsSent::kPerNode).across);
}

TEST_CASE("Free slots take replicas of hot experts, within the budget", "[parallel][optimiser]") {
  // Expert 0 is in every token.
  Rng rng(3);
  RoutedTokens tokens;
  tokens.layer.experts = 8;
  for (Index t = 0; t < 200; ++t) {
    tokens.layer.add({0, 1 + rng.below(7)});
    tokens.source.push_back(t % 4);
  }
  const RankNodes nodes = RankNodes::uniform(4, 1);
  const Placement start = Placement::contiguous(8, nodes);
  const Placement after =
      optimise_placement(tokens, start, {.sent = RowsSent::kPerAssignment, .slots = 3});
  CHECK(after.replicas(0) == 4);
  for (Index r = 0; r < 4; ++r) CHECK(after.slots(r) <= 3);
  const PlacementComparison both =
      compare_placements(tokens, start, after, RowsSent::kPerAssignment);
  CHECK(both.after.load_imbalance < both.before.load_imbalance);
  CHECK(both.across_saved() > 0.5);

  // Memory for everything: no traffic is left.
  const Placement everywhere = optimise_placement(tokens, start, {.slots = 8, .candidates = 8});
  CHECK(summarise_traffic(tokens, everywhere, RowsSent::kPerNode).total == 0);
}

TEST_CASE("A limit of load comes before traffic", "[parallel][optimiser]") {
  // Experts 0 to 3 go together and are hot.
  Rng rng(4);
  RoutedTokens tokens;
  tokens.layer.experts = 8;
  for (Index t = 0; t < 300; ++t) {
    const Index e = rng.below(4);
    if (t % 3 == 0) tokens.layer.add({4 + e, 4 + (e + 1) % 4});
    if (t % 3 != 0) tokens.layer.add({e, (e + 1) % 4});
    tokens.source.push_back(t % 2);
  }
  const RankNodes nodes = RankNodes::uniform(2, 1);
  const Placement start = Placement::round_robin(8, nodes);
  const auto found = [&](double most_load) {
    return summarise_traffic(tokens, optimise_placement(tokens, start, {.most_load = most_load}),
                             RowsSent::kPerNode);
  };
  const TrafficSummary any = found(0.0), level = found(1.05);
  CHECK(any.load_imbalance > 1.2);
  CHECK(level.load_imbalance <= 1.05);
  CHECK(any.across < level.across);
}

TEST_CASE("The same search gives the same placement, and never a worse one than the start",
          "[parallel][optimiser]") {
  const RankNodes nodes = RankNodes::uniform(3, 2);
  const RoutedTokens tokens = families(80, 7, 2, 3, 6, {0, 1, 1, 0, 1, 0, 2});
  const Placement start = Placement::round_robin(7, nodes);
  const Placement once = optimise_placement(tokens, start, {.seed = 5});
  CHECK(once == optimise_placement(tokens, start, {.seed = 5}));
  CHECK(cost_of(tokens, once, RowsSent::kPerNode) <= cost_of(tokens, start, RowsSent::kPerNode));
  CHECK(optimise_placement(tokens, once, {.restarts = 0}).most_slots() <= once.most_slots());

  // Nothing to go by, or nowhere to go.
  RoutedTokens none;
  none.layer.experts = 7;
  CHECK(optimise_placement(none, start) == start);
  CHECK(summarise_traffic(none, start, RowsSent::kPerRank).nodes_per_token == 0.0);
  CHECK(compare_placements(none, start, start, RowsSent::kPerRank).across_saved() == 0.0);
  const Placement one = Placement::contiguous(1, RankNodes::single(1));
  CHECK(optimise_placement(families(5, 1, 1, 1, 1, {0}), one) == one);
}

TEST_CASE("Moves turn one placement into another", "[parallel][optimiser]") {
  const RankNodes nodes = RankNodes::uniform(4, 2);
  const Placement before({{0}, {1, 2}, {3}}, nodes);
  const Placement after({{1}, {1, 3}, {3, 0}}, nodes);
  const PlacementMoves moves = placement_moves(before, after);
  CHECK(moves.copies == std::vector<ExpertCopy>{{0, 0, 1}, {1, 2, 3}, {2, 3, 0}});
  CHECK(moves.drops == std::vector<ExpertDrop>{{0, 0}, {1, 2}});
  CHECK(moves.across(nodes) == 1);
  CHECK(placement_moves(after, after).copies.empty());
  CHECK(placement_moves(after, after).drops.empty());
  CHECK(test::message_of<ConfigError>(
            [&] { placement_moves(before, Placement::contiguous(4, nodes)); }) ==
        "placement_moves: after has 4 experts on 4 ranks of 2 nodes, expected those of before: 3 "
        "on 4 of 2");
}

TEST_CASE("Sequences of a trace go to ranks in turn, and some are held out",
          "[parallel][optimiser]") {
  const TracedTokens tokens = test::random_tokens(7, 3, 6, 2, 1);
  const HeldOut parts = hold_out(7, 3);
  CHECK(parts.held == std::vector<Index>{2, 5});
  CHECK(parts.rest == std::vector<Index>{0, 1, 3, 4, 6});
  const RoutedTokens rest = routed_tokens(tokens, tokens.layers[0], parts.rest, 2);
  CHECK(rest.source == List<Index>{0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0});
  for (Index t = 0; t < 3; ++t) {  // Of sequence 3, which is the third of the rest.
    const std::span<const Index> here = rest.layer.experts_of(6 + t);
    const std::span<const Index> there = tokens.layers[0].experts_of(9 + t);
    CHECK(std::equal(here.begin(), here.end(), there.begin(), there.end()));
  }
  TracedTokens unseen = tokens;
  unseen.layers[0].recorded[0] = 0;
  CHECK(routed_tokens(unseen, unseen.layers[0], parts.rest, 2).tokens() == 14);
}

TEST_CASE("The optimiser says what is wrong", "[parallel][optimiser]") {
  const RankNodes nodes = RankNodes::uniform(2, 1);
  const Placement start = Placement::contiguous(5, nodes);
  RoutedTokens tokens = families(4, 5, 2, 2, 1, {0, 0, 0, 0, 0});
  const auto message = [&](const PlacementOptimiserConfig& config) {
    return test::message_of<ConfigError>([&] { optimise_placement(tokens, start, config); });
  };
  CHECK(message({.slots = 2}) ==
        "optimise_placement: slots = 2, expected >= 3, those of the fullest rank at the start");
  CHECK(message({.most_load = 0.5}) ==
        "optimise_placement: most_load = 0.5, expected a finite number >= 1");
  CHECK(message({.candidates = 0}) == "optimise_placement: candidates = 0, expected >= 1");
  CHECK(message({.restarts = -1}) == "optimise_placement: restarts = -1, expected >= 0");
  CHECK(message({.costs = {.across = -1}}) ==
        "optimise_placement: costs.across = -1, expected >= 0");
  CHECK(message({.costs = {.within = -1}}) ==
        "optimise_placement: costs.within = -1, expected >= 0");
  tokens.source[3] = 2;
  CHECK(message({}) ==
        "optimise_placement: the source of token 3 = 2, expected 0 <= source < ranks = 2");
  tokens.source.resize(3);
  CHECK(message({}) == "optimise_placement: there are 3 sources, expected 4, one for each token");
  tokens.layer.expert[1] = 5;
  CHECK(message({}) == "optimise_placement: a token has expert 5, expected an expert < 5");
  tokens.layer.experts = 6;
  CHECK(message({}) ==
        "optimise_placement: the tokens are of 6 experts, expected 5, those of the placement");
  CHECK(test::message_of<ConfigError>([] { hold_out(4, 1); }) ==
        "hold_out: every = 1, expected >= 2");
  CHECK(test::message_of<ConfigError>([&] { routed_tokens({}, {}, {}, 0); }) ==
        "routed_tokens: ranks = 0, expected >= 1");
}

}  // namespace weir::placement_optimiser_test
