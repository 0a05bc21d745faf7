// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdint>
#include <vector>

#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::fixed_capacity_test {

static_assert(CapacityPolicy<FixedCapacity, float>);

namespace {

using Kept = std::vector<std::uint8_t>;

Routing<double> select(const Matrix<double>& logits, Index k, const Pass& pass = {}) {
  return test::route(TopKSoftmax<double>({.k = k}), logits, pass);
}

Kept kept_of(const FixedCapacityConfig& config, Routing<double> routing, const Pass& pass = {}) {
  test::limit(FixedCapacity(config), routing, pass);
  return routing.kept;
}

/// `tokens` tokens that all choose expert 0 of 2.
Matrix<double> crowd(Index tokens) {
  Matrix<double> logits = Matrix<double>::Zero(tokens, 2);
  logits.col(0).setOnes();
  return logits;
}

/// In how many of 200 random routings a change of the later tokens changes which assignments of the
/// earlier ones are kept.
int acausal_trials(const FixedCapacityConfig& policy, Index k) {
  Rng rng(1);
  int changed = 0;
  for (int trial = 0; trial < 200; ++trial) {
    const Index earlier = 6;
    Matrix<double> logits = normal_init<double>(10, 4, 1.0, rng);
    const Kept before = kept_of(policy, select(logits, k));
    logits.bottomRows(10 - earlier) = normal_init<double>(10 - earlier, 4, 1.0, rng);
    const Kept after = kept_of(policy, select(logits, k));
    const bool same = std::equal(before.begin(), before.begin() + earlier * k, after.begin());
    changed += same ? 0 : 1;
  }
  return changed;
}

/// The same for a random order in training, with the same draws before and after.
int acausal_random_trials(Index k) {
  const FixedCapacityConfig policy{.capacity = 2, .order = DropOrder::kRandom};
  Rng rng(2);
  int changed = 0;
  for (int trial = 0; trial < 200; ++trial) {
    const Index earlier = 6;
    Matrix<double> logits = normal_init<double>(10, 4, 1.0, rng);
    const auto kept = [&] {
      Rng draws(static_cast<std::uint64_t>(trial));
      return kept_of(policy, select(logits, k), {.training = true, .rng = &draws});
    };
    const Kept before = kept();
    logits.bottomRows(10 - earlier) = normal_init<double>(10 - earlier, 4, 1.0, rng);
    const Kept after = kept();
    const bool same = std::equal(before.begin(), before.begin() + earlier * k, after.begin());
    changed += same ? 0 : 1;
  }
  return changed;
}

}  // namespace

TEST_CASE("FixedCapacity keeps the first `capacity` of each expert", "[moe][fixed_capacity]") {
  CHECK(kept_of({.capacity = 3}, select(crowd(5), 1)) == Kept{1, 1, 1, 0, 0});
  CHECK(kept_of({.capacity = 5}, select(crowd(5), 1)) == Kept(5, 1));
  CHECK(kept_of({.capacity = 3}, select(crowd(0), 1)).empty());
  CHECK(kept_of({.capacity = 3}, select(crowd(1), 2)) == Kept{1, 1});
}

TEST_CASE("FixedCapacity counts per sequence or per batch", "[moe][fixed_capacity]") {
  const Sequences lengths({3, 0, 2});
  Pass pass;
  pass.sequences = &lengths;
  const Routing<double> routing = select(crowd(5), 1, pass);
  CHECK(kept_of({.capacity = 1}, routing) == Kept{1, 0, 0, 1, 0});
  CHECK(kept_of({.capacity = 1, .scope = Scope::kBatch}, routing) == Kept{1, 0, 0, 0, 0});
}

TEST_CASE("FixedCapacity counts per group of rows", "[moe][fixed_capacity]") {
  const Routing<double> routing = select(crowd(5), 1);
  CHECK(kept_of({.capacity = 1, .group_size = 2}, routing) == Kept{1, 0, 1, 0, 1});
  CHECK(kept_of({.capacity = 1, .group_size = 3}, routing) == Kept{1, 0, 0, 1, 0});
  CHECK(kept_of({.capacity = 1, .group_size = 5}, routing) == Kept{1, 0, 0, 0, 0});
}

TEST_CASE("FixedCapacity does not count padding", "[moe][fixed_capacity]") {
  const std::vector<std::uint8_t> mask = {0, 0, 1, 1, 1};
  Pass pass;
  pass.mask = mask;
  CHECK(kept_of({.capacity = 2}, select(crowd(5), 1, pass)) == Kept{1, 1, 0});
}

TEST_CASE("FixedCapacity follows its order", "[moe][fixed_capacity]") {
  // Experts (1, 0), (0, 1): who gets expert 0, the second choice of token 0 or the first of token
  // 1?
  Matrix<double> logits(2, 2);
  logits << 0.0, 1.0, 3.0, 0.0;
  const Routing<double> routing = select(logits, 2);
  CHECK(kept_of({.capacity = 1, .order = DropOrder::kRankMajor}, routing) == Kept{1, 0, 1, 0});
  CHECK(kept_of({.capacity = 1, .order = DropOrder::kTokenMajor}, routing) == Kept{1, 1, 0, 0});
  CHECK(kept_of({.capacity = 1, .order = DropOrder::kProbability}, routing) == Kept{1, 0, 1, 0});
}

TEST_CASE("FixedCapacity is as causal as it says", "[moe][fixed_capacity]") {
  const FixedCapacityConfig rank_major{.capacity = 2, .order = DropOrder::kRankMajor};
  const FixedCapacityConfig token_major{.capacity = 2, .order = DropOrder::kTokenMajor};
  for (const Index k : {1, 2}) {
    CHECK(acausal_trials({.capacity = 2, .order = DropOrder::kBatchPrioritised}, k) > 0);
    CHECK(acausal_trials({.capacity = 2, .order = DropOrder::kBatchPrioritisedSum}, k) > 0);
    CHECK(acausal_random_trials(k) > 0);
  }
  const FixedCapacityConfig probability{.capacity = 2, .order = DropOrder::kProbability};
  CHECK(acausal_trials(token_major, 1) == 0);
  CHECK(acausal_trials(token_major, 2) == 0);
  CHECK(acausal_trials(token_major, 4) == 0);
  CHECK(acausal_trials(rank_major, 1) == 0);
  CHECK(acausal_trials(rank_major, 2) > 0);
  CHECK(acausal_trials({.capacity = 1, .order = DropOrder::kProbability}, 2) > 0);
  CHECK(acausal_trials(probability, 2) > 0);

  // By probability not even with k = 1, where the weights differ.
  Routing<double> routing;
  routing.begin("Test", Matrix<double>::Zero(2, 1), {});
  routing.assign_each(1);
  routing.weight = {0.5, 0.4};
  const FixedCapacityConfig one{.capacity = 1, .order = DropOrder::kProbability};
  CHECK(kept_of(one, routing) == Kept{1, 0});
  routing.weight = {0.5, 0.6};
  CHECK(kept_of(one, routing) == Kept{0, 1});
}

TEST_CASE("FixedCapacity names the setting that is out of range", "[moe][fixed_capacity]") {
  const auto message = [](const FixedCapacityConfig& config) {
    return test::message_of<ConfigError>([&] { FixedCapacity{config}; });
  };
  CHECK(message({.capacity = 0}) == "FixedCapacity: capacity = 0, expected >= 1");
  CHECK(message({.capacity = -2}) == "FixedCapacity: capacity = -2, expected >= 1");
  CHECK(message({.group_size = -1}) == "FixedCapacity: group_size = -1, expected >= 0");
  CHECK(FixedCapacity({.capacity = 3}).config().capacity == 3);
}

}  // namespace weir::fixed_capacity_test
