// SPDX-License-Identifier: MIT
// Products with codes in tiles. Where there are none, these are tests of the other ways.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include <weir/kernels/bfloat16.hpp>
#include <weir/kernels/block_codes.hpp>
#include <weir/kernels/e4m3_lanes.hpp>
#include <weir/kernels/packed_product.hpp>
#include <weir/kernels/packed_weight.hpp>
#include <weir/kernels/tiles.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::coded_tiles_test {
using kernels::Code;
using kernels::PackedWeight;

namespace {

constexpr Storage kStorages[] = {Storage::kInt8,  Storage::kInt4,    Storage::kFp8,
                                 Storage::kMxFp4, Storage::kInt8Dot, Storage::kInt4Dot};

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

/// Numbers of very different sizes: any other order of sums has other bits.
Matrix<float> wide(Index rows, Index cols, std::uint64_t seed) {
  Matrix<float> x = test::random_matrix<float>(rows, cols, seed);
  for (Index i = 0; i < x.size(); ++i) {
    x.data()[i] = std::ldexp(x.data()[i], static_cast<int>((i * 7919) % 40) - 20);
  }
  return x;
}

}  // namespace

TEST_CASE("A row times codes has the same bits alone and among others, for any threads",
          "[kernels][tiles][parallel]") {
  const bool tiles = GENERATE(true, false);
  kernels::use_tiles(tiles);
  for (const Storage storage : kStorages) {
    INFO(name_of(storage) << ", tiles " << kernels::uses_tiles());
    for (const Index depth : {32, 40, 700}) {
      Matrix<float> x = wide(45, depth, 3);
      x.row(3) *= 1e-30F;
      x.row(4) *= 1e-36F;  // Partly below the normal range.
      const PackedWeight<float> weight(wide(200, depth, 4), storage);
      const Matrix<float> all = product(x, weight);
      for (const Index rows : {2, 3, 5, 8, 9, 16, 30}) {
        const Index first = 45 - rows;
        CHECK(product(x.middleRows(first, rows), weight) == all.middleRows(first, rows));
      }
      int different = 0;
      for (Index row = 0; row < 45; ++row) {
        different += product(x.row(row), weight) == all.row(row) ? 0 : 1;
      }
      CHECK(different == 0);
      const test::Threads team(3);
      CHECK(product(x, weight) == all);
      CHECK(product(x.row(1), weight) == all.row(1));
    }
  }
  kernels::use_tiles(true);
}

TEST_CASE("Codes times codes have the same bits in tiles and without", "[kernels][tiles]") {
  for (const Storage storage : {Storage::kInt8Dot, Storage::kInt4Dot}) {
    for (const Index depth : {1, 32, 300, 1000}) {
      INFO(name_of(storage) << ", depth " << depth);
      const Matrix<float> x = wide(37, depth, 5);
      const PackedWeight<float> weight(wide(70, depth, 6), storage);
      const Matrix<float> with = product(x, weight);
      const WithoutTiles without;
      CHECK(product(x, weight) == with);
    }
  }
}

TEST_CASE("What is not finite goes its way through products with codes", "[kernels][tiles]") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const Storage storage : kStorages) {
    INFO(name_of(storage));
    Matrix<float> x = Matrix<float>::Constant(20, 300, 1.0F);
    x(3, 299) = std::numeric_limits<float>::quiet_NaN();
    x(4, 8) = kInfinity;
    Matrix<float> w = test::random_matrix<float>(70, 300, 7);
    const PackedWeight<float> weight(w, storage);
    const Matrix<float> y = product(x, weight);
    for (Index row = 0; row < 20; ++row) {
      CHECK(y.row(row).allFinite() == (row != 3 && row != 4));
    }
    CHECK(y.row(3).array().isNaN().all());
    CHECK_FALSE(y.row(4).array().isFinite().any());
    CHECK_FALSE(product(x.row(3), weight).array().isFinite().any());
    CHECK_FALSE(product(x.row(4), weight).array().isFinite().any());
  }
}

#if WEIR_TILES
namespace {

/// The product of x, rounded to bfloat16, with one output, in the order of tiles: with the codes of
/// a block, the products with inputs of even and of odd number are summed up apart, 32 at a time;
/// then come the scale and the minimum.
float product_in_order(const RowVector<float>& x, const RowVector<float>& w, Code code,
                       float fp8_scale) {
  const auto input = [&](Index p) {
    return p < x.size() ? static_cast<float>(kernels::BFloat16(x[p])) : 0.0F;
  };
  float total = 0.0F;
  const Index length = kernels::block_length(code);
  for (Index begin = 0; begin < w.size(); begin += length) {
    kernels::CodedBlock block;
    const Index count = std::min(length, w.size() - begin);
    if (code == Code::kFp8) {
      kernels::round_to_e4m3(w.data() + begin, count, fp8_scale, block);
    } else {
      kernels::round_block(code, w.data() + begin, count, block);
    }
    float sum = 0.0F;
    float inputs = 0.0F;
    for (Index part = begin; part < begin + length; part += 32) {
      float even[2] = {};
      float odd[2] = {};
      for (Index p = part; p < part + 32; p += 2) {
        const auto number = [&](Index i) {
          return i - begin < count
                     ? kernels::code_value(code, block.codes[static_cast<std::size_t>(i - begin)])
                     : 0.0F;
        };
        even[0] = std::fma(input(p), number(p), even[0]);
        odd[0] = std::fma(input(p + 1), number(p + 1), odd[0]);
        even[1] += input(p);
        odd[1] += input(p + 1);
      }
      sum += even[0] + odd[0];
      inputs += even[1] + odd[1];
    }
    total = std::fma(block.scale, sum, total);
    if (code == Code::kInt4) total = std::fma(block.minimum, inputs, total);
  }
  return total;
}

}  // namespace

TEST_CASE("Codes in tiles add up as their definition says", "[kernels][tiles]") {
  if (!kernels::uses_tiles()) return;
  for (const Index depth : {128, 300}) {
    const Matrix<float> x = test::random_matrix<float>(9, depth, 5);
    const Matrix<float> w = test::random_matrix<float>(64, depth, 6);
    for (const auto& [storage, code] :
         {std::pair(Storage::kInt8, Code::kInt8), std::pair(Storage::kInt4, Code::kInt4),
          std::pair(Storage::kFp8, Code::kFp8), std::pair(Storage::kMxFp4, Code::kMxFp4)}) {
      if (code == Code::kFp8 && depth != 128) continue;  // One scale is enough.
      INFO(name_of(storage) << ", depth " << depth);
      const float scale = kernels::e4m3_tile_scale(w.data(), w.cols(), 64, depth);
      const Matrix<float> y = product(x, PackedWeight<float>(w, storage));
      int different = 0;
      for (Index i = 0; i < 9; ++i) {
        for (Index j = 0; j < 64; ++j) {
          different += y(i, j) == product_in_order(x.row(i), w.row(j), code, scale) ? 0 : 1;
        }
      }
      CHECK(different == 0);
    }
  }
}
#endif

}  // namespace weir::coded_tiles_test
