// SPDX-License-Identifier: MIT
#include <cmath>
#include <numeric>
#include <vector>

#include <weir/ops/lanes.hpp>

#include "support/catch.hpp"

namespace weir::lanes_test {

namespace {

/// 1, 2, 3, ...
template <class T>
std::vector<T> counted(Index count) {
  std::vector<T> numbers(static_cast<std::size_t>(count));
  std::iota(numbers.begin(), numbers.end(), T(1));
  return numbers;
}

}  // namespace

TEMPLATE_TEST_CASE("A part of a block of lanes is read and written, and nothing beyond it",
                   "[ops][lanes]", float, double) {
  using T = TestType;
  for (Index count = 0; count <= kLanes<T>; ++count) {
    INFO("count " << count);
    const std::vector<T> from = counted<T>(count);  // ASan sees a read beyond.
    const Lanes<T> zeros_behind = load_lanes<T>(from.data(), count);
    const Lanes<T> sevens_behind = load_lanes<T>(from.data(), count, Lanes<T>{} + T(7));
    std::vector<T> to(static_cast<std::size_t>(kLanes<T> + 1), T(-1));
    store_lanes<T>(zeros_behind, to.data(), count);
    for (Index i = 0; i < kLanes<T>; ++i) {
      const T own = static_cast<T>(i + 1);
      CHECK(zeros_behind[i] == (i < count ? own : T(0)));
      CHECK(sevens_behind[i] == (i < count ? own : T(7)));
      CHECK(to[static_cast<std::size_t>(i)] == (i < count ? own : T(-1)));
      CHECK(first_lanes<T>(Lanes<T>{} + T(2), count)[i] == (i < count ? T(2) : T(0)));
    }
    CHECK(to.back() == T(-1));
  }
}

TEMPLATE_TEST_CASE("Lanes are combined, zipped and summed", "[ops][lanes]", float, double) {
  using T = TestType;
  const Index n = kLanes<T>;
  const std::vector<T> numbers = counted<T>(n * n);
  const Lanes<T> a = load_lanes<T>(numbers.data());
  const Lanes<T> b = load_lanes<T>(numbers.data() + n);

  CHECK(sum_of<T>(a) == static_cast<T>(n * (n + 1) / 2));
  CHECK(max_of<T>(b) == static_cast<T>(2 * n));
  CHECK(any_lane<T>(a == static_cast<T>(n)));
  CHECK_FALSE(any_lane<T>(a > static_cast<T>(n)));

  const auto [even, odd] = unzip_lanes<T>(a, b);
  const auto [again_a, again_b] = zip_lanes<T>(even, odd);
  Lanes<T> blocks[kLanes<T>];
  for (Index i = 0; i < n; ++i) blocks[i] = load_lanes<T>(numbers.data() + i * n);
  const Lanes<T> sums = sums_of<T>(blocks);
  for (Index i = 0; i < n; ++i) {
    CHECK(even[i] == static_cast<T>(2 * i + 1));
    CHECK(odd[i] == static_cast<T>(2 * i + 2));
    CHECK(again_a[i] == a[i]);
    CHECK(again_b[i] == b[i]);
    CHECK(sums[i] == static_cast<T>(n * i * n + n * (n + 1) / 2));
  }
}

TEST_CASE("Rectified and larger lanes keep a NaN", "[ops][lanes]") {
  const Lanes<float> nan = Lanes<float>{} + std::nanf("");
  CHECK(std::isnan(rectify_lanes<float>(nan)[0]));
  CHECK(rectify_lanes<float>(Lanes<float>{} - 2.F)[0] == 0.F);
  CHECK(rectify_lanes<float>(Lanes<float>{} + 2.F)[0] == 2.F);
  CHECK(max_lanes<float>(Lanes<float>{} + 2.F, nan)[0] == 2.F);
  CHECK(std::isnan(max_lanes<float>(nan, Lanes<float>{} + 2.F)[0]));
}

}  // namespace weir::lanes_test
