// SPDX-License-Identifier: MIT
/// \file
/// The innermost loops of products with codes.
#pragma once

#include <cstddef>
#include <cstdint>

#include <weir/core/types.hpp>
#include <weir/kernels/coded_values.hpp>
#include <weir/kernels/register_block.hpp>
#include <weir/ops/lanes.hpp>

namespace weir::kernels {

/// The sum of `count` numbers, a multiple of kLanes, in an order that depends on nothing else.
inline float sum_of_inputs(const float* a, Index count) {
  Lanes<float> sum{};
  for (Index k = 0; k < count; k += kLanes<float>) sum += load_lanes<float>(a + k);
  return sum_of<float>(sum);
}

/// c = a times the numbers of `streams` panels. Within each block, codes are summed up as they are,
/// input by input; then
///
///     c += scale * sum,   c += minimum * (sum of the inputs of the block)
///
/// All ways to multiply with a panel do that in this order, and so agree to the bit.
///
/// \param a        Each row, filled up with zeros to whole blocks.
/// \param panels   Where the blocks of each panel begin.
/// \param c        Where the kCols sums of row i and panel s go: `c[s * rows + i]`.
template <class Codes, Index rows, Index streams>
void multiply_codes(const float* const* a, const std::byte* const* panels, Index blocks,
                    float* const* c) {
  constexpr CodedLayout kLayout = {Codes::kCode};
  constexpr Index kVectors = Block<float>::kVectors;
  constexpr Index kLane = kLanes<float>;
  Lanes<float> total[streams][rows][kVectors] = {};
  const float* row[rows];
  for (Index i = 0; i < rows; ++i) row[i] = a[i];
  for (Index block = 0; block < blocks; ++block) {
    Lanes<float> sum[streams][rows][kVectors] = {};
    for (Index k = 0; k < kLayout.block(); k += Codes::kPerWord) {
      const Index offset = block * kLayout.bytes() + kLayout.word(k, 0);
#pragma GCC unroll 8
      for (Index s = 0; s < streams; ++s) {
        detail::Words words[kVectors];
#pragma GCC unroll 8
        for (Index j = 0; j < kVectors; ++j) {
          const std::byte* const at = panels[s] + offset + j * kLane * CodedLayout::kWord;
          __builtin_prefetch(at + CodedLayout::kAhead, 0, 2);
          words[j] = detail::words_of(at);
        }
#pragma GCC unroll 8
        for (int n = 0; n < Codes::kPerWord; ++n) {
          Lanes<float> column[kVectors];
#pragma GCC unroll 8
          for (Index j = 0; j < kVectors; ++j) column[j] = Codes::value(words[j], n);
#pragma GCC unroll 8
          for (Index i = 0; i < rows; ++i) {
            const float factor = row[i][k + n];
#pragma GCC unroll 8
            for (Index j = 0; j < kVectors; ++j) sum[s][i][j] += factor * column[j];
          }
        }
      }
    }
    float inputs[rows] = {};
    if constexpr (Codes::kHasMinimum) {
      for (Index i = 0; i < rows; ++i) inputs[i] = sum_of_inputs(row[i], kLayout.block());
    }
#pragma GCC unroll 8
    for (Index s = 0; s < streams; ++s) {
      const std::byte* const at = panels[s] + block * kLayout.bytes();
#pragma GCC unroll 8
      for (Index j = 0; j < kVectors; ++j) {
        const Lanes<float> scale = Codes::scale(at, j * kLane);
#pragma GCC unroll 8
        for (Index i = 0; i < rows; ++i) total[s][i][j] += scale * sum[s][i][j];
        if constexpr (Codes::kHasMinimum) {
          const Lanes<float> minimum = Codes::minimum(at, j * kLane);
#pragma GCC unroll 8
          for (Index i = 0; i < rows; ++i) total[s][i][j] += minimum * inputs[i];
        }
      }
    }
    for (Index i = 0; i < rows; ++i) row[i] += kLayout.block();
  }
  for (Index s = 0; s < streams; ++s) {
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < kVectors; ++j) {
        store_lanes<float>(total[s][i][j], c[s * rows + i] + j * kLane);
      }
    }
  }
}

/// Some blocks of a panel as floats.
struct UnpackedBlocks {
  float* values = nullptr;  ///< [inputs, kCols], without their scales.
  float* scales = nullptr;  ///< [blocks, kCols]
  float* minima = nullptr;  ///< [blocks, kCols], or null for none.
  Index block = 0;          ///< Inputs of a block.
};

/// Unpacks `blocks` blocks from `panel` on.
template <class Codes>
void unpack_codes(const std::byte* panel, Index blocks, const UnpackedBlocks& to) {
  constexpr CodedLayout kLayout = {Codes::kCode};
  constexpr Index kLane = kLanes<float>;
  constexpr Index kCols = CodedLayout::kCols;
  float* values = to.values;
  for (Index block = 0; block < blocks; ++block, panel += kLayout.bytes()) {
    for (Index lane = 0; lane < kCols; lane += kLane) {
      const Index at = block * kCols + lane;
      store_lanes<float>(Codes::scale(panel, lane), to.scales + at);
      if constexpr (Codes::kHasMinimum) {
        store_lanes<float>(Codes::minimum(panel, lane), to.minima + at);
      }
    }
    for (Index k = 0; k < kLayout.block(); k += Codes::kPerWord) {
      for (Index lane = 0; lane < kCols; lane += kLane) {
        const detail::Words words = detail::words_of(panel + kLayout.word(k, lane));
#pragma GCC unroll 8
        for (int n = 0; n < Codes::kPerWord; ++n) {
          store_lanes<float>(Codes::value(words, n), values + n * kCols + lane);
        }
      }
      values += Codes::kPerWord * kCols;
    }
  }
}

/// `multiply_codes` with some blocks of a panel that have been unpacked. Row i of a is at
/// `a + i * a_row`, its sums go to `c + i * c_row`, and are added there if `accumulate`.
template <Index rows>
void multiply_unpacked(const float* a, Index a_row, const UnpackedBlocks& b, Index blocks, float* c,
                       Index c_row, bool accumulate) {
  constexpr Index kVectors = Block<float>::kVectors;
  constexpr Index kLane = kLanes<float>;
  constexpr Index kCols = CodedLayout::kCols;
  const float* values = b.values;
  for (Index block = 0; block < blocks; ++block, a += b.block) {
    Lanes<float> sum[rows][kVectors] = {};
#pragma GCC unroll 1
    for (Index k = 0; k < b.block; ++k, values += kCols) {
      Lanes<float> column[kVectors];
#pragma GCC unroll 8
      for (Index j = 0; j < kVectors; ++j) column[j] = load_lanes<float>(values + j * kLane);
#pragma GCC unroll 8
      for (Index i = 0; i < rows; ++i) {
        const float factor = a[i * a_row + k];
#pragma GCC unroll 8
        for (Index j = 0; j < kVectors; ++j) sum[i][j] += factor * column[j];
      }
    }
    const bool adds = accumulate || block > 0;
#pragma GCC unroll 8
    for (Index i = 0; i < rows; ++i) {
      const float inputs = b.minima != nullptr ? sum_of_inputs(a + i * a_row, b.block) : 0.0F;
#pragma GCC unroll 8
      for (Index j = 0; j < kVectors; ++j) {
        float* const at = c + i * c_row + j * kLane;
        const Index lane = block * kCols + j * kLane;
        Lanes<float> total = adds ? load_lanes<float>(at) : Lanes<float>{};
        total += load_lanes<float>(b.scales + lane) * sum[i][j];
        if (b.minima != nullptr) total += load_lanes<float>(b.minima + lane) * inputs;
        store_lanes<float>(total, at);
      }
    }
  }
}

}  // namespace weir::kernels
