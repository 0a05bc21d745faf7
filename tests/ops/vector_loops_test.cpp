// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <weir/ops/vector_loops.hpp>

#include "support/catch.hpp"

namespace weir::vector_loops_test {

namespace {

/// 1, 2, 3, ...
template <class T>
std::vector<T> counted(Index count) {
  std::vector<T> numbers(static_cast<std::size_t>(count));
  std::iota(numbers.begin(), numbers.end(), T(1));
  return numbers;
}

}  // namespace

TEMPLATE_TEST_CASE("Named loops over any count do what they say, and touch nothing beyond",
                   "[ops][vector_loops]", float, double) {
  using T = TestType;
  using Array = Eigen::Array<T, Eigen::Dynamic, 1>;
  for (Index count = 0; count < 70; ++count) {
    INFO("count " << count);
    // Small whole numbers: every order of every sum is exact.
    Array a(count), b(count);
    for (Index i = 0; i < count; ++i) {
      a[i] = static_cast<T>(i % 7 - 3);
      b[i] = static_cast<T>(i % 5 - 2);
    }
    const auto check = [&](const Array& expected, auto&& loop) {
      Array out = Array::Constant(count + 1, T(9));
      loop(out.data());
      CHECK((out.head(count) == expected).all());
      CHECK(out[count] == T(9));
    };
    check(T(3) * a, [&](T* out) { loops::scale(count, T(3), a.data(), out); });
    check(a + b, [&](T* out) { loops::add(count, a.data(), b.data(), out); });
    check(a * b, [&](T* out) { loops::multiply(count, a.data(), b.data(), out); });
    check(T(2) * a - T(3) * b,
          [&](T* out) { loops::blend(count, T(2), a.data(), T(-3), b.data(), out); });
    check(T(9) - T(2) * a, [&](T* out) { loops::add_scaled(count, T(-2), a.data(), out); });
    // In place.
    check(T(9) * a, [&](T* out) { loops::multiply<T>(count, out, a.data(), out); });
    check(T(9) + a, [&](T* out) { loops::add<T>(count, a.data(), out, out); });

    CHECK(loops::sum(count, a.data()) == a.sum());
    CHECK(loops::sum_of_squares(count, a.data()) == a.square().sum());
    CHECK(loops::dot(count, a.data(), b.data()) == (a * b).sum());
    CHECK(loops::dot(count, a.data(), b.data(), a.data()) == (a * b * a).sum());
    CHECK(loops::sum_of_squares_as_double(count, a.data()) ==
          static_cast<double>(a.square().sum()));
  }
}

TEST_CASE("Squares are summed in double beyond the range of a float", "[ops][vector_loops]") {
  for (const Index count : {1, 7, 37}) {
    const std::vector<float> large(static_cast<std::size_t>(count), 1e30F);
    const double square = static_cast<double>(1e30F) * static_cast<double>(1e30F);
    CHECK(loops::sum_of_squares_as_double(count, large.data()) ==
          Approx(static_cast<double>(count) * square));
  }
}

TEMPLATE_TEST_CASE("Sums and maxima over any count are those of the standard library",
                   "[ops][vector_loops]", float, double) {
  using T = TestType;
  const auto nan_at_zero = [](const Lanes<T>& x) -> Lanes<T> { return x / x; };
  for (Index count = 0; count < 150; ++count) {
    INFO("count " << count);
    std::vector<T> numbers = counted<T>(count);
    CHECK(loops::sum(count, numbers.data()) == static_cast<T>(count * (count + 1) / 2));
    CHECK(sum_lanes<T>(count, nan_at_zero, numbers.data()) == static_cast<T>(count));
    std::rotate(numbers.begin(), numbers.begin() + count / 3, numbers.end());
    if (count == 0) {
      CHECK(loops::max(count, numbers.data()) == -std::numeric_limits<T>::infinity());
      continue;
    }
    CHECK(loops::max(count, numbers.data()) == static_cast<T>(count));
    for (T& x : numbers) x = -x;
    CHECK(loops::max(count, numbers.data()) == T(-1));
    if (count > 1) {
      *std::max_element(numbers.begin(), numbers.end()) = std::numeric_limits<T>::quiet_NaN();
      CHECK(loops::max(count, numbers.data()) == T(-2));
    }
  }
}

TEMPLATE_TEST_CASE("Dot products and scaled sums over any count are those of whole numbers",
                   "[ops][vector_loops]", float, double) {
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
    CHECK(loops::dot<T>(count, a.data(), b.data()) == expected);
    CHECK(loops::dot<T>(count, a.data(), a.data()) ==
          static_cast<T>(count * (count + 1) * (2 * count + 1) / 6));
    loops::add_scaled<T>(count, T(-2), a.data(), sum.data());
    for (std::size_t i = 0; i < n; ++i) CHECK(sum[i] == T(-1) - T(2) * a[i]);
    CHECK(sum.back() == T(-1));  // Nothing beyond.
  }
  // A sum may be added to itself.
  std::vector<T> twice = counted<T>(37);
  loops::add_scaled<T>(37, T(1), twice.data(), twice.data());
  CHECK(twice[36] == T(74));
  // What is not a number stays none.
  const std::vector<T> nan(2, std::numeric_limits<T>::quiet_NaN());
  CHECK(std::isnan(loops::dot<T>(2, twice.data(), nan.data())));
  loops::add_scaled<T>(2, T(0), nan.data(), twice.data());
  CHECK(std::isnan(twice[0]));
}

TEMPLATE_TEST_CASE("An element is mapped to the same bits wherever it lies", "[ops][vector_loops]",
                   float, double) {
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

}  // namespace weir::vector_loops_test
