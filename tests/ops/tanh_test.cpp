// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/ops/tanh.hpp>

#include "support/catch.hpp"

namespace weir::tanh_test {

namespace {

template <class T>
T tanh_of(T x) {
  return tanh_lanes<T>(Lanes<T>{} + x)[0];
}

}  // namespace

TEMPLATE_TEST_CASE("tanh_lanes is exact to 3 units in the last place", "[ops][tanh]", float,
                   double) {
  using T = TestType;
  Rng rng(1);
  double worst = 0.0;
  for (int i = 0; i < 40000; ++i) {
    const auto share = static_cast<T>(2.0 * rng.uniform() - 1.0);
    const T x = i % 3 == 0 ? T(20) * share : (i % 3 == 1 ? share : T(1e-6) * share);
    const long double exact = std::tanh(static_cast<long double>(x));
    const T rounded = std::abs(static_cast<T>(exact));
    const T unit = std::nextafter(rounded, std::numeric_limits<T>::infinity()) - rounded;
    worst = std::max(worst, static_cast<double>(std::abs(tanh_of(x) - exact) / unit));
  }
  CHECK(worst <= 3.0);
}

TEMPLATE_TEST_CASE("tanh_lanes is odd, and saturates", "[ops][tanh]", float, double) {
  using T = TestType;
  for (T x = T(0); x <= T(12); x += T(0.11)) CHECK(tanh_of(-x) == -tanh_of(x));
  CHECK(tanh_of(T(0)) == T(0));
  CHECK(tanh_of(T(100)) == T(1));
  CHECK(tanh_of(std::numeric_limits<T>::infinity()) == T(1));
  CHECK(tanh_of(-std::numeric_limits<T>::infinity()) == T(-1));
  CHECK(tanh_of(std::numeric_limits<T>::max()) == T(1));
  CHECK(std::isnan(tanh_of(std::numeric_limits<T>::quiet_NaN())));
}

TEMPLATE_TEST_CASE("scaled_tanh over any count is that of each number", "[ops][tanh]", float,
                   double) {
  using T = TestType;
  for (Index count = 0; count < 40; ++count) {
    INFO("count " << count);
    std::vector<T> x, out(static_cast<std::size_t>(count) + 1, T(9));
    for (Index i = 0; i < count; ++i) x.push_back(static_cast<T>(i % 9) * T(0.3) - T(1));
    loops::scaled_tanh(count, T(30), x.data(), out.data());
    for (std::size_t i = 0; i < x.size(); ++i) CHECK(out[i] == T(30) * tanh_of(x[i]));
    CHECK(out.back() == T(9));  // Nothing beyond.
  }
}

}  // namespace weir::tanh_test
