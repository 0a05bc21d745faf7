// SPDX-License-Identifier: MIT
#include <vector>

#include <weir/moe/balance/communication_loss.hpp>
#include <weir/moe/balance/device_loss.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/parallel/placement_groups.hpp>
#include <weir/parallel/traffic.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::placement_groups_test {
using test::gradient_of;
using test::loss_of;
using test::route;

/// Tokens in turn from all ranks.
Traffic count(const Routing<double>& routing, const Placement& placement, RowsSent sent) {
  Traffic traffic(placement.nodes(), sent);
  traffic.add(routing, placement, [&](Index t) { return t % placement.ranks(); });
  return traffic;
}

TEST_CASE("Groups of a placement are what balancers and selectors count by",
          "[parallel][placement_groups]") {
  const Placement placement = Placement::contiguous(8, RankNodes::uniform(4, 2));
  const ExpertGroups ranks = rank_groups(placement);
  const ExpertGroups nodes = node_groups(placement);
  CHECK(ranks.count() == 4);
  CHECK(nodes.count() == 2);
  for (Index e = 0; e < 8; ++e) {
    CHECK(ranks.group_of(e) == e / 2);
    CHECK(nodes.group_of(e) == e / 4);
  }
  CHECK(limit_to_ranks(placement, 3) == GroupLimit{.count = 4, .allowed = 3, .summed = 1});
  CHECK(limit_to_nodes(placement, 1, 2) == GroupLimit{.count = 2, .allowed = 1, .summed = 2});
  // Within a node, experts may be anywhere and have replicas, and nodes come in any order.
  const Placement mixed({{3}, {2}, {2, 3}, {3}, {0, 1}, {1}, {0}, {0}}, RankNodes::uniform(4, 2));
  CHECK(limit_to_nodes(mixed, 1) == GroupLimit{.count = 2, .allowed = 1, .summed = 1});
  CHECK(node_groups(mixed).group_of(0) == 1);
}

TEST_CASE("Limited selection bounds the nodes and ranks of each token, as traffic counts them",
          "[parallel][placement_groups]") {
  // DeepSeek-V3's shape at a quarter: 64 experts, 8 nodes of 2 ranks, 4 nodes for a token.
  const Placement placement = Placement::contiguous(64, RankNodes::uniform(16, 2));
  const Matrix<double> logits = 3.0 * test::random_matrix(300, 64, 11);
  const auto routed = [&](const GroupLimit& groups) {
    return route(SoftmaxTopK<double>({.k = 8, .groups = groups}), logits);
  };
  const auto nodes = count(routed(limit_to_nodes(placement, 4, 2)), placement, RowsSent::kPerNode);
  CHECK(nodes.most_nodes() == 4);
  // Each token crosses to 4 nodes at most, of which its own may be one.
  CHECK(nodes.across() <= 4 * 300);
  const auto free = count(routed({}), placement, RowsSent::kPerNode);
  CHECK(free.most_nodes() > 4);
  CHECK(nodes.across() < free.across());

  const auto ranks = count(routed(limit_to_ranks(placement, 3)), placement, RowsSent::kPerRank);
  CHECK(ranks.most_nodes() <= 3);
  CHECK(ranks.total() <= 3 * 300);
  CHECK(ranks.total() < count(routed({}), placement, RowsSent::kPerRank).total());
}

TEST_CASE("The losses of DeepSeek-V2 are made of counted traffic and load",
          "[parallel][placement_groups]") {
  const Placement placement =
      Placement::by_groups(ExpertGroups({0, 1, 0, 2, 2, 1, 0, 2, 2}), RankNodes::uniform(3, 1));
  const ExpertGroups devices = rank_groups(placement);
  const Index tokens = 40, k = 3, m = 2;
  const Routing<double> routing =
      route(SoftmaxTopK<double>({.k = k}), test::random_matrix(tokens, 9, 5));
  const Traffic traffic = count(routing, placement, RowsSent::kPerRank);
  double communication = 0.0, device = 0.0;
  for (Index r = 0; r < 3; ++r) {
    double p = 0.0;  // P'_i = P''_i
    for (const Index e : placement.experts_on(r)) p += routing.probabilities.col(e).mean();
    // f''_i = D / (M T) |tokens sent to i|; f'_i = mean of experts / (k T) assignments.
    communication +=
        p * 3.0 / static_cast<double>(m * tokens) * static_cast<double>(traffic.arrived(r));
    device += p * 9.0 / static_cast<double>(k * tokens) * static_cast<double>(traffic.load(r)) /
              static_cast<double>(placement.slots(r));
  }
  CHECK(loss_of(CommunicationLoss<double>(
                    devices, {.devices_per_token = m, .coefficient = 1.0, .scope = Scope::kBatch}),
                routing) == Approx(communication));
  CHECK(loss_of(DeviceLoss<double>(devices, {.coefficient = 1.0, .scope = Scope::kBatch}),
                routing) == Approx(device));
}

TEST_CASE("A router that learns from the losses of DeepSeek-V2 levels counted traffic and load",
          "[parallel][placement_groups]") {
  const Placement placement = Placement::contiguous(16, RankNodes::uniform(4, 1));
  const Index tokens = 256, d = 8;
  Matrix<double> x = test::random_matrix(tokens, d, 3);
  x.col(0).setOnes();
  Matrix<double> start = 0.3 * test::random_matrix(16, d, 4);
  for (Index e = 0; e < 4; ++e) start(e, 0) += 1.0;  // Everybody likes rank 0.
  const SoftmaxTopK<double> selector({.k = 3, .groups = limit_to_ranks(placement, 2)});

  const auto learn = [&](const auto& loss, auto&& imbalance) {
    Matrix<double> w = start;
    std::vector<double> losses, imbalances;
    for (int step = 0; step <= 120; ++step) {
      Routing<double> routing;
      SoftmaxTopK<double>::Cache cache;
      selector.forward(x * w.transpose(), {}, routing, cache);
      if (step % 40 == 0) {
        losses.push_back(loss_of(loss, routing));
        imbalances.push_back(imbalance(count(routing, placement, RowsSent::kPerRank)));
      }
      RoutingGradient<double> gradient = gradient_of(loss, routing);
      selector.backward(routing, gradient, cache);
      w -= 2.0 * gradient.logits.transpose() * x;
    }
    CHECK(losses.back() < 0.95 * losses.front());
    CHECK(losses.back() == Approx(1.0).margin(0.02));
    CHECK(imbalances.front() > 1.5);
    CHECK(imbalances.back() < 1.15);
  };
  const ExpertGroups devices = rank_groups(placement);
  learn(CommunicationLoss<double>(
            devices, {.devices_per_token = 2, .coefficient = 1.0, .scope = Scope::kBatch}),
        [](const Traffic& traffic) { return traffic.arrived_imbalance(); });
  learn(DeviceLoss<double>(devices, {.coefficient = 1.0, .scope = Scope::kBatch}),
        [](const Traffic& traffic) { return traffic.load_imbalance(); });
}

TEST_CASE("Groups of a placement say what is wrong", "[parallel][placement_groups]") {
  const auto message = [](auto action) { return test::message_of<ConfigError>(action); };
  const RankNodes nodes = RankNodes::uniform(4, 2);
  const Placement even = Placement::contiguous(8, nodes);
  CHECK(message([&] { rank_groups(even.with_replica(2, 0)); }) ==
        "rank_groups: expert 2 is on ranks 0 and 1, expected it on one");
  CHECK(message([&] { node_groups(even.with_replica(2, 3)); }) ==
        "node_groups: expert 2 is on nodes 0 and 1, expected it on one");
  CHECK(message([&] { rank_groups(Placement::contiguous(3, nodes)); }) ==
        "rank_groups: rank 0 has no expert, expected at least one");
  CHECK(message([&] { limit_to_ranks(Placement::contiguous(9, nodes), 1); }) ==
        "limit_to_ranks: the placement has 9 experts on 4 ranks, expected as many on each");
  CHECK(message([&] { limit_to_ranks(Placement::round_robin(8, nodes), 1); }) ==
        "limit_to_ranks: expert 1 is on rank 1, expected it on rank 0 as expert 0: groups are 2 "
        "neighbours each");
  CHECK(message([&] {
          limit_to_nodes(Placement::from_map({0, 0, 0, 2}, nodes), 1);
        }) ==
        "limit_to_nodes: expert 3 is on node 1, expected it on node 0 as expert 2: groups are 2 "
        "neighbours each");
  CHECK(message([&] { limit_to_nodes(even, 3); }) ==
        "limit_to_nodes: groups.allowed = 3, expected 1 <= allowed <= groups.count = 2");
  CHECK(message([&] { limit_to_nodes(even, 1, 5); }) ==
        "limit_to_nodes: groups.summed = 5, expected 1 <= summed <= experts / groups.count = 4");
}

}  // namespace weir::placement_groups_test
