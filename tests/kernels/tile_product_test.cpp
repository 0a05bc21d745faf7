// SPDX-License-Identifier: MIT
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/kernels/bfloat16.hpp>
#include <weir/kernels/packed_product.hpp>
#include <weir/kernels/packed_weight.hpp>
#include <weir/kernels/tile_product.hpp>
#include <weir/kernels/tiles.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

// Where there are no tiles, these are tests of the other ways to multiply bfloat16 numbers.
namespace weir::tile_product_test {
using kernels::PackedWeight;

namespace {

/// Does without tiles for as long as it lives.
struct WithoutTiles {
  WithoutTiles() { kernels::use_tiles(false); }
  WithoutTiles(const WithoutTiles&) = delete;
  WithoutTiles& operator=(const WithoutTiles&) = delete;
  ~WithoutTiles() { kernels::use_tiles(true); }
};

Matrix<float> product(const Matrix<float>& x, const PackedWeight<float>& weight) {
  Matrix<float> out = Matrix<float>::Constant(x.rows(), weight.rows(), 7.0F);
  const kernels::PackedTo<float> to = {&weight, 0, x.rows(), out.data(), out.cols()};
  kernels::multiply_packed<float>(x, {&to, 1});
  return out;
}

/// Rounded to bfloat16; smaller numbers than tiles see are zero.
Matrix<float> rounded(const Matrix<float>& x) {
  return x.unaryExpr([](float v) {
    const auto half = static_cast<float>(kernels::BFloat16(v));
    return std::abs(half) < std::numeric_limits<float>::min() ? 0.0F : half;
  });
}

/// Whether each element of a product of `x` and `w`, both rounded, is as near to the exact one as
/// sums in fp32 are: within 2^-24 of the sum of magnitudes for each of the additions in a row, of
/// which there is one for a block of 32 and 17 in a block, or a product in the exact ways.
bool is_near(const Matrix<float>& y, const Matrix<float>& x, const Matrix<float>& w) {
  const Matrix<double> a = x.cast<double>();
  const Matrix<double> b = w.cast<double>().transpose();
  const Matrix<double> exact = a * b;
  const Matrix<double> sizes = a.cwiseAbs() * b.cwiseAbs();
  const double additions = kernels::uses_tiles() ? 18.0 + static_cast<double>(x.cols()) / 32.0
                                                 : 2.0 + static_cast<double>(x.cols());
  const Matrix<double> off = (y.cast<double>() - exact).cwiseAbs();
  return (off.array() <= 0x1p-24 * additions * sizes.array() + 1e-37).all();
}

}  // namespace

TEST_CASE("Products of bfloat16 numbers are exact up to the rounding of sums", "[kernels][tiles]") {
  const test::Threads threads(2);
  for (const bool tiles : {true, false}) {
    kernels::use_tiles(tiles);
    INFO("tiles " << kernels::uses_tiles());
    // Rows across the height of tiles, columns across panels, depths across blocks and slices.
    for (const Index depth : {1, 2, 31, 32, 33, 64, 255, 257, 300, 1000}) {
      for (const Index cols : {1, 64, 70}) {
        const Matrix<float> w = rounded(test::random_matrix<float>(cols, depth, 2));
        const PackedWeight<float> weight(w, Storage::kBfloat16);
        for (const Index rows : {1, 2, 3, 15, 16, 17, 31, 33, 40}) {
          INFO(rows << " rows, " << cols << " columns, depth " << depth);
          const Matrix<float> x = rounded(test::random_matrix<float>(rows, depth, 1));
          CHECK(is_near(product(x, weight), x, w));
        }
      }
    }
  }
  kernels::use_tiles(true);
}

TEST_CASE("Products of bfloat16 numbers hold outliers, zeros and small numbers",
          "[kernels][tiles]") {
  Matrix<float> w = test::random_matrix<float>(70, 300, 1);
  Matrix<float> x = test::random_matrix<float>(37, 300, 2);
  x(0, 17) = 1e4F;
  x(20, 299) = -1e4F;
  w(3, 17) = -1e4F;
  w(69, 0) = 1e4F;
  x.row(5).setZero();
  w.row(7).setZero();
  x.row(9) *= 1e-39F;  // Below the normal range.
  w.row(11) *= 1e-39F;
  x.row(10) *= 1e-30F;
  w.row(12) *= 1e-30F;
  x = rounded(x);
  w = rounded(w);
  const PackedWeight<float> weight(w, Storage::kBfloat16);
  const Matrix<float> y = product(x, weight);
  CHECK(y.allFinite());
  CHECK(is_near(y, x, w));
  CHECK(y.row(5).isZero(0));
  CHECK(y.col(7).isZero(0));
}

TEST_CASE("What is not finite goes its way through products of bfloat16 numbers",
          "[kernels][tiles]") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Matrix<float> x = Matrix<float>::Constant(20, 40, 1.0F);
  Matrix<float> w = Matrix<float>::Constant(5, 40, 1.0F);
  x(3, 39) = std::numeric_limits<float>::quiet_NaN();
  x(4, 8) = kInfinity;
  x(5, 8) = kInfinity;
  x(5, 9) = -kInfinity;
  w(2, 8) = 0.0F;
  w(4, 8) = -1.0F;
  const PackedWeight<float> weight(w, Storage::kBfloat16);
  const auto check = [&](const Matrix<float>& y, Index row) {
    CHECK(y.row(row).allFinite() == (row != 3 && row != 4 && row != 5));
  };
  const Matrix<float> y = product(x, weight);
  for (Index row = 0; row < 20; ++row) {
    check(y, row);
    if (row == 3) CHECK(y.row(3).array().isNaN().all());
    if (row == 4) {
      CHECK(y(4, 0) == kInfinity);
      CHECK(std::isnan(y(4, 2)));  // Infinity times zero.
      CHECK(y(4, 4) == -kInfinity);
    }
    if (row == 5) CHECK(std::isnan(y(5, 0)));
    const Matrix<float> alone = product(x.row(row), weight);
    for (Index col = 0; col < 5; ++col) {
      CHECK(
          (alone(0, col) == y(row, col) || (std::isnan(alone(0, col)) && std::isnan(y(row, col)))));
    }
  }
}

TEST_CASE("A row of bfloat16 numbers has the same bits alone and among others, for any threads",
          "[kernels][tiles][parallel]") {
  const bool tiles = GENERATE(true, false);
  kernels::use_tiles(tiles);
  // Numbers of very different sizes: any other order of sums has other bits.
  const auto wide = [](Index rows, Index cols, std::uint64_t seed) {
    Matrix<float> x = test::random_matrix<float>(rows, cols, seed);
    for (Index i = 0; i < x.size(); ++i) {
      x.data()[i] = std::ldexp(x.data()[i], static_cast<int>((i * 7919) % 60) - 90);
    }
    return x;
  };
  for (const Index depth : {32, 40, 700}) {
    const Matrix<float> x = wide(90, depth, 3);
    const PackedWeight<float> weight(wide(200, depth, 4), Storage::kBfloat16);
    const Matrix<float> all = product(x, weight);
    for (const Index rows : {1, 2, 3, 5, 16, 30, 89}) {
      const Index first = 90 - rows;
      CHECK(product(x.middleRows(first, rows), weight) == all.middleRows(first, rows));
    }
    for (Index row = 0; row < 90; ++row) {
      CHECK(product(x.row(row), weight) == all.row(row));
    }
    const test::Threads team(3);
    CHECK(product(x, weight) == all);
    CHECK(product(x.row(1), weight) == all.row(1));
  }
  kernels::use_tiles(true);
}

#if WEIR_TILES
TEST_CASE("Tiles add up as their definition says", "[kernels][tiles]") {
  if (!kernels::uses_tiles()) return;
  constexpr Index kDepth = 96;
  const Matrix<float> x = rounded(test::random_matrix<float>(9, kDepth, 5));
  const Matrix<float> w = rounded(test::random_matrix<float>(64, kDepth, 6));
  const Matrix<float> y = product(x, PackedWeight<float>(w, Storage::kBfloat16));
  int different = 0;
  for (Index i = 0; i < 9; ++i) {
    for (Index j = 0; j < 64; ++j) {
      float sum = 0.0F;
      for (Index begin = 0; begin < kDepth; begin += 32) {
        float even = 0.0F;
        float odd = 0.0F;
        for (Index p = begin; p < begin + 32; p += 2) {
          even = std::fma(x(i, p), w(j, p), even);
          odd = std::fma(x(i, p + 1), w(j, p + 1), odd);
        }
        sum += even + odd;
      }
      different += y(i, j) == sum ? 0 : 1;
    }
  }
  CHECK(different == 0);
}

TEST_CASE("Without permission for tiles, pairs are multiplied in vector registers",
          "[kernels][tiles]") {
  // Differs from tiles: all products of a column are added to one sum.
  const Matrix<float> x = rounded(test::random_matrix<float>(20, 300, 7));
  const PackedWeight<float> weight(test::random_matrix<float>(64, 300, 8), Storage::kBfloat16);
  const bool granted = kernels::uses_tiles();
  const Matrix<float> with = product(x, weight);
  {
    const WithoutTiles without;
    CHECK_FALSE(kernels::uses_tiles());
    const Matrix<float> y = product(x, weight);
    CHECK(test::relative_error(y, with) <= 1e-6);
    CHECK((y == with) == !granted);
  }
  CHECK(kernels::uses_tiles() == granted);
  CHECK(product(x, weight) == with);
}
#else
TEST_CASE("Where there are no tiles, none are used", "[kernels][tiles]") {
  CHECK_FALSE(kernels::uses_tiles());
  CHECK_FALSE(kernels::use_tiles(true));
}
#endif

}  // namespace weir::tile_product_test
