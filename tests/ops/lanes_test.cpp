// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <weir/ops/lanes.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

using namespace weir;

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

  const auto [even, odd] = unzip<T>(a, b);
  const auto [again_a, again_b] = zip<T>(even, odd);
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

TEMPLATE_TEST_CASE("Sums and maxima over any count are those of the standard library",
                   "[ops][lanes]", float, double) {
  using T = TestType;
  const auto same = [](const Lanes<T>& x) -> Lanes<T> { return x; };
  const auto nan_at_zero = [](const Lanes<T>& x) -> Lanes<T> { return x / x; };
  for (Index count = 0; count < 150; ++count) {
    INFO("count " << count);
    std::vector<T> numbers = counted<T>(count);
    CHECK(sum_lanes<T>(count, same, numbers.data()) == static_cast<T>(count * (count + 1) / 2));
    CHECK(sum_lanes<T>(count, nan_at_zero, numbers.data()) == static_cast<T>(count));
    std::rotate(numbers.begin(), numbers.begin() + count / 3, numbers.end());
    if (count == 0) {
      CHECK(max_of(numbers.data(), count) == -std::numeric_limits<T>::infinity());
      continue;
    }
    CHECK(max_of(numbers.data(), count) == static_cast<T>(count));
    for (T& x : numbers) x = -x;
    CHECK(max_of(numbers.data(), count) == T(-1));
    if (count > 1) {
      *std::max_element(numbers.begin(), numbers.end()) = std::numeric_limits<T>::quiet_NaN();
      CHECK(max_of(numbers.data(), count) == T(-2));
    }
  }
}

TEMPLATE_TEST_CASE("Dot products and scaled sums over any count are those of whole numbers",
                   "[ops][lanes]", float, double) {
  using T = TestType;
  for (Index count = 0; count < 100; ++count) {
    INFO("count " << count);
    const auto n = static_cast<std::size_t>(count);
    const std::vector<T> a = counted<T>(count);
    std::vector<T> b(n), sum(n + 1, T(-1));
    T expected = T(0);
    for (std::size_t i = 0; i < n; ++i) {
      b[i] = static_cast<T>(i % 3) - T(1);
      expected += a[i] * b[i];
    }
    CHECK(dot<T>(count, a.data(), b.data()) == expected);
    CHECK(dot<T>(count, a.data(), a.data()) ==
          static_cast<T>(count * (count + 1) * (2 * count + 1) / 6));
    add_scaled<T>(count, T(-2), a.data(), sum.data());
    for (std::size_t i = 0; i < n; ++i) CHECK(sum[i] == T(-1) - T(2) * a[i]);
    CHECK(sum.back() == T(-1));  // Nothing beyond.
  }
  // A sum may be added to itself.
  std::vector<T> twice = counted<T>(37);
  add_scaled<T>(37, T(1), twice.data(), twice.data());
  CHECK(twice[36] == T(74));
  // What is not a number stays none.
  const std::vector<T> nan(2, std::numeric_limits<T>::quiet_NaN());
  CHECK(std::isnan(dot<T>(2, twice.data(), nan.data())));
  add_scaled<T>(2, T(0), nan.data(), twice.data());
  CHECK(std::isnan(twice[0]));
}

TEMPLATE_TEST_CASE("An element is mapped to the same bits wherever it lies", "[ops][lanes]", float,
                   double) {
  using T = TestType;
  const auto third = [](const Lanes<T>& x) -> Lanes<T> { return x * T(0.3) + x / T(3); };
  const auto root = [](const Lanes<double>& x) -> Lanes<double> { return 1.0 / (x + 0.1); };
  const Index count = 5 * kLanes<T> + 3;
  const std::vector<T> numbers = counted<T>(count);
  std::vector<T> whole(numbers), as_double(numbers);
  map_lanes<T>(count, third, whole.data(), whole.data());
  map_as_double<T>(count, root, as_double.data(), as_double.data());
  for (Index i = 0; i < count; ++i) {
    T one = 0;
    map_lanes<T>(1, third, &one, &numbers[static_cast<std::size_t>(i)]);
    CHECK(one == whole[static_cast<std::size_t>(i)]);
    CHECK(as_double[static_cast<std::size_t>(i)] ==
          static_cast<T>(1.0 / (static_cast<double>(i + 1) + 0.1)));
  }
}

TEMPLATE_TEST_CASE("Rows are copied, added and summed alike by any number of threads",
                   "[ops][lanes]", float, double) {
  using T = TestType;
  const auto rows = GENERATE(as<Index>{}, 0, 1, 15, 16, 17, 700, 1500);
  const auto cols = GENERATE(as<Index>{}, 1, 9, 130);
  const Matrix<T> a = test::random_matrix<T>(rows, cols, 1);
  const Matrix<T> b = test::random_matrix<T>(rows, cols, 2);

  const auto column_sums = [&](int threads) {
    const test::Threads scope(threads);
    Matrix<T> copy, sum(rows, cols);
    copy_rows<T>(a, copy);
    add_rows<T>(a, b, sum);
    CHECK(copy == a);
    CHECK(sum == a + b);

    RowVector<T> sums = RowVector<T>::Ones(cols);
    Scratch<T> of_runs;
    sum_runs_of_rows<T>(rows, cols, of_runs, [&](Index t, T* to) {
      map_lanes<T>(
          cols, [](const Lanes<T>& x, const Lanes<T>& y) -> Lanes<T> { return x + y; }, to, to,
          &a(t, 0));
    });
    add_rows_to<T>(of_runs.view(), sums.data());
    return sums;
  };
  const RowVector<T> sums = column_sums(1);
  const RowVector<T> expected = a.colwise().sum().array() + T(1);
  CHECK((sums - expected).norm() <= T(rows + 1) * std::numeric_limits<T>::epsilon() * T(cols));
  CHECK(column_sums(2) == sums);
  CHECK(column_sums(3) == sums);
}

TEST_CASE("Rectified and larger lanes keep a NaN", "[ops][lanes]") {
  const Lanes<float> nan = Lanes<float>{} + std::nanf("");
  CHECK(std::isnan(rectify_lanes<float>(nan)[0]));
  CHECK(rectify_lanes<float>(Lanes<float>{} - 2.F)[0] == 0.F);
  CHECK(rectify_lanes<float>(Lanes<float>{} + 2.F)[0] == 2.F);
  CHECK(max_lanes<float>(Lanes<float>{} + 2.F, nan)[0] == 2.F);
  CHECK(std::isnan(max_lanes<float>(nan, Lanes<float>{} + 2.F)[0]));
}
