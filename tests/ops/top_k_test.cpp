// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/ops/top_k.hpp>

#include "support/catch.hpp"

namespace weir::top_k_test {

namespace {

template <class T>
std::vector<Index> top(const std::vector<T>& values, Index k) {
  std::vector<Index> chosen(static_cast<std::size_t>(k));
  top_k<T>(values, chosen);
  return chosen;
}

/// The slow and obvious way.
template <class T>
std::vector<Index> sorted(const std::vector<T>& values, Index k) {
  std::vector<Index> order(values.size());
  std::iota(order.begin(), order.end(), Index{0});
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) {
    return values[static_cast<std::size_t>(a)] > values[static_cast<std::size_t>(b)];
  });
  order.resize(static_cast<std::size_t>(k));
  return order;
}

}  // namespace

TEMPLATE_TEST_CASE("top_k is the head of a stable sort", "[ops][top_k]", float, double) {
  Rng rng(1);
  const auto levels = GENERATE(as<Index>{}, 2, 10, 100000);  // The fewer, the more ties.
  for (const Index count : {1, 2, 5, 16, 17, 64, 200}) {
    std::vector<TestType> values(static_cast<std::size_t>(count));
    for (TestType& value : values) value = static_cast<TestType>(rng.below(levels));
    for (Index k = 0; k <= count; ++k) {
      INFO("k " << k << " of " << count);
      REQUIRE(top(values, k) == sorted(values, k));
    }
  }
}

TEST_CASE("top_k matches rows worked out by hand", "[ops][top_k]") {
  CHECK(top<float>({0.1F, 0.7F, 0.2F}, 2) == std::vector<Index>{1, 2});
  CHECK(top<float>({3.F, 3.F, 3.F}, 2) == std::vector<Index>{0, 1});
  CHECK(top<float>({1.F, 2.F, 2.F, 1.F}, 3) == std::vector<Index>{1, 2, 0});
  CHECK(top<float>({-1.F, -3.F, -2.F}, 1) == std::vector<Index>{0});
}

TEST_CASE("top_k takes -inf for a value like others", "[ops][top_k]") {
  const float low = -HUGE_VALF;
  CHECK(top<float>({low, low, 1.F, low}, 3) == std::vector<Index>{2, 0, 1});
  CHECK(top<float>({low, low, low}, 1) == std::vector<Index>{0});
  std::vector<float> many(40, low);
  many[30] = -5.F;
  CHECK(top(many, 20) == sorted(many, 20));
}

TEST_CASE("top_k of nothing touches nothing", "[ops][top_k]") {
  top_k<float>({}, {});
  const float one = 1.F;
  top_k<float>({&one, 1}, {});
}

}  // namespace weir::top_k_test
