// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <type_traits>

#include <weir/ops/normal.hpp>

#include "support/catch.hpp"

namespace weir::normal_test {

namespace {

template <class T>
double cdf(double z) {
  return normal_lanes<T>(Lanes<double>{} + z).cdf[0];
}

template <class T>
double density(double z) {
  return normal_lanes<T>(Lanes<double>{} + z).density[0];
}

double exact_cdf(double z) {
  return static_cast<double>(std::erfc(-static_cast<long double>(z) * std::sqrt(0.5L)) / 2.0L);
}

}  // namespace

TEMPLATE_TEST_CASE("The normal distribution is that of erfc, far into the tail", "[ops][normal]",
                   float, double) {
  // As far as the result is a number of this type.
  constexpr bool kSingle = std::is_same_v<TestType, float>;
  const double lowest = kSingle ? -12.9 : -37.0;
  const double bound = kSingle ? 3e-8 : 1e-15;
  double worst = 0.0;
  double worst_density = 0.0;
  for (double z = lowest; z <= 12.0; z += 0.00771) {
    const auto input = static_cast<double>(static_cast<TestType>(z));
    worst = std::max(worst, std::abs(cdf<TestType>(input) / exact_cdf(input) - 1.0));
    const long double x = input;
    const long double exact =
        std::exp(-x * x / 2.0L) / std::sqrt(2.0L * std::numbers::pi_v<long double>);
    worst_density = std::max(
        worst_density, std::abs(static_cast<double>(density<TestType>(input) / exact - 1.0L)));
  }
  CHECK(worst <= bound);
  CHECK(worst_density <= bound);
}

TEST_CASE("The normal distribution at its ends and its middle", "[ops][normal]") {
  const double infinity = std::numeric_limits<double>::infinity();
  CHECK(cdf<double>(0.0) == Approx(0.5).epsilon(1e-15));
  CHECK(cdf<double>(infinity) == 1.0);
  CHECK(cdf<double>(40.0) == 1.0);
  CHECK(cdf<double>(-infinity) == 0.0);
  CHECK(cdf<double>(-40.0) == 0.0);
  CHECK(density<double>(infinity) == 0.0);
  CHECK(density<double>(0.0) == Approx(1.0 / std::sqrt(2.0 * std::numbers::pi)).epsilon(1e-15));
  CHECK(std::isnan(cdf<double>(std::nan(""))));
  CHECK(std::isnan(density<double>(std::nan(""))));
}

}  // namespace weir::normal_test
