// SPDX-License-Identifier: MIT
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/moe/capacity/dynamic_capacity.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::dynamic_capacity_test {

static_assert(CapacityPolicy<DynamicCapacity, float>);

namespace {

using Kept = std::vector<std::uint8_t>;

Routing<double> select(const Matrix<double>& logits, Index k, const Pass& pass = {}) {
  return test::route(TopKSoftmax<double>({.k = k}), logits, pass);
}

/// `tokens` tokens that all choose experts 0, 1, ... in this order.
Matrix<double> crowd(Index tokens, Index experts) {
  return RowVector<double>::LinSpaced(experts, 1.0, 0.0).replicate(tokens, 1);
}

Index capacity_of(const DynamicCapacityConfig& config, const Routing<double>& routing) {
  OverflowSpace<double> space;
  return DynamicCapacity(config).capacity(routing, 0, routing.tokens(), space);
}

Kept kept_of(const DynamicCapacityConfig& config, Routing<double> routing, const Pass& pass = {}) {
  test::limit(DynamicCapacity(config), routing, pass);
  return routing.kept;
}

}  // namespace

TEST_CASE("DynamicCapacity is worked out as in Tutel", "[moe][capacity][dynamic_capacity]") {
  // 10 tokens, 4 experts, k = 2: ceil(10 / 4) = 3; the largest load is 10.
  const Routing<double> routing = select(crowd(10, 4), 2);
  CHECK(capacity_of({.factor = 1.0}, routing) == 6);
  CHECK(capacity_of({.factor = 1.25}, routing) == 6);  // 2 * int(3.75)
  CHECK(capacity_of({.factor = 1.34}, routing) == 8);
  CHECK(capacity_of({.factor = 0.0}, routing) == 10);
  CHECK(capacity_of({.factor = -1.0}, routing) == 6);
  CHECK(capacity_of({.factor = -2.0}, routing) == 10);
  CHECK(capacity_of({.factor = 1.0, .alignment = 4}, routing) == 8);
  CHECK(capacity_of({.factor = 0.0, .alignment = 8}, routing) == 16);
  CHECK(capacity_of({.factor = -1.0, .alignment = 3}, routing) == 6);
  CHECK(capacity_of({.factor = 1e300}, routing) == 20);
  CHECK(capacity_of({.factor = 0.1}, routing) == 0);
}

TEST_CASE("DynamicCapacity drops nothing with a factor of zero",
          "[moe][capacity][dynamic_capacity]") {
  CHECK(kept_of({}, select(crowd(10, 4), 2)) == Kept(20, 1));
  CHECK(kept_of({}, select(test::random_matrix(9, 5, 1), 3)) == Kept(27, 1));
  CHECK(kept_of({}, select(Matrix<double>(0, 4), 2)).empty());
  CHECK(kept_of({}, select(crowd(1, 1), 1)) == Kept{1});
  Rng rng(1);
  CHECK(kept_of({.order = DropOrder::kRandom}, select(crowd(10, 4), 2),
                {.training = true, .rng = &rng}) == Kept(20, 1));
}

TEST_CASE("DynamicCapacity keeps what it says of each group", "[moe][capacity][dynamic_capacity]") {
  const Sequences lengths({4, 0, 2});
  const Routing<double> routing = select(crowd(6, 2), 1, {.sequences = &lengths});
  CHECK(kept_of({.factor = 1.0}, routing) == Kept{1, 1, 1, 0, 0, 0});
  CHECK(kept_of({.factor = 1.0, .scope = Scope::kSequence}, routing) == Kept{1, 1, 0, 0, 1, 0});
  CHECK(kept_of({.factor = -0.5, .scope = Scope::kSequence}, routing) == Kept{1, 0, 0, 0, 0, 0});
}

TEST_CASE("DynamicCapacity counts neither padding nor what is not kept",
          "[moe][capacity][dynamic_capacity]") {
  const std::vector<std::uint8_t> mask = {1, 0, 0, 1, 1, 0};
  Routing<double> routing = select(crowd(6, 2), 1, {.mask = mask});
  CHECK(capacity_of({.factor = 1.0}, routing) == 2);
  CHECK(capacity_of({.factor = 0.0}, routing) == 3);
  routing.kept[1] = 0;
  CHECK(capacity_of({.factor = 0.0}, routing) == 2);
}

TEST_CASE("DynamicCapacity names the setting that is wrong", "[moe][capacity][dynamic_capacity]") {
  const auto message = [](const DynamicCapacityConfig& config) {
    return test::message_of<ConfigError>([&] { DynamicCapacity{config}; });
  };
  CHECK(message({.factor = std::numeric_limits<double>::infinity()}) ==
        "DynamicCapacity: factor = inf, expected a finite number");
  CHECK(message({.alignment = 0}) == "DynamicCapacity: alignment = 0, expected >= 1");
  CHECK(message({.factor = -1.5}) == "no exception");
  CHECK(DynamicCapacity({.alignment = 3}).config().alignment == 3);
}

}  // namespace weir::dynamic_capacity_test
