// SPDX-License-Identifier: MIT
#include <cmath>

#include <weir/core/init.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::init_test {

namespace {
double stddev(const Matrix<double>& m) {
  return std::sqrt((m.array() - m.mean()).square().mean());
}
}  // namespace

TEST_CASE("uniform_init keeps the variance of its input", "[core][init]") {
  Rng rng(1);
  const Matrix<double> w = uniform_init<double>(64, 300, rng);
  CHECK(w.cwiseAbs().maxCoeff() <= std::sqrt(3.0 / 300.0));
  CHECK(stddev(w) == Approx(std::sqrt(1.0 / 300.0)).epsilon(0.02));
}

TEST_CASE("normal_init has the standard deviation asked for", "[core][init]") {
  Rng rng(2);
  CHECK(stddev(normal_init<double>(100, 200, 0.02, rng)) == Approx(0.02).epsilon(0.02));
}

TEST_CASE("switch_init is a truncated normal of the published width", "[core][init]") {
  Rng rng(3);
  const auto scale = GENERATE(0.1, 1.0);
  const Matrix<double> w = switch_init<double>(128, 256, rng, scale);
  const double sigma = std::sqrt(scale / 256.0);
  CHECK(w.cwiseAbs().maxCoeff() <= 2.0 * sigma);
  // A normal cut at two standard deviations keeps 0.8796 of its own.
  CHECK(stddev(w) == Approx(0.8796 * sigma).epsilon(0.02));
}

TEST_CASE("switch_init takes the columns for the fan-in, whatever the rows", "[core][init]") {
  Rng rng(4);
  const double few = stddev(switch_init<double>(100, 100, rng));
  const double many = stddev(switch_init<double>(1600, 100, rng));
  CHECK(many == Approx(few).epsilon(0.05));
}

TEST_CASE("Initial weights repeat for a seed", "[core][init]") {
  Rng a(5);
  Rng b(5);
  CHECK(switch_init<float>(7, 9, a) == switch_init<float>(7, 9, b));
}

TEST_CASE("Weights are left unset for a generator that says so", "[core][init]") {
  Rng rng = Rng::unset();
  CHECK(switch_init<float>(3, 4, rng).size() == 12);
  CHECK(normal_init<double>(3, 4, 1.0, rng).size() == 12);
  CHECK(uniform_init<float>(3, 4, rng).size() == 12);
  CHECK(rng.position() == 0);
}

TEST_CASE("switch_init refuses a scale that is not positive", "[core][init]") {
  Rng rng(6);
  CHECK(test::message_of<ConfigError>([&] { switch_init<float>(2, 2, rng, 0.0); }) ==
        "switch_init: scale = 0, expected a finite number > 0");
}

}  // namespace weir::init_test
