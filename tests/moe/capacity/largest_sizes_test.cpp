// SPDX-License-Identifier: MIT
// Sizes at the largest Index: as good as none, and no sum of them overflows.
#include <limits>
#include <stdexcept>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/kv_cache.hpp>
#include <weir/core/sequences.hpp>
#include <weir/model/sampling.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/dynamic_capacity.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::largest_sizes_test {

namespace {

constexpr Index kLargest = std::numeric_limits<Index>::max();

/// What `policy` keeps of three sequences with 12 tokens, each of two experts.
template <class Policy>
std::vector<std::uint8_t> kept(const Policy& policy) {
  const Sequences sequences = Sequences::uniform(3, 4);
  const Pass pass = {.training = true, .sequences = &sequences};
  Routing<double> routing =
      test::route(TopKSoftmax<double>({.k = 2}), test::random_matrix(12, 3, 1), pass);
  test::limit(policy, routing, pass);
  return routing.kept;
}

}  // namespace

TEST_CASE("A capacity group of the largest size is the whole scope", "[moe][capacity]") {
  const auto scope = GENERATE(Scope::kBatch, Scope::kSequence);
  const auto group_size = GENERATE(as<Index>{}, kLargest, kLargest - 1, 13);
  CHECK(kept(FixedCapacity({.capacity = 2, .scope = scope, .group_size = group_size})) ==
        kept(FixedCapacity({.capacity = 2, .scope = scope})));
  const CapacityFactorConfig config = {.train = 0.75, .minimum = 0, .scope = scope};
  CapacityFactorConfig grouped = config;
  grouped.group_size = group_size;
  CHECK(kept(CapacityFactor(grouped)) == kept(CapacityFactor(config)));
}

TEST_CASE("A capacity of the largest size drops nothing", "[moe][capacity]") {
  const std::vector<std::uint8_t> all(24, 1);
  CHECK(kept(FixedCapacity({.capacity = kLargest})) == all);
  CHECK(kept(CapacityFactor({.train = 0.1, .minimum = kLargest})) == all);
  CHECK(kept(CapacityFactor({.train = 1e300, .minimum = 0})) == all);
  CHECK(kept(DynamicCapacity({.factor = 0.1, .alignment = kLargest})) ==
        kept(DynamicCapacity({.factor = 0.1})));  // floor(0.1 * 4) = 0 is a multiple of anything.
  CHECK(kept(DynamicCapacity({.factor = 0.5, .alignment = kLargest})) == all);
  CHECK(kept(DynamicCapacity({.factor = 0.5, .alignment = kLargest - 1})) == all);
  CHECK(kept(DynamicCapacity({.factor = 1e300, .alignment = kLargest})) == all);
}

TEST_CASE("DynamicCapacity rounds up to its alignment and no further", "[moe][capacity]") {
  // floor(0.5 * 12 / 3) * 2 = 4 places.
  OverflowSpace<double> space;
  const Routing<double> routing =
      test::route(TopKSoftmax<double>({.k = 2}), test::random_matrix(12, 3, 1));
  for (const auto& [alignment, expected] :
       {std::pair<Index, Index>{1, 4}, {2, 4}, {3, 6}, {4, 4}, {5, 5}, {kLargest, kLargest}}) {
    CHECK(
        DynamicCapacity({.factor = 0.5, .alignment = alignment}).capacity(routing, 0, 12, space) ==
        expected);
  }
}

TEST_CASE("A window or chunk of the largest size is none", "[attention]") {
  const Matrix<double> x = test::random_matrix(9, 8, 2);
  const auto output = [&](Index window, Index chunk) {
    Rng rng(3);
    const GroupedQueryAttention<double> attention(
        rng, {.d_model = 8, .heads = 2, .kv_heads = 1, .window = window, .chunk = chunk});
    Matrix<double> all = infer(attention, x);
    GroupedQueryAttention<double>::State state;
    GroupedQueryAttention<double>::Cache cache;
    GroupedQueryAttention<double>::State* const states[] = {&state};
    attention.decode(x.topRows(6), {}, states, cache);
    CHECK(test::relative_error(Matrix<double>(attention.decode(x.bottomRows(3), {}, states, cache)),
                               Matrix<double>(all.bottomRows(3))) < 1e-14);
    return all;
  };
  const Matrix<double> plain = output(0, 0);
  CHECK(output(kLargest, 0) == plain);
  CHECK(output(0, kLargest) == plain);
}

TEST_CASE("Memory for the largest number of tokens is refused", "[attention]") {
  KvCache<double> cache;
  cache.append(test::random_matrix(2, 3, 4), test::random_matrix(2, 3, 5));
  CHECK_THROWS_AS(cache.reserve(kLargest), std::length_error);
  CHECK_THROWS_AS(cache.reserve(kLargest / 3), std::length_error);
  CHECK(cache.length() == 2);
  CHECK(cache.keys() == test::random_matrix(2, 3, 4));
}

TEST_CASE("The largest top_k keeps all tokens", "[model][sampling]") {
  const Matrix<double> logits = test::random_matrix(1, 7, 6);
  Sampler<double> sampler;
  const RowVector<double> all = sampler.distribution(logits, {});
  CHECK(sampler.distribution(logits, {.top_k = kLargest}) == all);
}

}  // namespace weir::largest_sizes_test
