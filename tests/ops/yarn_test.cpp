// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <vector>

#include <weir/ops/rope.hpp>
#include <weir/ops/yarn.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::yarn_test {

namespace {

/// Pairs of a head of 8 with theta = 16 have frequencies 1, 1/2, 1/4 and 1/8. With a context of 64,
/// pair i turns 2^-i * 64 / (2 pi) times: i turns of pair `pair` are turns_of(pair).
double turns_of(double pair) {
  return std::exp2(-pair) * 64.0 / (2.0 * std::numbers::pi);
}

Rope small_rope(const Yarn& yarn) {
  return Rope(8, {.theta = 16.0, .layout = RopeLayout::kHalfSplit, .scaling = yarn});
}

void check_frequencies(const Rope& rope, const List<double>& expected) {
  REQUIRE(rope.frequencies().size() == expected.size());
  for (Index i = 0; i < expected.count(); ++i) {
    CHECK(rope.frequencies()[i] == Approx(expected[i]).epsilon(1e-13));
  }
}

}  // namespace

TEST_CASE("Yarn mixes frequencies by a ramp worked out by hand", "[ops][yarn][golden]") {
  Yarn yarn{.factor = 4.0, .original_context = 64};
  SECTION("between pairs 1 and 3, neither rounded") {
    yarn.beta_fast = turns_of(1.0);
    yarn.beta_slow = turns_of(3.0);
    yarn.truncate = false;
    // ramp 0, 0, 1/2, 1.
    check_frequencies(small_rope(yarn), {1.0, 0.5, 0.5 * (0.25 + 0.0625), 0.125 / 4.0});
  }
  SECTION("between fractions of pairs, which are rounded outwards") {
    yarn.beta_fast = turns_of(0.5);
    yarn.beta_slow = turns_of(2.5);
    // ramp 0, 1/3, 2/3, 1.
    check_frequencies(small_rope(yarn),
                      {1.0, 0.5 * (2.0 + 0.25) / 3.0, 0.25 * (1.0 + 0.5) / 3.0, 0.125 / 4.0});
  }
  SECTION("between fractions of pairs, as they are") {
    yarn.beta_fast = turns_of(0.5);
    yarn.beta_slow = turns_of(2.5);
    yarn.truncate = false;
    // ramp 0, 1/4, 3/4, 1.
    check_frequencies(small_rope(yarn),
                      {1.0, 0.5 * (3.0 + 0.25) / 4.0, 0.25 * (1.0 + 0.75) / 4.0, 0.125 / 4.0});
  }
}

TEST_CASE("Yarn of gpt-oss-20b has the ramp and scale of its configuration",
          "[ops][yarn][golden]") {
  // low = 32 ln(4096 / (64 pi)) / ln 150000 = 8.0928, high = 32 ln(4096 / (2 pi)) / ln 150000 =
  // 17.3980; the cosines and sines are multiplied by 0.1 ln 32 + 1.
  const Yarn yarn{.factor = 32.0, .original_context = 4096, .truncate = false};
  CHECK(yarn.ramp(8, 64, 150000.0) == 0.0);
  CHECK(yarn.ramp(9, 64, 150000.0) == Approx((9.0 - 8.0928) / (17.3980 - 8.0928)).epsilon(1e-3));
  CHECK(yarn.ramp(17, 64, 150000.0) == Approx((17.0 - 8.0928) / (17.3980 - 8.0928)).epsilon(1e-3));
  CHECK(yarn.ramp(18, 64, 150000.0) == 1.0);
  CHECK(yarn.rotation_scale() == Approx(1.3465735902799727).epsilon(1e-14));
  CHECK(yarn.score_scale() == 1.0);
}

TEST_CASE("Yarn of DeepSeek scales the score and not the rotation", "[ops][yarn][golden]") {
  // (0.1 * 0.707 * ln 40 + 1)^2.
  const Yarn lite{.factor = 40.0, .mscale = 0.707, .mscale_all_dim = 0.707};
  CHECK(lite.rotation_scale() == 1.0);
  CHECK(lite.score_scale() == Approx(1.5896261651208736).epsilon(1e-14));
  CHECK(Rope(64, {.theta = 1e4, .layout = RopeLayout::kInterleaved, .scaling = lite}).scale() ==
        1.0);
}

TEST_CASE("Yarn with factor 1 changes nothing", "[ops][yarn]") {
  const Rope with = small_rope({.factor = 1.0, .original_context = 64});
  const Rope without(8, {.theta = 16.0});
  CHECK(with.scale() == 1.0);
  for (Index i = 0; i < 4; ++i) {
    CHECK(with.frequencies()[i] == Approx(without.frequencies()[i]).epsilon(1e-15));
  }
}

TEST_CASE("Yarn keeps each frequency between the old one and the old one over factor",
          "[ops][yarn][property]") {
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    const Matrix<double> u = test::random_matrix(1, 6, seed).array().abs().min(1.0);
    const Index head_dim = 2 + 2 * static_cast<Index>(40.0 * u(0, 0));
    const double theta = 1.5 + 1e5 * u(0, 1);
    const Yarn yarn{.factor = 1.0 + 50.0 * u(0, 2),
                    .original_context = 1 + static_cast<Index>(1e4 * u(0, 3)),
                    .beta_fast = 2.0 + 60.0 * u(0, 4),
                    .beta_slow = 0.1 + u(0, 5),
                    .truncate = seed % 2 == 0};
    const Rope rope(head_dim, {.theta = theta, .layout = RopeLayout::kHalfSplit, .scaling = yarn});
    const Rope old(head_dim, {.theta = theta});
    double ramp = 0.0;
    for (Index i = 0; i < head_dim / 2; ++i) {
      INFO("seed " << seed << ", pair " << i);
      CHECK(yarn.ramp(i, head_dim, theta) >= ramp);
      ramp = yarn.ramp(i, head_dim, theta);
      CHECK(rope.frequencies()[i] <= old.frequencies()[i] * (1.0 + 1e-14));
      CHECK(rope.frequencies()[i] >= old.frequencies()[i] / yarn.factor * (1.0 - 1e-14));
    }
  }
}

TEST_CASE("Yarn with all pairs fast keeps frequencies, with all slow divides them", "[ops][yarn]") {
  check_frequencies(small_rope({.factor = 8.0, .original_context = 1'000'000'000}),
                    {1.0, 0.5, 0.25, 0.125});
  check_frequencies(small_rope({.factor = 8.0, .original_context = 1}),
                    {1.0, 0.5 / 8.0, 0.25 / 8.0, 0.125 / 8.0});
}

TEST_CASE("Rope with a Yarn turns by its frequencies and scales by its scale", "[ops][yarn]") {
  const auto layout = GENERATE(RopeLayout::kHalfSplit, RopeLayout::kInterleaved);
  const Yarn yarn{.factor = 4.0, .original_context = 64};
  const Rope rope(8, {.theta = 16.0, .layout = layout, .scaling = yarn});
  const std::vector<Index> positions = {5, 100};
  Matrix<double> x = Matrix<double>::Zero(2, 8);
  const Index second = layout == RopeLayout::kHalfSplit ? 4 : 1;
  x.col(0).setOnes();
  rope.rotate<double>(x, positions);
  CHECK(rope.scale() == Approx(0.1 * std::log(4.0) + 1.0));
  for (Index t = 0; t < 2; ++t) {
    const double angle =
        rope.frequencies()[0] * static_cast<double>(positions[static_cast<std::size_t>(t)]);
    CHECK(x(t, 0) == Approx(rope.scale() * std::cos(angle)));
    CHECK(x(t, second) == Approx(rope.scale() * std::sin(angle)));
  }
}

TEST_CASE("Rope with a Yarn makes products depend on distance alone", "[ops][yarn]") {
  const Rope rope(8, {.theta = 1e4,
                      .layout = RopeLayout::kHalfSplit,
                      .scaling = Yarn{.factor = 16.0, .original_context = 128}});
  const Matrix<double> q = test::random_matrix(1, 8, 2);
  const Matrix<double> k = test::random_matrix(1, 8, 3);
  const auto product = [&](Index i, Index j) {
    Matrix<double> turned_q = q;
    Matrix<double> turned_k = k;
    rope.rotate<double>(turned_q, std::vector<Index>{i});
    rope.rotate<double>(turned_k, std::vector<Index>{j});
    return turned_q.row(0).dot(turned_k.row(0));
  };
  CHECK(product(7, 3) == Approx(product(1004, 1000)).epsilon(1e-10));
  CHECK(product(7, 7) == Approx(rope.scale() * rope.scale() * q.row(0).dot(k.row(0))));
}

TEST_CASE("Rope gradient with a scaling Yarn agrees with finite differences",
          "[ops][yarn][gradient]") {
  const auto layout = GENERATE(RopeLayout::kHalfSplit, RopeLayout::kInterleaved);
  const Rope rope(
      4, {.theta = 50.0, .layout = layout, .scaling = Yarn{.factor = 4.0, .original_context = 16}});
  const std::vector<Index> positions = {2, 0, 9};
  Matrix<double> x = test::random_matrix(3, 8, 7);
  const Matrix<double> weight = test::random_matrix(3, 8, 8);
  Matrix<double> analytic = weight;
  rope.rotate_back<double>(analytic, positions);
  const Matrix<double> numeric = test::numeric_gradient(x, [&] {
    Matrix<double> y = x;
    rope.rotate<double>(y, positions);
    return y.cwiseProduct(weight).sum();
  });
  CHECK(test::relative_error(analytic, numeric) <= 1e-8);
}

TEST_CASE("Yarn says what is wrong", "[ops][yarn]") {
  const auto message = [](const Yarn& yarn, double theta = 1e4) {
    return test::message_of<ConfigError>(
        [&] { Rope(8, {.theta = theta, .layout = RopeLayout::kHalfSplit, .scaling = yarn}); });
  };
  CHECK(message({.factor = 0.5}) == "Rope: yarn.factor = 0.5, expected a finite number >= 1");
  CHECK(message({.factor = std::numeric_limits<double>::quiet_NaN()}) ==
        "Rope: yarn.factor = nan, expected a finite number >= 1");
  CHECK(message({.factor = std::numeric_limits<double>::infinity()}) ==
        "Rope: yarn.factor = inf, expected a finite number >= 1");
  CHECK(message({.original_context = 0}) == "Rope: yarn.original_context = 0, expected >= 1");
  CHECK(message({.beta_slow = 0.0}) == "Rope: yarn.beta_slow = 0, expected a finite number > 0");
  CHECK(message({.beta_fast = std::numeric_limits<double>::quiet_NaN()}) ==
        "Rope: yarn.beta_fast = nan, expected a finite number > 0");
  CHECK(message({.beta_fast = 0.5}) == "Rope: yarn.beta_fast = 0.5, expected >= beta_slow = 1");
  CHECK(message({.mscale = -1.0}) == "Rope: yarn.mscale = -1, expected a finite number >= 0");
  CHECK(message({.mscale = std::numeric_limits<double>::infinity()}) ==
        "Rope: yarn.mscale = inf, expected a finite number >= 0");
  CHECK(message({.mscale_all_dim = -1.0}) ==
        "Rope: yarn.mscale_all_dim = -1, expected a finite number >= 0");
  CHECK(message({}, 1.0) == "Rope: theta = 1, expected > 1 with a Yarn");
  CHECK(message({}, 0.5) == "Rope: theta = 0.5, expected > 1 with a Yarn");
  CHECK(message({}, std::nextafter(1.0, 2.0)) == "no exception");
  CHECK(test::message_of<ConfigError>([] {
          Yarn{}.check("Here", 8, std::numeric_limits<double>::quiet_NaN());
        }) == "Here: theta = nan, expected > 1 with a Yarn");
}

}  // namespace weir::yarn_test
