// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>

#include <weir/core/random.hpp>
#include <weir/ops/trigonometry.hpp>

#include "support/catch.hpp"

namespace weir::trigonometry_test {

TEST_CASE("Sines and cosines are those of the standard library", "[ops][trigonometry]") {
  // From small angles to far beyond where they are reduced by lanes.
  const double range = GENERATE(1.0, 10.0, 1e3, 1e6, 1e9);
  Rng rng(3);
  double worst = 0.0;
  for (int i = 0; i < 20000; ++i) {
    const double x = range * (2.0 * rng.uniform() - 1.0);
    const SineCosine of_x = sine_cosine_lanes(Lanes<double>{} + x);
    const auto exact = static_cast<long double>(x);
    worst = std::max(worst, static_cast<double>(std::abs(of_x.sine[0] - std::sin(exact))));
    worst = std::max(worst, static_cast<double>(std::abs(of_x.cosine[0] - std::cos(exact))));
  }
  CHECK(worst <= 4e-16);
}

TEST_CASE("Sines and cosines of what is special", "[ops][trigonometry]") {
  const auto sine = [](double x) { return sine_cosine_lanes(Lanes<double>{} + x).sine[0]; };
  const auto cosine = [](double x) { return sine_cosine_lanes(Lanes<double>{} + x).cosine[0]; };
  CHECK(sine(0.0) == 0.0);
  CHECK(cosine(0.0) == 1.0);
  CHECK(std::isnan(sine(std::numeric_limits<double>::infinity())));
  CHECK(std::isnan(cosine(std::nan(""))));

  // Lanes do not depend on each other.
  Lanes<double> mixed{};
  mixed[0] = 1e12;
  mixed[1] = 0.5;
  CHECK(sine_cosine_lanes(mixed).sine[0] == std::sin(1e12));
  CHECK(sine_cosine_lanes(mixed).sine[1] == sine(0.5));
}

}  // namespace weir::trigonometry_test
