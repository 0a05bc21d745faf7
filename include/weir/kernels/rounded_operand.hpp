// SPDX-License-Identifier: MIT
/// \file
/// Operands of products that are rounded to numbers of 16 or 8 bits on their way.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <weir/core/types.hpp>
#include <weir/kernels/bfloat16.hpp>
#include <weir/kernels/e4m3_lanes.hpp>
#include <weir/kernels/product.hpp>
#include <weir/kernels/register_block.hpp>
#include <weir/kernels/transpose.hpp>
#include <weir/ops/lanes.hpp>

namespace weir::kernels {

/// Rounded operands are filled up with zeros to multiples of this depth.
inline constexpr Index kRoundedDepth = 32;

inline Index rounded_depth(Index depth) {
  return (depth + kRoundedDepth - 1) / kRoundedDepth * kRoundedDepth;
}

/// The numbers of the left operand. E4M3 numbers have fewer bits than bfloat16 ones, so that both
/// are multiplied in the same way.
using RoundedLeft = BFloat16Arithmetic::Left;

inline bool is_fp8(const Product<float>& p) {
  return p.rounded->precision == Precision::kFp8;
}

/// Writes kLanes numbers, all of which are bfloat16 numbers.
inline void store_bfloat16(const Lanes<float>& x, RoundedLeft* to) {
  if constexpr (std::is_same_v<RoundedLeft, float>) {
    std::memcpy(static_cast<void*>(to), &x, sizeof x);
  } else {
    typedef std::uint32_t Bits __attribute__((vector_size(sizeof(Lanes<float>))));        // NOLINT
    typedef std::uint16_t Halves __attribute__((vector_size(sizeof(Lanes<float>) / 2)));  // NOLINT
    const auto halves = __builtin_convertvector(std::bit_cast<Bits>(x) >> 16U, Halves);
    std::memcpy(static_cast<void*>(to), &halves, sizeof halves);
  }
}

/// x and y, all bfloat16 numbers, as pairs.
inline Lanes<float> pairs_of(const Lanes<float>& x, const Lanes<float>& y) {
  typedef std::uint32_t Bits __attribute__((vector_size(sizeof(Lanes<float>))));  // NOLINT
  return std::bit_cast<Lanes<float>>((std::bit_cast<Bits>(x) >> 16U) |
                                     (std::bit_cast<Bits>(y) & 0xFFFF0000U));
}

/// A left operand, rounded: row i is at `values + i * row`.
struct RoundedRows {
  RoundedLeft* values = nullptr;
  Index row = 0;
  float* scales = nullptr;  ///< [rows, blocks] in FP8, blocks of kTile numbers.
  Index blocks = 0;
};

/// The numbers [begin, begin + length) of up to kLanes rows of the left operand of `p`, one row
/// after the other, `stride` apart; in `space` [kLanes, kTile] unless they lie so.
inline const float* left_block(const Product<float>& p, Index row, Index rows, Index begin,
                               Index length, float* space, Index& stride) {
  constexpr Index kSide = kLanes<float>;
  const float* const from = p.a + row * p.a_row + begin * p.a_col;
  stride = p.a_row;
  if (p.a_col == 1) return from;
  stride = kTile;
  Index done = 0;
  if (p.a_row == 1 && rows == kSide) {
    for (; done + kSide <= length; done += kSide) {
      transpose<float>(from + done * p.a_col, p.a_col, space + done, kTile);
    }
  }
  for (; done < length; ++done) {
    for (Index i = 0; i < rows; ++i) {
      space[i * kTile + done] = from[i * p.a_row + done * p.a_col];
    }
  }
  return space;
}

/// Rounds up to kLanes rows of the left operand of `p`.
inline void round_left(const Product<float>& p, Index row, Index rows, const RoundedRows& to) {
  constexpr Index kSide = kLanes<float>;
  const bool power_of_two = p.operands == Operands::kTokensAndWeight;
  const bool fp8 = is_fp8(p);
  float space[kSide * kTile];
  for (Index begin = 0; begin < p.k; begin += kTile) {
    const Index length = std::min(kTile, p.k - begin);
    Index stride = 0;
    const float* const from = left_block(p, row, rows, begin, length, space, stride);
    for (Index i = 0; i < rows; ++i) {
      const float* const x = from + i * stride;
      RoundedLeft* const out = to.values + (row + i) * to.row + begin;
      Lanes<float> scale = Lanes<float>{} + 1.0F;
      if (fp8) {
        const float of_tile = e4m3_tile_scale(x, 0, 1, length, power_of_two);
        to.scales[(row + i) * to.blocks + begin / kTile] = of_tile;
        scale = Lanes<float>{} + of_tile;
      }
      const Index end = rounded_depth(length);
      for (Index at = 0; at < end; at += kSide) {
        const Index left = std::clamp<Index>(length - at, 0, kSide);
        const Lanes<float> numbers = left == 0 ? Lanes<float>{} : load_lanes<float>(x + at, left);
        store_bfloat16(fp8 ? nearest_e4m3(numbers / scale) : nearest_bfloat16(numbers), out + at);
      }
    }
  }
}

/// A part of the right operand: the rows of depth [begin, begin + length), columns [col, col +
/// cols) with cols <= Block<float>::kCols.
struct RightPart {
  Index begin = 0, length = 0;
  Index col = 0, cols = 0;
};

/// Writes a part of the right operand as a panel of `rounded_depth(length) / 2` steps. `round(x,
/// vector)` rounds kLanes numbers, which are in the columns `vector` * kLanes and following, or all
/// in one column if the operand's columns are contiguous.
template <class Round>
void pack_rounded(const Product<float>& p, const RightPart& part, BFloat16* to, Round&& round) {
  constexpr Index kSide = kLanes<float>;
  constexpr Index kCols = Block<float>::kCols;
  const float* const from = p.b + part.begin * p.b_row + part.col * p.b_col;
  const Index depth = rounded_depth(part.length);
  auto* const pairs = reinterpret_cast<float*>(to);  // Only bits are moved.
  if (p.b_col != 1) {
    float square[kSide * kSide];
    for (Index p0 = 0; p0 < depth; p0 += 2 * kSide) {
      for (Index j0 = 0; j0 < kCols; j0 += kSide) {
        for (Index j = j0; j < j0 + kSide; ++j) {
          Lanes<float> halves[2] = {};
          for (Index half = 0; half < 2 && j < part.cols; ++half) {
            const Index at = p0 + half * kSide;
            const Index left = std::clamp<Index>(part.length - at, 0, kSide);
            if (left > 0) {
              halves[half] = round(load_lanes<float>(from + j * p.b_col + at, left), j0 / kSide);
            }
          }
          const auto [even, odd] = unzip_lanes<float>(halves[0], halves[1]);
          store_lanes<float>(pairs_of(even, odd), square + (j - j0) * kSide);
        }
        transpose<float>(square, kSide, pairs + p0 / 2 * kCols + j0, kCols);
      }
    }
    return;
  }
  for (Index p0 = 0; p0 < depth; p0 += 2) {
    for (Index j0 = 0; j0 < kCols; j0 += kSide) {
      const Index cols = std::clamp<Index>(part.cols - j0, 0, kSide);
      Lanes<float> rows[2] = {};
      for (Index i = 0; i < 2 && cols > 0 && p0 + i < part.length; ++i) {
        rows[i] = round(load_lanes<float>(from + (p0 + i) * p.b_row + j0, cols), j0 / kSide);
      }
      store_lanes<float>(pairs_of(rows[0], rows[1]), pairs + p0 / 2 * kCols + j0);
    }
  }
}

/// Writes a part of at most kTile rows in FP8, and the scale of each of its kCols columns.
/// \param weight_scales  The scales of the tiles of the weight, [depth, columns] / kTile; unused
///                       where the right operand is no weight.
/// \param across         How many tiles the weight has side by side.
inline void pack_e4m3(const Product<float>& p, const RightPart& part, const float* weight_scales,
                      Index across, BFloat16* to, float* scales) {
  constexpr Index kSide = kLanes<float>;
  constexpr Index kCols = Block<float>::kCols;
  static_assert(kTile % kCols == 0);
  Lanes<float> scale[kCols / kSide];
  if (p.operands != Operands::kGradientAndTokens) {
    const float one = weight_scales[part.begin / kTile * across + part.col / kTile];
    for (Lanes<float>& s : scale) s = Lanes<float>{} + one;
  } else {
    for (Index v = 0; v < kCols / kSide; ++v) {
      const Index cols = std::clamp<Index>(part.cols - v * kSide, 0, kSide);
      LaneBits<float> most{};
      for (Index i = 0; i < part.length && cols > 0; ++i) {
        const float* const row = p.b + (part.begin + i) * p.b_row + part.col + v * kSide;
        most = larger_magnitude(most, load_lanes<float>(row, cols));
      }
      scale[v] = e4m3_scales(most, true);
    }
  }
  for (Index v = 0; v < kCols / kSide; ++v) store_lanes<float>(scale[v], scales + v * kSide);
  pack_rounded(p, part, to, [&](const Lanes<float>& x, Index vector) -> Lanes<float> {
    return nearest_e4m3(x / scale[vector]);
  });
}

}  // namespace weir::kernels
