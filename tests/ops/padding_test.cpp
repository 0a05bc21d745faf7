// SPDX-License-Identifier: MIT
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/ops/padding.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::padding_test {

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

}  // namespace

TEST_CASE("clear_padding makes the rows of padding zero", "[ops][padding]") {
  Matrix<double> x(3, 2);
  x << 1, 2, kNan, 4, 5, 6;
  Matrix<double> expected(3, 2);
  expected << 1, 2, 0, 0, 5, 6;
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  Matrix<double> space;
  CHECK(without_padding<double>(x, mask, space) == expected);
  CHECK(x(1, 1) == 4.0);
  clear_padding<double>(mask, x);
  CHECK(x == expected);
}

TEST_CASE("without_padding copies nothing where there is none", "[ops][padding]") {
  const Matrix<double> x = test::random_matrix(3, 2, 1);
  Matrix<double> space;
  CHECK(without_padding<double>(x, std::vector<std::uint8_t>{}, space).data() == x.data());
  CHECK(space.size() == 0);
}

TEST_CASE("PaddingRows keeps the mask of a pass", "[ops][padding]") {
  PaddingRows padding;
  CHECK(!padding.contains(0));
  {
    const std::vector<std::uint8_t> mask = {1, 0};
    padding.set("Layer::forward", {.mask = mask}, 2);
  }
  CHECK(!padding.contains(0));
  CHECK(padding.contains(1));
  Matrix<double> x = Matrix<double>::Ones(2, 1);
  Matrix<double> space;
  CHECK(padding.cleared<double>(x, space).sum() == 1.0);
  padding.clear(x);
  CHECK(x(1, 0) == 0.0);

  const std::vector<std::uint8_t> three = {1, 0, 1};
  CHECK(test::message_of<ShapeError>([&] { padding.set("Layer::forward", {.mask = three}, 2); }) ==
        "Layer::forward: pass.mask has 3 entries, expected 2 (one per token)");
  CHECK(padding.contains(1));
  padding.set("Layer::forward", {}, 7);
  CHECK(!padding.contains(1));
}

}  // namespace weir::padding_test
