// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include <weir/analysis/load_statistics.hpp>
#include <weir/analysis/next_expert.hpp>
#include <weir/analysis/random_drops.hpp>
#include <weir/analysis/token_groups.hpp>
#include <weir/analysis/trace_recorder.hpp>
#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/random.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "analysis/traced.hpp"
#include "support/catch.hpp"
#include "support/routing.hpp"

namespace weir::random_drops_test {

namespace {

const BootstrapConfig kNoIntervals = {.replicates = 0};

/// Sequences of a model with random routing, as they are traced, several sequences in a pass.
TracedTokens random_trace(const FixedCapacityConfig& capacity, Index experts, Index k,
                          std::uint64_t seed, double share = 1.0) {
  constexpr Index kPasses = 3, kSequences = 4, kLength = 24;
  Rng rng(seed);
  TraceRecorder recorder({.layout = {.choices = k}, .share = share});
  for (Index p = 0; p < kPasses; ++p) {
    Sequences sequences;
    std::vector<TracedSequence> traced;
    for (Index s = 0; s < kSequences; ++s) {
      sequences.append(kLength);
      traced.push_back({.id = (p + 1) * kSequences - s});  // The last one of a pass comes first.
    }
    const Pass pass = {.sequences = &sequences};
    Matrix<double> logits(kSequences * kLength, experts);
    for (Index t = 0; t < logits.rows(); ++t) {
      for (Index e = 0; e < experts; ++e) logits(t, e) = rng.uniform();
    }
    Routing<double> routing = test::route(SoftmaxTopK<double>({.k = k}), logits, pass);
    test::limit(FixedCapacity(capacity), routing, pass);
    recorder.begin(traced);
    recorder.see("moe", routing, pass);
  }
  return TracedTokens(recorder.trace());
}

}  // namespace

TEST_CASE("Counts of independent events", "[analysis]") {
  CountDistribution coins(4);
  for (const double p : {0.5, 0.5, 0.25, 0.0}) coins.add(p);
  CHECK(coins.at_least(0) == Approx(1.0));
  CHECK(coins.at_least(1) == Approx(1.0 - 0.25 * 0.75));
  CHECK(coins.at_least(3) == Approx(0.0625));
  CHECK(coins.at_least(4) == 0.0);
  CHECK(coins.mean_above(0) == Approx(1.25));
  CHECK(coins.mean_above(2) == Approx(0.0625));
  coins.remove(0.25);
  CHECK(coins.at_least(1) == Approx(0.75));
  CHECK(coins.at_least(3) == 0.0);

  // Adding and taking away again and again changes nothing, whatever the probabilities.
  for (const double p : {0.01, 0.49, 0.5, 0.51, 0.99, 1.0}) {
    CountDistribution many(400);
    for (int i = 0; i < 399; ++i) many.add(p);
    const double before = many.at_least(static_cast<Index>(399.0 * p));
    for (int i = 0; i < 400; ++i) {
      many.add(1.0 - p);
      many.remove(1.0 - p);
      many.remove(p);
      many.add(p);
    }
    CHECK(many.at_least(static_cast<Index>(399.0 * p)) == Approx(before).epsilon(1e-9));
  }
}

TEST_CASE("Random drops by hand", "[analysis]") {
  // One place in each of two experts: who comes behind one other finds it taken half of the time.
  const std::vector<Index> one = {1, 1, 1};
  for (const ServingOrder order : {ServingOrder::kRankMajor, ServingOrder::kTokenMajor}) {
    CHECK(random_drops(one, 2, 1, order) == std::vector<double>{0.0, 0.5, 0.75});
  }
  CHECK(random_overflow(one, 2, 1) == Approx(1.25));
  CHECK(random_drops(one, 2, 1, ServingOrder::kOther)[2] == Approx(1.25 / 3.0));

  // Two tokens with two of three experts. By rank, the first one's second choice (1/3) and the
  // second one's first (1/3) and second (2/3) may be gone.
  const std::vector<Index> two = {2, 2};
  const auto by_rank = random_drops(two, 3, 1, ServingOrder::kRankMajor);
  CHECK(by_rank[0] == Approx(1.0 / 3.0));
  CHECK(by_rank[1] == Approx(1.0));
  const auto by_token = random_drops(two, 3, 1, ServingOrder::kTokenMajor);
  CHECK(by_token[0] == 0.0);
  CHECK(by_token[1] == Approx(4.0 / 3.0));
  CHECK(random_overflow(two, 3, 1) == Approx(4.0 / 3.0));

  CHECK(random_drops({}, 3, 1, ServingOrder::kRankMajor).empty());
  CHECK(random_overflow({}, 3, 1) == 0.0);
  CHECK(random_drops(two, 2, 1, ServingOrder::kTokenMajor) == std::vector<double>{0.0, 2.0});
  CHECK(random_drops(two, 2, 2, ServingOrder::kRankMajor) == std::vector<double>{0.0, 0.0});
}

TEST_CASE("No order of tokens changes how many choices are lost", "[analysis]") {
  const std::vector<Index> choices = {3, 0, 1, 2, 5, 5, 1, 4, 2, 2, 3, 0, 1};
  for (const Index capacity : {0, 1, 2, 4, 13, 20}) {
    const double all = random_overflow(choices, 5, capacity);
    for (const ServingOrder order :
         {ServingOrder::kRankMajor, ServingOrder::kTokenMajor, ServingOrder::kOther}) {
      const std::vector<double> lost = random_drops(choices, 5, capacity, order);
      CHECK(std::accumulate(lost.begin(), lost.end(), 0.0) == Approx(all).margin(1e-12));
      CHECK(lost[1] == 0.0);
    }
  }
}

TEST_CASE("Random routing drops what is expected of it", "[analysis][slow]") {
  struct Case {
    DropOrder order;
    Scope scope;
    Index capacity, experts, k;
    ServingOrder found;
  };
  for (const Case& c : std::vector<Case>{
           {DropOrder::kRankMajor, Scope::kBatch, 22, 8, 2, ServingOrder::kRankMajor},
           {DropOrder::kRankMajor, Scope::kSequence, 11, 6, 3, ServingOrder::kRankMajor},
           {DropOrder::kTokenMajor, Scope::kSequence, 5, 8, 2, ServingOrder::kTokenMajor},
           {DropOrder::kTokenMajor, Scope::kBatch, 70, 5, 4, ServingOrder::kTokenMajor},
           {DropOrder::kProbability, Scope::kBatch, 22, 8, 2, ServingOrder::kOther},
           {DropOrder::kBatchPrioritised, Scope::kSequence, 5, 8, 2, ServingOrder::kOther}}) {
    constexpr int kTraces = 100;
    const FixedCapacityConfig config = {.capacity = c.capacity, .order = c.order, .scope = c.scope};
    std::vector<double> value(4), chance(4);
    double all = 0.0, all_by_chance = 0.0;
    for (std::uint64_t seed = 0; seed < kTraces; ++seed) {
      const TracedTokens tokens = random_trace(config, c.experts, c.k, seed);
      const TracedLayer& layer = tokens.layers[0];
      const std::optional<TracedCapacity> found = TracedCapacity::of(tokens, layer);
      REQUIRE(found);
      CHECK(found->order == c.found);
      for (const TracedCapacity::Group& group : found->groups) {
        CHECK(group.capacity == c.capacity);
        CHECK(group.tokens.size() == (c.scope == Scope::kBatch ? 96U : 24U));
      }
      const auto drops = drop_ratio(tokens, layer, by_position(tokens, 6), kNoIntervals);
      for (std::size_t g = 0; g < 4; ++g) {
        value[g] += drops[g].value / kTraces;
        chance[g] += drops[g].chance / kTraces;
      }
      const Estimate dropped = load_statistics(tokens, layer, kNoIntervals).dropped;
      all += dropped.value / kTraces;
      all_by_chance += dropped.chance / kTraces;
    }
    for (std::size_t g = 0; g < 4; ++g) {
      CHECK(value[g] == Approx(chance[g]).epsilon(0.08).margin(0.004));
    }
    CHECK(all == Approx(all_by_chance).epsilon(0.06));
    if (c.scope == Scope::kSequence && c.found != ServingOrder::kOther) {
      CHECK(chance[3] > 1.5 * chance[0]);  // The end loses more than the beginning.
    }
  }
}

TEST_CASE("A trace that does not show the capacity has no expected drops", "[analysis]") {
  const FixedCapacityConfig config = {.capacity = 26, .scope = Scope::kBatch};
  const TracedTokens part = random_trace(config, 8, 2, 1, 0.7);
  CHECK_FALSE(TracedCapacity::of(part, part.layers[0]));
  CHECK(std::isnan(drop_ratio(part, part.layers[0], all_tokens(part), kNoIntervals)[0].chance));
  const TracedTokens none = random_trace({.capacity = 96, .scope = Scope::kBatch}, 8, 2, 1);
  CHECK_FALSE(TracedCapacity::of(none, none.layers[0]));
  CHECK(std::isnan(load_statistics(none, none.layers[0], kNoIntervals).dropped.chance));
  CHECK(std::isnan(random_drops(none, none.layers[0])[0]));
  const TracedTokens empty = test::traced({}, 4);
  CHECK_FALSE(TracedCapacity::of(empty, empty.layers[0]));
}

TEST_CASE("The next layer's expert by hand", "[analysis]") {
  TracedTokens tokens =
      test::traced({{0, {{0, {0}}, {0, {0}}, {0, {1}}, {0, {}}}}, {0, {{0, {1}}, {0, {1}}}}}, 3);
  TracedLayer next{.name = "next", .experts = 2};
  for (const Index e : {1, 0, 0, 0, 1, 0}) next.add({e});
  tokens.layers.push_back(next);
  const auto share = next_expert_share(tokens, tokens.layers[0], tokens.layers[1]);
  REQUIRE(share.size() == 6);
  CHECK(share[0].value == 0.5);
  CHECK(share[2].value == Approx(2.0 / 3.0));
  CHECK(share[3].value == Approx(1.0 / 3.0));
  CHECK(std::isnan(share[4].value));          // Nobody goes to expert 2.
  CHECK(share[0].chance == Approx(3.0 / 5));  // Of those that chose in both.
  CHECK(share[1].chance == Approx(2.0 / 5));
  CHECK(std::isnan(share[0].low));  // One sequence alone has tokens of expert 0.
  CHECK(share[2].low <= share[2].value);
  CHECK(share[2].high >= share[2].value);
}

}  // namespace weir::random_drops_test
