// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdint>
#include <vector>

#include <weir/moe/capacity/overflow.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

using namespace weir;

namespace {

using Kept = std::vector<std::uint8_t>;

constexpr DropOrder kOrders[] = {DropOrder::kRankMajor, DropOrder::kTokenMajor,
                                 DropOrder::kProbability};

/// Four tokens, three experts, k = 2. Expert 0 is chosen four times, expert 1 three times.
Routing<double> small_routing() {
  Routing<double> routing;
  routing.begin("Test", Matrix<double>::Zero(4, 3), {});
  routing.assign_each(2);
  routing.expert = {0, 1, 1, 0, 0, 2, 0, 1};
  routing.weight = {0.6, 0.4, 0.9, 0.1, 0.7, 0.3, 0.8, 0.2};
  return routing;
}

Kept kept_of(Routing<double> routing, Index capacity, DropOrder order) {
  drop_overflow(routing, 0, routing.tokens(), capacity, order);
  return routing.kept;
}

}  // namespace

TEST_CASE("drop_overflow matches orders worked out by hand", "[moe][overflow]") {
  const Routing<double> routing = small_routing();
  SECTION("rank-major") {
    // First choices: expert 0 takes tokens 0 and 2, not 3; expert 1 takes 1. Second choices: expert
    // 1 takes 0, not 3; expert 0 is full for 1; expert 2 takes 2.
    CHECK(kept_of(routing, 2, DropOrder::kRankMajor) == Kept{1, 1, 1, 0, 1, 1, 0, 0});
    CHECK(kept_of(routing, 1, DropOrder::kRankMajor) == Kept{1, 0, 1, 0, 0, 1, 0, 0});
  }
  SECTION("token-major") {
    // Tokens 0 and 1 fill experts 0 and 1.
    CHECK(kept_of(routing, 2, DropOrder::kTokenMajor) == Kept{1, 1, 1, 1, 0, 1, 0, 0});
    CHECK(kept_of(routing, 1, DropOrder::kTokenMajor) == Kept{1, 1, 0, 0, 0, 1, 0, 0});
  }
  SECTION("probability") {
    // Expert 0: 0.8 and 0.7 of 0.6, 0.1, 0.7, 0.8. Expert 1: 0.9 and 0.4 of 0.4, 0.9, 0.2.
    CHECK(kept_of(routing, 2, DropOrder::kProbability) == Kept{0, 1, 1, 0, 1, 1, 1, 0});
    CHECK(kept_of(routing, 1, DropOrder::kProbability) == Kept{0, 0, 1, 0, 0, 1, 1, 0});
  }
}

TEST_CASE("drop_overflow by probability prefers the earlier token among equals",
          "[moe][overflow]") {
  Routing<double> routing = small_routing();
  routing.weight = {0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.75, 0.25};
  // Expert 0: token 3, then of 0, 1 and 2 the first. Expert 1: tokens 0 and 1.
  CHECK(kept_of(routing, 2, DropOrder::kProbability) == Kept{1, 1, 1, 0, 0, 1, 1, 0});
}

TEST_CASE("drop_overflow knows the extremes", "[moe][overflow]") {
  for (const DropOrder order : kOrders) {
    CHECK(kept_of(small_routing(), 0, order) == Kept(8, 0));
    CHECK(kept_of(small_routing(), 4, order) == Kept(8, 1));
    Routing<double> none;
    none.begin("Test", Matrix<double>::Zero(0, 3), {});
    CHECK(kept_of(none, 1, order).empty());
  }
}

TEST_CASE("drop_overflow leaves the tokens of other groups alone", "[moe][overflow]") {
  for (const DropOrder order : kOrders) {
    Routing<double> routing = small_routing();
    drop_overflow(routing, 1, 3, 1, order);  // Experts 1, 0 and 0, 2.
    CHECK(routing.kept[0] + routing.kept[1] + routing.kept[6] + routing.kept[7] == 4);
    // Both tokens want expert 0: as second choice with 0.1, as first with 0.7.
    const bool earlier = order == DropOrder::kTokenMajor;
    CHECK(routing.kept[3] == (earlier ? 1 : 0));
    CHECK(routing.kept[4] == (earlier ? 0 : 1));
    CHECK(routing.kept[2] + routing.kept[5] == 2);
  }
}

TEST_CASE("drop_overflow gives no place to what was dropped before", "[moe][overflow]") {
  Routing<double> routing = small_routing();
  routing.kept[0] = 0;
  CHECK(kept_of(routing, 2, DropOrder::kRankMajor) == Kept{0, 1, 1, 0, 1, 1, 1, 0});
  CHECK(kept_of(routing, 2, DropOrder::kTokenMajor) == Kept{0, 1, 1, 1, 1, 1, 0, 0});
  routing = small_routing();
  routing.kept[6] = 0;
  CHECK(kept_of(routing, 2, DropOrder::kProbability) == Kept{1, 1, 1, 0, 1, 1, 0, 0});
}

TEST_CASE("drop_overflow serves tokens with different numbers of choices", "[moe][overflow]") {
  // Tokens with the experts (1, 0), (), (0), (2, 1, 0).
  Routing<double> routing;
  routing.begin("Test", Matrix<double>::Zero(4, 3), {});
  routing.offsets = {0, 2, 2, 3, 6};
  routing.expert = {1, 0, 0, 2, 1, 0};
  routing.weight = {0.6, 0.4, 1.0, 0.5, 0.3, 0.2};
  routing.kept.assign(6, 1);
  CHECK(kept_of(routing, 1, DropOrder::kRankMajor) == Kept{1, 0, 1, 1, 0, 0});
  CHECK(kept_of(routing, 1, DropOrder::kTokenMajor) == Kept{1, 1, 0, 1, 0, 0});
  CHECK(kept_of(routing, 2, DropOrder::kRankMajor) == Kept{1, 1, 1, 1, 1, 0});
}

TEST_CASE("drop_overflow keeps exactly as many as an expert can take", "[moe][overflow]") {
  Rng rng(1);
  for (int trial = 0; trial < 300; ++trial) {
    const Index tokens = rng.below(30);
    const Index experts = 1 + rng.below(6);
    const Index k = 1 + rng.below(experts);
    const Index capacity = rng.below(8);
    Routing<double> chosen;
    TopKSoftmax<double>{k}.select(normal_init<double>(tokens, experts, 1.0, rng), {}, chosen);
    RowVector<double> wanted = RowVector<double>::Zero(experts);
    chosen.add_load(0, tokens, wanted);

    for (const DropOrder order : kOrders) {
      Routing<double> routing = chosen;
      drop_overflow(routing, 0, tokens, capacity, order);
      RowVector<double> taken = RowVector<double>::Zero(experts);
      for (std::size_t a = 0; a < routing.expert.size(); ++a) {
        if (routing.kept[a] != 0) taken[routing.expert[a]] += 1.0;
      }
      REQUIRE(taken == wanted.cwiseMin(static_cast<double>(capacity)));
      REQUIRE(routing.expert == chosen.expert);
      REQUIRE(routing.weight == chosen.weight);
    }
  }
}
