// SPDX-License-Identifier: MIT
#include <cmath>
#include <limits>
#include <numbers>
#include <vector>

#include <weir/ops/rope.hpp>
#include <weir/ops/rope_scaling.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::rope_scaling_test {

namespace {

using Positions = std::vector<Index>;

Rope rope_with(const RopeScaling& scaling, Index head_dim = 8, double theta = 1e4) {
  return Rope(head_dim, {.theta = theta, .layout = RopeLayout::kHalfSplit, .scaling = scaling});
}

Matrix<double> rotated(const Rope& rope, Matrix<double> x, const Positions& positions) {
  rope.rotate<double>(x, positions);
  return x;
}

}  // namespace

TEST_CASE("LinearScaling turns at position 12 by the angles of position 3", "[ops][rope]") {
  const Matrix<double> x = test::random_matrix(1, 8, 1);
  const Matrix<double> slow = rotated(rope_with(LinearScaling{.factor = 4.0}), x, {12});
  CHECK(test::relative_error(slow, rotated(Rope(8), x, {3})) <= 1e-15);
  CHECK(rope_with(LinearScaling{.factor = 4.0}).scale() == 1.0);
}

TEST_CASE("DynamicNtkScaling raises theta by the length", "[ops][rope][golden]") {
  // theta' = 1e4 (2 * 8192 / 2048 - 1)^(8 / 6) = 1e4 * 7^(4/3); computed by a separate script.
  const DynamicNtkScaling ntk{.factor = 2.0, .original_context = 2048, .length = 8192};
  const List<double> f = rope_with(ntk).frequencies();
  CHECK(f[0] == 1.0);
  CHECK(f[1] == Approx(0.052275795857471025).epsilon(1e-13));
  CHECK(f[2] == Approx(0.0027327588325319844).epsilon(1e-13));
  // The last pair is slowed down by factor l / original_context - (factor - 1) = 7.
  CHECK(f[3] == Approx(0.001 / 7.0).epsilon(1e-13));
}

TEST_CASE("DynamicNtkScaling changes nothing up to the original context", "[ops][rope]") {
  for (const Index length : {0, 1, 2048}) {
    const DynamicNtkScaling ntk{.factor = 3.0, .original_context = 2048, .length = length};
    CHECK(rope_with(ntk).frequencies() == Rope(8).frequencies());
  }
}

TEST_CASE("LongRopeScaling divides each frequency by a factor of its own", "[ops][rope]") {
  LongRopeScaling scaling{.short_factors = {1.0, 2.0, 4.0, 5.0},
                          .long_factors = {1.5, 3.0, 10.0, 20.0},
                          .short_mscale = 1.25,
                          .long_mscale = 1.5,
                          .original_context = 16,
                          .length = 16};
  const List<double> plain = Rope(8).frequencies();  // 1, 0.1, 0.01 and 0.001
  const Rope near = rope_with(scaling);
  CHECK(near.frequencies()[1] == Approx(0.05));
  CHECK(near.frequencies()[3] == Approx(0.0002));
  CHECK(near.scale() == 1.25);
  scaling.length = 17;
  const Rope far = rope_with(scaling);
  for (Index i = 0; i < 4; ++i) {
    CHECK(far.frequencies()[i] ==
          Approx(plain[i] / scaling.long_factors[static_cast<std::size_t>(i)]));
  }
  CHECK(far.scale() == 1.5);
  CHECK(score_scale(scaling) == 1.0);

  // A rotation by an angle and a factor: the norm grows by the factor.
  const Matrix<double> x = test::random_matrix(1, 8, 3);
  CHECK(rotated(far, x, {5}).norm() == Approx(1.5 * x.norm()));
}

TEST_CASE("LongRopeScaling says what is wrong", "[ops][rope]") {
  const auto message = [](auto change) {
    LongRopeScaling scaling{.short_factors = {1.0, 1.0, 1.0, 1.0},
                            .long_factors = {1.0, 1.0, 1.0, 1.0}};
    change(scaling);
    return test::message_of<ConfigError>([&] { rope_with(scaling); });
  };
  CHECK(message([](LongRopeScaling& s) { s.short_factors.pop_back(); }) ==
        "Rope: long_rope.short_factors has 3 entries, expected 4, one for each pair");
  CHECK(message([](LongRopeScaling& s) { s.long_factors[2] = 0.0; }) ==
        "Rope: long_rope.long_factors = 0, expected a finite number > 0");
  CHECK(message([](LongRopeScaling& s) { s.long_mscale = -1.0; }) ==
        "Rope: long_rope.long_mscale = -1, expected a finite number > 0");
  CHECK(message([](LongRopeScaling& s) { s.short_mscale = 0.0; }) ==
        "Rope: long_rope.short_mscale = 0, expected a finite number > 0");
  CHECK(message([](LongRopeScaling& s) { s.original_context = 0; }) ==
        "Rope: long_rope.original_context = 0, expected >= 1");
  CHECK(message([](LongRopeScaling& s) { s.length = -1; }) ==
        "Rope: long_rope.length = -1, expected >= 0");
}

TEST_CASE("Scalings with factor 1 change nothing", "[ops][rope]") {
  CHECK(rope_with(LinearScaling{}).frequencies() == Rope(8).frequencies());
  CHECK(rope_with(Llama3Scaling{.factor = 1.0}).frequencies()[3] ==
        Approx(Rope(8).frequencies()[3]).epsilon(1e-15));
}

TEST_CASE("score_scale is that of the kind", "[ops][rope]") {
  const Yarn yarn{.factor = 40.0, .mscale = 0.707, .mscale_all_dim = 0.707};
  CHECK(score_scale(yarn) == yarn.score_scale());
  CHECK(score_scale(NoScaling{}) == 1.0);
  CHECK(score_scale(LinearScaling{.factor = 2.0}) == 1.0);
  CHECK(score_scale(DynamicNtkScaling{.factor = 2.0}) == 1.0);
  CHECK(score_scale(Llama3Scaling{}) == 1.0);
}

TEST_CASE("Rope with any scaling is orthogonal up to its scale, and depends on distances",
          "[ops][rope][property]") {
  const std::vector<RopeScaling> kinds = {
      NoScaling{}, LinearScaling{.factor = 3.0},
      DynamicNtkScaling{.factor = 2.0, .original_context = 16, .length = 100},
      Llama3Scaling{.factor = 4.0, .original_context = 32},
      Yarn{.factor = 4.0, .original_context = 32}};
  const Matrix<double> q = test::random_matrix(1, 8, 2);
  const Matrix<double> k = test::random_matrix(1, 8, 3);
  for (const RopeScaling& kind : kinds) {
    INFO("kind " << kind.index());
    const Rope rope = rope_with(kind, 8, 100.0);
    const auto product = [&](Index i, Index j) {
      return rotated(rope, q, {i}).row(0).dot(rotated(rope, k, {j}).row(0));
    };
    CHECK(product(1004, 1000) == Approx(product(7, 3)).epsilon(1e-10));
    CHECK(rotated(rope, q, {9}).norm() == Approx(rope.scale() * q.norm()));
    Matrix<double> back = rotated(rope, q, {9});
    rope.rotate_back<double>(back, Positions{9});
    CHECK(test::relative_error(back, rope.scale() * rope.scale() * q) <= 1e-14);
  }
}

TEST_CASE("RopeScaling says what is wrong", "[ops][rope]") {
  const auto message = [](const RopeScaling& scaling, Index head_dim = 8) {
    return test::message_of<ConfigError>([&] { rope_with(scaling, head_dim); });
  };
  CHECK(message(LinearScaling{.factor = 0.9}) ==
        "Rope: linear.factor = 0.9, expected a finite number >= 1");
  CHECK(message(LinearScaling{.factor = std::numeric_limits<double>::quiet_NaN()}) ==
        "Rope: linear.factor = nan, expected a finite number >= 1");
  CHECK(message(DynamicNtkScaling{.factor = 0.0}) ==
        "Rope: dynamic_ntk.factor = 0, expected a finite number >= 1");
  CHECK(message(DynamicNtkScaling{.original_context = 0}) ==
        "Rope: dynamic_ntk.original_context = 0, expected >= 1");
  CHECK(message(DynamicNtkScaling{.length = -1}) == "Rope: dynamic_ntk.length = -1, expected >= 0");
  CHECK(message(DynamicNtkScaling{}, 2) ==
        "Rope: 2 rotated numbers, expected >= 4 with DynamicNtkScaling");
}

}  // namespace weir::rope_scaling_test
