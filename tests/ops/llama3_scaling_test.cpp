// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>

#include <weir/ops/llama3_scaling.hpp>
#include <weir/ops/rope.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::llama3_scaling_test {

namespace {

double plain(Index pair, Index dim, double theta) {
  return std::pow(theta, -2.0 * static_cast<double>(pair) / static_cast<double>(dim));
}

}  // namespace

TEST_CASE("Llama3Scaling has the frequencies of Llama 3.1", "[ops][rope][golden]") {
  // Computed by a separate script from the wavelengths 2 pi / f.
  const Llama3Scaling llama{
      .factor = 8.0, .low_freq_factor = 1.0, .high_freq_factor = 4.0, .original_context = 8192};
  const Rope rope(128, {.theta = 5e5, .layout = RopeLayout::kHalfSplit, .scaling = llama});
  const List<double>& f = rope.frequencies();
  CHECK(rope.scale() == 1.0);
  CHECK(f[0] == 1.0);
  CHECK(f[28] == Approx(0.003211445994752591).epsilon(1e-13));
  CHECK(f[29] == Approx(0.002166570763503359).epsilon(1e-13));
  CHECK(f[30] == Approx(0.0013718935677611381).epsilon(1e-13));
  CHECK(f[34] == Approx(0.0001785078127679964).epsilon(1e-13));
  CHECK(f[35] == Approx(9.556212353964683e-05).epsilon(1e-13));
  CHECK(f[63] == Approx(3.068925988914511e-07).epsilon(1e-13));
}

TEST_CASE("Llama3Scaling of Llama 4 Scout slows 29 of 64 pairs down 16 times",
          "[ops][rope][golden]") {
  const Llama3Scaling scout{
      .factor = 16.0, .low_freq_factor = 1.0, .high_freq_factor = 1.0, .original_context = 8192};
  const Rope rope(128, {.theta = 5e5, .layout = RopeLayout::kInterleaved, .scaling = scout});
  for (Index i = 0; i < 64; ++i) {
    INFO("pair " << i);
    // Pair 35 is the first whose wavelength, 8219, exceeds 8192.
    CHECK(rope.frequencies()[i] ==
          Approx(plain(i, 128, 5e5) / (i < 35 ? 1.0 : 16.0)).epsilon(1e-13));
  }
}

TEST_CASE("Llama3Scaling keeps each frequency between the old one and the old one over factor",
          "[ops][rope][property]") {
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    const Matrix<double> u = test::random_matrix(1, 6, seed).array().abs().min(1.0);
    const Index dim = 2 + 2 * static_cast<Index>(40.0 * u(0, 0));
    const double theta = 0.5 + 1e5 * u(0, 1);
    const double low = 0.1 + 3.0 * u(0, 4);
    const Llama3Scaling scaling{.factor = 1.0 + 50.0 * u(0, 2),
                                .low_freq_factor = low,
                                .high_freq_factor = seed % 5 == 0 ? low : low + 9.0 * u(0, 5),
                                .original_context = 1 + static_cast<Index>(1e4 * u(0, 3))};
    for (Index i = 0; i < dim / 2; ++i) {
      INFO("seed " << seed << ", pair " << i);
      const double old = plain(i, dim, theta);
      const double turns =
          static_cast<double>(scaling.original_context) * old / (2.0 * std::numbers::pi);
      const double f = scaling.frequency(i, dim, theta);
      CHECK(f <= old * (1.0 + 1e-14));
      CHECK(f >= old / scaling.factor * (1.0 - 1e-14));
      if (turns > scaling.high_freq_factor) CHECK(f == Approx(old).epsilon(1e-14));
      if (turns < low) CHECK(f == Approx(old / scaling.factor).epsilon(1e-14));
    }
  }
}

TEST_CASE("Llama3Scaling says what is wrong", "[ops][rope]") {
  const auto message = [](const Llama3Scaling& scaling) {
    return test::message_of<ConfigError>(
        [&] { Rope(8, {.theta = 1e4, .layout = RopeLayout::kHalfSplit, .scaling = scaling}); });
  };
  CHECK(message({.factor = 0.5}) == "Rope: llama3.factor = 0.5, expected a finite number >= 1");
  CHECK(message({.factor = std::numeric_limits<double>::infinity()}) ==
        "Rope: llama3.factor = inf, expected a finite number >= 1");
  CHECK(message({.low_freq_factor = 0.0}) ==
        "Rope: llama3.low_freq_factor = 0, expected a finite number > 0");
  CHECK(message({.low_freq_factor = 2.0, .high_freq_factor = 1.5}) ==
        "Rope: llama3.high_freq_factor = 1.5, expected a finite number >= 2");
  CHECK(message({.original_context = 0}) == "Rope: llama3.original_context = 0, expected >= 1");
}

}  // namespace weir::llama3_scaling_test
