// SPDX-License-Identifier: MIT
#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/random.hpp>
#include <weir/parallel/traffic.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::traffic_test {

/// Tokens with these experts.
TracedLayer layer_of(Index experts, const std::vector<std::vector<Index>>& tokens) {
  TracedLayer layer{.name = "moe", .experts = experts};
  for (const std::vector<Index>& token : tokens) layer.add(token);
  return layer;
}

Traffic count(const TracedLayer& layer, const Placement& placement, RowsSent sent,
              const std::vector<Index>& sources) {
  Traffic traffic(placement.nodes(), sent);
  traffic.add(layer, placement, [&](Index t) { return sources[static_cast<std::size_t>(t)]; });
  return traffic;
}

TEST_CASE("Traffic counts rows worked out by hand", "[parallel][traffic]") {
  // Two nodes of two ranks; experts 0 1 | 2 3 || 4 5 | 6 7.
  const Placement placement = Placement::contiguous(8, RankNodes::uniform(4, 2));
  TracedLayer layer = layer_of(8, {{0, 1, 2}, {4, 6, 7}, {7, 5, 0}, {6}});
  layer.kept[9] = 0;  // The last token's only assignment.
  const std::vector<Index> sources = {0, 1, 2, 0};

  const Traffic each = count(layer, placement, RowsSent::kPerAssignment, sources);
  CHECK(each.rows(0, 0) == 2);
  CHECK(each.rows(0, 1) == 1);
  CHECK(each.rows(1, 2) == 1);
  CHECK(each.rows(1, 3) == 2);
  CHECK(each.rows(2, 3) == 1);
  CHECK(each.rows(2, 2) == 1);
  CHECK(each.rows(2, 0) == 1);
  CHECK(each.total() == 6);
  CHECK(each.across() == 4);
  CHECK(each.sent(1) == 3);
  CHECK(each.sent_across(1) == 3);
  CHECK(each.received(3) == 3);
  CHECK(each.received_across(3) == 2);
  CHECK(each.arrived(0) == 3);
  CHECK(each.load(0) == 3);
  CHECK(each.load_imbalance() == Approx(3.0 * 4.0 / 9.0));
  const RowSizes sizes{.dispatch = 10, .combine = 3};
  CHECK(each.total_bytes(sizes) == 6 * 13);
  CHECK(each.across_bytes(sizes) == 4 * 13);
  CHECK(each.bytes_out(2, sizes) == 2 * 10 + 1 * 3);
  CHECK(each.bytes_out_across(2, sizes) == 1 * 10 + 1 * 3);

  const Traffic by_rank = count(layer, placement, RowsSent::kPerRank, sources);
  CHECK(by_rank.rows(0, 0) == 1);
  CHECK(by_rank.rows(1, 3) == 1);
  CHECK(by_rank.total() == 5);
  CHECK(by_rank.across() == 3);
  CHECK(by_rank.load(0) == 3);
  CHECK(by_rank.arrived_imbalance() == Approx(2.0 * 4.0 / 7.0));

  // Token 1 goes from rank 1 to rank 3, which has its place in the other node, and on to rank 2.
  const Traffic by_node = count(layer, placement, RowsSent::kPerNode, sources);
  CHECK(by_node.rows(1, 2) == 0);
  CHECK(by_node.rows(1, 3) == 1);
  CHECK(by_node.rows(3, 2) == 1);
  CHECK(by_node.rows(3, 3) == 0);
  CHECK(by_node.across() == 2);
  CHECK(by_node.tokens_on_nodes(0) == 1);
  CHECK(by_node.tokens_on_nodes(1) == 2);
  CHECK(by_node.tokens_on_nodes(2) == 1);
  CHECK(by_node.most_nodes() == 2);
}

TEST_CASE("Traffic is what sets of ranks and nodes say", "[parallel][traffic]") {
  Rng rng(7);
  for (int round = 0; round < 30; ++round) {
    const Index ranks = 1 + rng.below(7), experts = 1 + rng.below(9);
    const RankNodes nodes = RankNodes::uniform(ranks, 1 + rng.below(3));
    std::vector<std::vector<Index>> ranks_of;
    for (Index e = 0; e < experts; ++e) {
      std::set<Index> holders = {rng.below(ranks), rng.below(ranks)};
      ranks_of.emplace_back(holders.begin(), holders.end());
    }
    const Placement placement(ranks_of, nodes);
    std::vector<std::vector<Index>> tokens;
    std::vector<Index> sources;
    for (int t = 0; t < 20; ++t) {
      std::set<Index> chosen;
      for (Index i = rng.below(5); i > 0; --i) chosen.insert(rng.below(experts));
      tokens.emplace_back(chosen.begin(), chosen.end());
      sources.push_back(rng.below(ranks));
    }
    const TracedLayer layer = layer_of(experts, tokens);
    Index assignments = 0, by_rank = 0, across_by_rank = 0, across_by_node = 0, most_nodes = 0;
    std::map<std::pair<Index, Index>, Index> rows;
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      const Index source = sources[t];
      std::set<Index> to, to_nodes;
      for (const Index e : tokens[t]) {
        const Index r = placement.destination(e, source);
        if (r != source) ++assignments;
        ++rows[{source, r}];
        to.insert(r);
        to_nodes.insert(nodes.node_of(r));
      }
      most_nodes = std::max(most_nodes, static_cast<Index>(to_nodes.size()));
      to.erase(source);
      by_rank += static_cast<Index>(to.size());
      for (const Index r : to) across_by_rank += nodes.share_node(source, r) ? 0 : 1;
      to_nodes.erase(nodes.node_of(source));
      across_by_node += static_cast<Index>(to_nodes.size());
    }
    const Traffic each = count(layer, placement, RowsSent::kPerAssignment, sources);
    CHECK(each.total() == assignments);
    Index load = 0;
    for (Index a = 0; a < ranks; ++a) {
      load += each.load(a);
      for (Index b = 0; b < ranks; ++b) {
        CHECK(each.rows(a, b) == (rows.count({a, b}) == 0 ? 0 : rows[{a, b}]));
      }
    }
    CHECK(load == layer.expert.count());
    CHECK(each.most_nodes() == most_nodes);
    const Traffic ranks_once = count(layer, placement, RowsSent::kPerRank, sources);
    CHECK(ranks_once.total() == by_rank);
    CHECK(ranks_once.across() == across_by_rank);
    const Traffic nodes_once = count(layer, placement, RowsSent::kPerNode, sources);
    CHECK(nodes_once.across() == across_by_node);
    for (Index r = 0; r < ranks; ++r) {
      CHECK(nodes_once.load(r) == each.load(r));
      CHECK(ranks_once.load(r) == each.load(r));
      // Whoever gets a token by a detour gets it once.
      CHECK(nodes_once.arrived(r) >= ranks_once.arrived(r));
    }
  }
}

TEST_CASE("No tokens, or tokens of one rank, are no traffic", "[parallel][traffic]") {
  const Placement one = Placement::contiguous(3, RankNodes::single(1));
  const TracedLayer layer = layer_of(3, {{0, 1}, {2}});
  for (const RowsSent sent : {RowsSent::kPerAssignment, RowsSent::kPerRank, RowsSent::kPerNode}) {
    const Traffic own = count(layer, one, sent, {0, 0});
    CHECK(own.total() == 0);
    CHECK(own.load(0) == 3);
    CHECK(own.load_imbalance() == 1.0);
    const Placement two = Placement::contiguous(3, RankNodes::uniform(2, 1));
    const Traffic none = count(layer_of(3, {}), two, sent, {});
    CHECK(none.total() == 0);
    CHECK(none.load_imbalance() == 0.0);
    CHECK(none.most_nodes() == 0);
  }
}

TEST_CASE("Traffic says what is wrong, and has counted nothing then", "[parallel][traffic]") {
  const auto message = [](auto action) { return test::message_of<ConfigError>(action); };
  const Placement placement = Placement::contiguous(4, RankNodes::uniform(2, 1));
  Traffic traffic(placement.nodes(), RowsSent::kPerAssignment);
  CHECK(message([&] {
          traffic.add(layer_of(5, {{0, 3}, {4}}), placement, 0);
        }) == "Traffic: a token has expert 4, expected an expert < 4, those of the placement");
  CHECK(message([&] {
          traffic.add(layer_of(4, {{0, 3}}), placement, 2);
        }) == "Traffic: source = 2, expected 0 <= source < ranks = 2");
  CHECK(message([&] {
          traffic.add(layer_of(4, {{0}}), Placement::contiguous(4, RankNodes::single(2)), 0);
        }) ==
        "Traffic: the placement has 2 ranks on 1 nodes, expected those of the traffic: 2 on 2");
  CHECK(traffic.load(0) + traffic.load(1) == 0);
}

}  // namespace weir::traffic_test
