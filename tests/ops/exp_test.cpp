// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/ops/exp.hpp>

#include "support/catch.hpp"

namespace weir::exp_test {

namespace {

template <class T>
T exp_of(T x) {
  return exp_lanes<T>(Lanes<T>{} + x)[0];
}

/// |a - exact| in units of the last place that the exact value has in T.
template <class T>
double error_in_units(T a, long double exact) {
  const T rounded = std::abs(static_cast<T>(exact));
  const T unit = std::nextafter(rounded, std::numeric_limits<T>::infinity()) - rounded;
  return static_cast<double>(std::abs(static_cast<long double>(a) - exact) /
                             static_cast<long double>(unit));
}

}  // namespace

TEMPLATE_TEST_CASE("exp_lanes is exact to 1.5 units in the last place", "[ops][exp]", float,
                   double) {
  using T = TestType;
  const auto lowest = static_cast<T>(std::log(2.0 * std::numeric_limits<T>::min()));
  const auto highest = static_cast<T>(std::log(std::numeric_limits<T>::max()) * 0.9999999);
  Rng rng(1);
  double worst = 0.0;
  for (int i = 0; i < 40000; ++i) {
    const auto share = static_cast<T>(rng.uniform());
    const T x = i % 2 == 0 ? lowest + share * (highest - lowest) : T(4) * share - T(2);
    worst = std::max(worst, error_in_units(exp_of(x), std::exp(static_cast<long double>(x))));
  }
  CHECK(worst <= 1.5);
}

TEMPLATE_TEST_CASE("exp_lanes at the ends of the number line", "[ops][exp]", float, double) {
  using T = TestType;
  const T infinity = std::numeric_limits<T>::infinity();
  CHECK(exp_of(T(0)) == T(1));
  CHECK(exp_of(-T(0)) == T(1));
  CHECK(exp_of(infinity) == infinity);
  CHECK(exp_of(std::numeric_limits<T>::max()) == infinity);
  CHECK(exp_of(-infinity) == T(0));
  CHECK(exp_of(std::numeric_limits<T>::lowest()) == T(0));
  CHECK(exp_of(std::log(std::numeric_limits<T>::min()) - T(0.5)) == T(0));
  CHECK(exp_of(std::log(std::numeric_limits<T>::min()) + T(0.5)) > T(0));
  CHECK(exp_of(std::log(std::numeric_limits<T>::max()) - T(0.01)) < infinity);
  CHECK(std::isnan(exp_of(std::numeric_limits<T>::quiet_NaN())));
}

TEMPLATE_TEST_CASE("sigmoid_lanes is 1 / (1 + exp(-x)) and saturates", "[ops][exp]", float,
                   double) {
  using T = TestType;
  const auto sigmoid = [](T x) { return sigmoid_lanes<T>(Lanes<T>{} + x)[0]; };
  for (T x = T(-30); x <= T(30); x += T(0.37)) {
    const long double exact = 1.0L / (1.0L + std::exp(-static_cast<long double>(x)));
    REQUIRE(error_in_units(sigmoid(x), exact) <= 3.0);
  }
  CHECK(sigmoid(T(0)) == T(0.5));
  CHECK(sigmoid(std::numeric_limits<T>::infinity()) == T(1));
  CHECK(sigmoid(-std::numeric_limits<T>::infinity()) == T(0));
  CHECK(std::isnan(sigmoid(std::numeric_limits<T>::quiet_NaN())));
}

TEMPLATE_TEST_CASE("Loops of exponentials over any count are exp_lanes of each number",
                   "[ops][exp]", float, double) {
  using T = TestType;
  const T shift = T(0.75);
  const T factor = T(0.5);  // A power of two, so that a fused multiply-add gives the same bits.
  for (Index count = 0; count < 40; ++count) {
    INFO("count " << count);
    std::vector<T> x, out(static_cast<std::size_t>(count) + 1, T(2)), sum(out);
    for (Index i = 0; i < count; ++i) x.push_back(static_cast<T>(i % 9) * T(0.3) - T(1));
    loops::exp_shifted(count, x.data(), shift, out.data());
    loops::add_exp_shifted(count, factor, x.data(), shift, sum.data());
    for (std::size_t i = 0; i < x.size(); ++i) {
      CHECK(out[i] == exp_of(x[i] - shift));
      CHECK(sum[i] == T(2) + factor * out[i]);
    }
    CHECK(out.back() == T(2));  // Nothing beyond.
    CHECK(sum.back() == T(2));
    loops::exp_shifted<T>(count, x.data(), shift, x.data());  // In place.
    CHECK(std::equal(x.begin(), x.end(), out.begin()));
  }
}

}  // namespace weir::exp_test
