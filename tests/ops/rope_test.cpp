// SPDX-License-Identifier: MIT
#include <cmath>
#include <numbers>
#include <span>
#include <vector>

#include <weir/ops/rope.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::rope_test {

namespace {

using Positions = std::vector<Index>;

Matrix<double> rotated(const Rope& rope, Matrix<double> x, const Positions& positions) {
  rope.rotate<double>(x, positions);
  return x;
}

}  // namespace

TEST_CASE("Rope frequencies fall from 1 towards 1 / theta", "[ops][rope][golden]") {
  // theta^(-2i / head_dim) = 10000^(-i / 4).
  const Rope rope(8);
  CHECK(rope.head_dim() == 8);
  REQUIRE(rope.frequencies().size() == 4);
  CHECK(rope.frequencies()[0] == 1.0);
  CHECK(rope.frequencies()[1] == Approx(0.1));
  CHECK(rope.frequencies()[2] == Approx(0.01));
  CHECK(rope.frequencies()[3] == Approx(0.001));
}

TEST_CASE("Rope turns pairs by hand-worked angles", "[ops][rope][golden]") {
  // theta = 4 and head_dim = 4: frequencies 1 and 1/2. Position 1, x = (1, 2, 3, 4).
  const double c = std::cos(1.0);
  const double s = std::sin(1.0);
  const double c2 = std::cos(0.5);
  const double s2 = std::sin(0.5);
  Matrix<double> x(1, 4);
  x << 1, 2, 3, 4;
  Matrix<double> expected(1, 4);

  SECTION("half-split pairs (1, 3) and (2, 4)") {
    expected << c - 3 * s, 2 * c2 - 4 * s2, 3 * c + s, 4 * c2 + 2 * s2;
    CHECK(test::relative_error(rotated(Rope(4, {.theta = 4.0}), x, {1}), expected) <= 1e-15);
  }
  SECTION("interleaved pairs (1, 2) and (3, 4)") {
    expected << c - 2 * s, 2 * c + s, 3 * c2 - 4 * s2, 4 * c2 + 3 * s2;
    CHECK(test::relative_error(
              rotated(Rope(4, {.theta = 4.0, .layout = RopeLayout::kInterleaved}), x, {1}),
              expected) <= 1e-15);
  }
}

TEST_CASE("Rope leaves position 0 alone and rotates every head alike", "[ops][rope]") {
  const auto layout = GENERATE(RopeLayout::kHalfSplit, RopeLayout::kInterleaved);
  const Rope rope(6, {.theta = 100.0, .layout = layout});
  const Matrix<double> x = test::random_matrix(2, 18, 1);
  const Matrix<double> y = rotated(rope, x, {0, 13});

  CHECK(y.row(0) == x.row(0));
  for (Index head = 0; head < 3; ++head) {
    const Matrix<double> one = x.block(1, 6 * head, 1, 6);
    CHECK(rotated(rope, one, {13}) == y.block(1, 6 * head, 1, 6));
  }
}

TEST_CASE("Rope makes products depend on distance alone", "[ops][rope]") {
  const auto layout = GENERATE(RopeLayout::kHalfSplit, RopeLayout::kInterleaved);
  const Rope rope(8, {.theta = 1e4, .layout = layout});
  const Matrix<double> q = test::random_matrix(1, 8, 2);
  const Matrix<double> k = test::random_matrix(1, 8, 3);
  const auto product = [&](Index i, Index j) {
    return rotated(rope, q, {i}).row(0).dot(rotated(rope, k, {j}).row(0));
  };
  CHECK(product(7, 3) == Approx(product(1004, 1000)).epsilon(1e-10));
  CHECK(product(7, 3) != Approx(product(3, 7)).epsilon(1e-3));
}

TEST_CASE("Both layouts of Rope are one rotation up to the order of numbers", "[ops][rope]") {
  const Matrix<double> x = test::random_matrix(3, 8, 4);
  const Positions positions = {5, 0, 31};
  const auto interleave = [](const Matrix<double>& half_split) {
    Matrix<double> mixed(half_split.rows(), 8);
    for (Index i = 0; i < 4; ++i) {
      mixed.col(2 * i) = half_split.col(i);
      mixed.col(2 * i + 1) = half_split.col(4 + i);
    }
    return mixed;
  };
  CHECK(rotated(Rope(8, {.theta = 1e4, .layout = RopeLayout::kInterleaved}), interleave(x),
                positions) == interleave(rotated(Rope(8), x, positions)));
}

TEST_CASE("Rope is undone by rotate_back and keeps norms", "[ops][rope]") {
  const auto layout = GENERATE(RopeLayout::kHalfSplit, RopeLayout::kInterleaved);
  const Rope rope(6, {.theta = 1e4, .layout = layout});
  const Positions positions = {0, 1, 2, 100000};
  const Matrix<double> x = test::random_matrix(4, 12, 5);
  Matrix<double> y = rotated(rope, x, positions);
  CHECK(y.norm() == Approx(x.norm()));
  rope.rotate_back<double>(y, positions);
  CHECK(test::relative_error(y, x) <= 1e-15);
}

TEST_CASE("Rope rotates a block in place and can share its table", "[ops][rope]") {
  const Rope rope(4);
  const Positions positions = {3, 4};
  Matrix<double> x = test::random_matrix(2, 12, 6);
  const Matrix<double> before = x;
  Scratch<double> table;
  rope.tabulate(std::span<const Index>(positions), table);
  rope.rotate<double>(x.middleCols(4, 4), table);

  CHECK(x.leftCols(4) == before.leftCols(4));
  CHECK(x.rightCols(4) == before.rightCols(4));
  CHECK(x.middleCols(4, 4) == rotated(rope, before.middleCols(4, 4), positions));
  rope.rotate_back<double>(x.middleCols(4, 4), table);
  CHECK(test::relative_error(x, before) <= 1e-15);
}

TEST_CASE("Rope rotates a part of each head and leaves the rest", "[ops][rope]") {
  const auto layout = GENERATE(RopeLayout::kHalfSplit, RopeLayout::kInterleaved);
  const Index first = GENERATE(as<Index>{}, 0, 2, 3);
  const Rope rope(4, {.theta = 1e4, .layout = layout});
  const Positions positions = {3, 4};
  Matrix<double> x = test::random_matrix(2, 21, 6);
  const Matrix<double> before = x;
  Matrix<double> expected = x;
  for (Index head = 0; head < 3; ++head) {
    expected.middleCols(7 * head + first, 4) =
        rotated(rope, before.middleCols(7 * head + first, 4), positions);
  }
  Scratch<double> table;
  rope.tabulate(std::span<const Index>(positions), table);
  rope.rotate<double>(x, table, {.width = 7, .first = first});
  CHECK(x == expected);
  rope.rotate_back<double>(x, table, {.width = 7, .first = first});
  CHECK(test::relative_error(x, before) <= 1e-15);
}

TEST_CASE("Rope in float keeps its angles at distant positions", "[ops][rope]") {
  // 2^24 + 1 is the first position that a float cannot hold.
  const Rope rope(2);
  Matrix<float> x(1, 2);
  x << 1.0F, 0.0F;
  const Positions positions = {16777217};
  rope.rotate<float>(x, positions);
  CHECK(x(0, 0) == Approx(std::cos(16777217.0)).margin(1e-6));
  CHECK(x(0, 1) == Approx(std::sin(16777217.0)).margin(1e-6));
}

TEST_CASE("Rope gradient agrees with finite differences", "[ops][rope][gradient]") {
  const auto layout = GENERATE(RopeLayout::kHalfSplit, RopeLayout::kInterleaved);
  const Rope rope(4, {.theta = 50.0, .layout = layout});
  const Positions positions = {2, 0, 9};
  Matrix<double> x = test::random_matrix(3, 8, 7);
  const Matrix<double> weight = test::random_matrix(3, 8, 8);
  Matrix<double> analytic = weight;
  rope.rotate_back<double>(analytic, positions);
  const Matrix<double> numeric = test::numeric_gradient(
      x, [&] { return rotated(rope, x, positions).cwiseProduct(weight).sum(); });
  CHECK(test::relative_error(analytic, numeric) <= 1e-8);
}

TEST_CASE("Rope gives the same bits on any number of threads", "[ops][rope][parallel]") {
  const Rope rope(64);
  Positions positions;
  for (Index t = 0; t < 300; ++t) positions.push_back(7 * t);
  const Matrix<double> x = test::random_matrix(300, 128, 9);
  const Matrix<double> one = rotated(rope, x, positions);
  set_threads(2);
  const Matrix<double> two = rotated(rope, x, positions);
  set_threads(1);
  CHECK(one == two);
}

TEST_CASE("Rope accepts no tokens", "[ops][rope]") {
  CHECK(rotated(Rope(4), Matrix<double>(0, 8), {}).rows() == 0);
}

TEST_CASE("Rope says what is wrong", "[ops][rope]") {
  CHECK(test::message_of<ConfigError>([] { Rope(0); }) == "Rope: head_dim = 0, expected >= 2");
  CHECK(test::message_of<ConfigError>([] { Rope(5); }) ==
        "Rope: head_dim = 5, expected an even number");
  CHECK(test::message_of<ConfigError>([] { Rope(4, {.theta = -1.0}); }) ==
        "Rope: theta = -1, expected a finite number > 0");
  CHECK_THROWS_AS(Rope(4, {.theta = std::nan("")}), ConfigError);

  const Rope rope(4);
  CHECK(test::message_of<ShapeError>([&] {
          rotated(rope, Matrix<double>(2, 6), {0, 1});
        }) == "Rope::rotate: x is [2, 6], expected a multiple of head_dim = 4 columns");
  CHECK(test::message_of<ShapeError>([&] { rotated(rope, Matrix<double>(2, 8), {0}); }) ==
        "Rope::rotate: table of angles is [1, 4], expected [2, 4]");
  Scratch<double> table;
  rope.tabulate(std::span<const Index>(Positions{0, 1}), table);
  Matrix<double> x(2, 12);
  CHECK(test::message_of<ShapeError>([&] {
          rope.rotate<double>(x, table, {.width = 5, .first = 1});
        }) == "Rope::rotate: x is [2, 12], expected a multiple of part.width = 5 columns");
  CHECK(test::message_of<ShapeError>(
            [&] { rope.rotate_back<double>(x, table, {.width = 6, .first = 3}); }) ==
        "Rope::rotate_back: the part begins at 3 of 6 columns, expected room for head_dim = 4");
}

}  // namespace weir::rope_test
