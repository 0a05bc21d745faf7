// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include <weir/moe/capacity/overflow.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::overflow_test {

namespace {

using Kept = std::vector<std::uint8_t>;

constexpr DropOrder kOrders[] = {DropOrder::kRankMajor,           DropOrder::kTokenMajor,
                                 DropOrder::kProbability,         DropOrder::kBatchPrioritised,
                                 DropOrder::kBatchPrioritisedSum, DropOrder::kRandom};

/// Four tokens, three experts, k = 2. Expert 0 is chosen four times, expert 1 three times.
Routing<double> small_routing() {
  Routing<double> routing;
  routing.begin("Test", Matrix<double>::Zero(4, 3), {});
  routing.assign_each(2);
  routing.expert = {0, 1, 1, 0, 0, 2, 0, 1};
  routing.weight = {0.6, 0.4, 0.9, 0.1, 0.7, 0.3, 0.8, 0.2};
  routing.probabilities << 0.60, 0.15, 0.25,  // Sum of the two chosen: 0.75.
      0.10, 0.75, 0.15,                       // 0.85
      0.62, 0.01, 0.37,                       // 0.99
      0.70, 0.10, 0.20;                       // 0.80
  return routing;
}

/// A pass in training, with a generator.
Pass drawing(Rng& rng) {
  return {.training = true, .rng = &rng};
}

Kept kept_of(Routing<double> routing, Index capacity, DropOrder order, const Pass& pass = {}) {
  OverflowSpace<double> space;
  drop_overflow(pass, routing, 0, routing.tokens(), capacity, order, space);
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

TEST_CASE("drop_overflow serves the tokens with the largest probability first", "[moe][overflow]") {
  // The tokens in the order 1, 3, 2, 0. First choices: expert 1 takes 1, expert 0 takes 3, then 2.
  // Second ones: expert 0 is full for 1, expert 1 takes 3, expert 2 takes 2, expert 1 is full for
  // 0.
  const Routing<double> routing = small_routing();
  CHECK(kept_of(routing, 2, DropOrder::kBatchPrioritised) == Kept{0, 0, 1, 0, 1, 1, 1, 1});
  CHECK(kept_of(routing, 1, DropOrder::kBatchPrioritised) == Kept{0, 0, 1, 0, 0, 1, 1, 0});
  // By the sum: 2, 1, 3, 0. With one place, expert 0 is token 2's.
  CHECK(kept_of(routing, 2, DropOrder::kBatchPrioritisedSum) == Kept{0, 0, 1, 0, 1, 1, 1, 1});
  CHECK(kept_of(routing, 1, DropOrder::kBatchPrioritisedSum) == Kept{0, 0, 1, 0, 1, 1, 0, 0});
}

TEST_CASE("drop_overflow by priority prefers the earlier token among equals", "[moe][overflow]") {
  Routing<double> routing = small_routing();
  routing.probabilities.setConstant(1.0 / 3.0);
  for (const DropOrder order : {DropOrder::kBatchPrioritised, DropOrder::kBatchPrioritisedSum}) {
    for (Index capacity = 0; capacity < 5; ++capacity) {
      CHECK(kept_of(routing, capacity, order) == kept_of(routing, capacity, DropOrder::kRankMajor));
    }
  }
}

TEST_CASE("drop_overflow at random is the same for a seed and another from pass to pass",
          "[moe][overflow]") {
  Routing<double> routing;
  routing.begin("Test", Matrix<double>::Zero(64, 1), {});
  routing.assign_each(1);
  Rng first(7), second(7);
  const Kept once = kept_of(routing, 32, DropOrder::kRandom, drawing(first));
  CHECK(once == kept_of(routing, 32, DropOrder::kRandom, drawing(second)));
  CHECK(first.position() == second.position());
  const Kept again = kept_of(routing, 32, DropOrder::kRandom, drawing(first));
  CHECK(again != once);
  CHECK(again == kept_of(routing, 32, DropOrder::kRandom, drawing(second)));
}

TEST_CASE("drop_overflow at random gives every assignment the same chance", "[moe][overflow]") {
  // Expert 0 has four assignments for two places; expert 1 three for two; expert 2 is not full.
  Rng rng(3);
  const Routing<double> routing = small_routing();
  constexpr int kTrials = 4000;
  std::vector<double> share(8, 0.0);
  for (int trial = 0; trial < kTrials; ++trial) {
    const Kept kept = kept_of(routing, 2, DropOrder::kRandom, drawing(rng));
    for (std::size_t a = 0; a < kept.size(); ++a) share[a] += kept[a] / double{kTrials};
  }
  // Four standard deviations are 0.032.
  for (const std::size_t a : {0U, 3U, 4U, 6U}) CHECK(std::abs(share[a] - 1.0 / 2.0) < 0.032);
  for (const std::size_t a : {1U, 2U, 7U}) CHECK(std::abs(share[a] - 2.0 / 3.0) < 0.032);
  CHECK(share[5] == Approx(1.0));
}

TEST_CASE("drop_overflow at random needs a generator, in training only", "[moe][overflow]") {
  Routing<double> routing = small_routing();
  CHECK(kept_of(routing, 1, DropOrder::kRandom) == kept_of(routing, 1, DropOrder::kRankMajor));
  OverflowSpace<double> space;
  CHECK(test::message_of<ConfigError>([&] {
          drop_overflow(kTraining, routing, 0, routing.tokens(), 1, DropOrder::kRandom, space);
        }) == "DropOrder::kRandom: pass.rng = null, expected a generator in training");
  CHECK(routing.kept == Kept(8, 1));
}

TEST_CASE("for_each_capacity_group cuts each group of its scope", "[moe][overflow]") {
  using Ranges = std::vector<std::pair<Index, Index>>;
  const Sequences lengths({5, 0, 3});
  Routing<double> routing;
  Pass pass;
  pass.sequences = &lengths;
  routing.begin("Test", Matrix<double>::Zero(8, 2), pass);
  const auto ranges = [&](Scope scope, Index group_size) {
    Ranges all;
    for_each_capacity_group(routing.rows, scope, group_size,
                            [&](Index begin, Index end) { all.emplace_back(begin, end); });
    return all;
  };
  CHECK(ranges(Scope::kBatch, 0) == Ranges{{0, 8}});
  CHECK(ranges(Scope::kBatch, 3) == Ranges{{0, 3}, {3, 6}, {6, 8}});
  CHECK(ranges(Scope::kBatch, 4) == Ranges{{0, 4}, {4, 8}});
  CHECK(ranges(Scope::kBatch, 100) == Ranges{{0, 8}});
  CHECK(ranges(Scope::kSequence, 0) == Ranges{{0, 5}, {5, 5}, {5, 8}});
  CHECK(ranges(Scope::kSequence, 3) == Ranges{{0, 3}, {3, 5}, {5, 8}});
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
    OverflowSpace<double> space;
    // Experts 1, 0 and 0, 2. Not in training: random is rank-major.
    drop_overflow({}, routing, 1, 3, 1, order, space);
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
  CHECK(kept_of(routing, 2, DropOrder::kBatchPrioritised) == Kept{0, 0, 1, 0, 1, 1, 1, 1});
  Rng rng(1);
  CHECK(kept_of(routing, 3, DropOrder::kRandom, drawing(rng)) == Kept{0, 1, 1, 1, 1, 1, 1, 1});
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
  routing.probabilities.setConstant(1.0 / 3.0);
  CHECK(kept_of(routing, 1, DropOrder::kBatchPrioritised) == Kept{1, 0, 1, 1, 0, 0});
  // By the sum, token 3 (1), token 0 (2/3), token 2 (1/3).
  CHECK(kept_of(routing, 1, DropOrder::kBatchPrioritisedSum) == Kept{1, 0, 1, 1, 0, 0});
  CHECK(kept_of(routing, 2, DropOrder::kBatchPrioritisedSum) == Kept{1, 1, 1, 1, 1, 0});
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
    const Routing<double> chosen =
        test::route(TopKSoftmax<double>({.k = k}), normal_init<double>(tokens, experts, 1.0, rng));
    RowVector<double> wanted = RowVector<double>::Zero(experts);
    chosen.add_load(0, tokens, wanted);

    for (const DropOrder order : kOrders) {
      Routing<double> routing = chosen;
      OverflowSpace<double> space;
      drop_overflow(drawing(rng), routing, 0, tokens, capacity, order, space);
      RowVector<double> taken = RowVector<double>::Zero(experts);
      for (Index a = 0; a < routing.assignments(); ++a) {
        if (routing.kept[a] != 0) taken[routing.expert[a]] += 1.0;
      }
      REQUIRE(taken == wanted.cwiseMin(static_cast<double>(capacity)));
      REQUIRE(routing.expert == chosen.expert);
      REQUIRE(routing.weight == chosen.weight);
    }
  }
}

}  // namespace weir::overflow_test
