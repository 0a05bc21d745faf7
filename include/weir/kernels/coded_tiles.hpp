// SPDX-License-Identifier: MIT
/// \file
/// The innermost loops of products with codes in the processor's tiles.
///
/// Codes are small integers or floats of few bits, which bfloat16 numbers hold exactly. So tiles
/// multiply codes as they are, and sums of a block get its scale afterwards, in fp32.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <weir/core/types.hpp>
#include <weir/kernels/arranged_rows.hpp>
#include <weir/kernels/bfloat16.hpp>
#include <weir/kernels/coded_values.hpp>
#include <weir/kernels/dot_block.hpp>
#include <weir/kernels/tile_product.hpp>
#include <weir/kernels/tiles.hpp>
#include <weir/ops/lanes.hpp>

#if WEIR_TILES
namespace weir::kernels::detail {

/// How many inputs a tile multiplies at a time.
inline constexpr Index kTileInputs = 32;

/// Blocks of a panel as tiles read them.
struct TileBlocks {
  const std::byte* panel = nullptr;  ///< Where the blocks begin, with their scales.
  /// For tokens of 16 bits: [inputs / 2, kCols, 2] bfloat16 numbers. For codes: [inputs / 4, kCols,
  /// 4] bytes, of which those of a block begin `block` bytes behind those of the one before.
  const std::byte* values = nullptr;
  Index block = 0;
};

/// Widens `blocks` blocks from `panel` on to bfloat16 numbers, without their scales.
template <class Codes>
void widen_codes(const std::byte* panel, Index blocks, BFloat16* to) {
  constexpr CodedLayout kLayout = {Codes::kCode};
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000U));
  for (Index block = 0; block < blocks; ++block, panel += kLayout.bytes()) {
    for (Index k = 0; k < kLayout.block(); k += Codes::kPerWord) {
      for (Index lane = 0; lane < CodedLayout::kCols; lane += kLanes<float>) {
        const std::byte* const at = panel + kLayout.word(k, lane);
        __builtin_prefetch(at + CodedLayout::kAhead, 0, 2);
        const Words words = words_of(at);
#pragma GCC unroll 4
        for (int n = 0; n < Codes::kPerWord; n += 2) {
          const auto first = std::bit_cast<__m512i>(Codes::value(words, n));
          const auto second = std::bit_cast<__m512i>(Codes::value(words, n + 1));
          const __m512i pair =
              _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_and_si512(second, upper));
          _mm512_storeu_si512(to + 2 * ((k + n) / 2 * CodedLayout::kCols + lane), pair);
        }
      }
    }
    to += kLayout.block() * CodedLayout::kCols;
  }
}

/// Unpacks the bytes of `blocks` blocks of four bits from `panel` on.
inline void widen_to_bytes(const std::byte* panel, Index blocks, std::byte* to) {
  constexpr CodedLayout kLayout = {Code::kInt4};
  constexpr Index kRow = CodedLayout::kCols * CodedLayout::kWord;
  constexpr Index kLane = kLanes<float> * CodedLayout::kWord;
  for (Index block = 0; block < blocks; ++block, panel += kLayout.bytes()) {
    for (Index k = 0; k < kLayout.block(); k += kLayout.per_word(), to += 2 * kRow) {
      for (Index lane = 0; lane < kRow; lane += kLane) {
        const Words words = words_of(panel + kLayout.word(k, 0) + lane);
        for (Index n = 0; n < 2; ++n) {
          const Words bytes = Int4Bytes::bytes(words, n);
          std::memcpy(to + n * kRow + lane, &bytes, sizeof bytes);
        }
      }
    }
  }
}

/// The tokens of a row as floats; numbers below the normal range become zeros, as in tiles.
inline void widen_row(const BFloat16* from, Index count, float* to) {
  for (Index i = 0; i < count; i += kLanes<float>) {
    const __m512i bits = _mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))), 16);
    const __mmask16 normal = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x7F800000));
    _mm512_storeu_si512(to + i, _mm512_maskz_mov_epi32(normal, bits));
  }
}

/// c = one row times `panels` panels of codes, `size` bytes one behind the other, in the order of
/// tiles. To be called under `TileRounding` that keeps small inputs.
/// \param a    As `widen_row` leaves it, whole blocks.
/// \param c    [panels, kCols]
template <class Codes, Index panels>
[[gnu::noinline]] void multiply_row_of_codes(const float* a, const std::byte* from, Index size,
                                             Index blocks, float* c) {
  constexpr CodedLayout kLayout = {Codes::kCode};
  constexpr Index kVectors = Block<float>::kVectors;
  constexpr Index kLane = kLanes<float>;
  constexpr Index kParts = kLayout.block() / kTileInputs;
  std::fill_n(c, panels * kTileCols, 0.0F);
  for (Index block = 0; block < blocks; ++block) {
    __m512 sum[panels][kVectors] = {};
    __m512 inputs{};
    for (Index part = 0; part < kParts; ++part, a += kTileInputs) {
      __m512 even[panels][kVectors] = {};
      __m512 odd[panels][kVectors] = {};
      __m512 inputs_even{};
      __m512 inputs_odd{};
#pragma GCC unroll 1
      for (Index k = 0; k < kTileInputs; k += Codes::kPerWord) {
        const Index offset = kLayout.word(part * kTileInputs + k, 0);
#pragma GCC unroll 8
        for (Index s = 0; s < panels; ++s) {
          const std::byte* const at = from + s * size + offset;
          Words words[kVectors];
#pragma GCC unroll 8
          for (Index j = 0; j < kVectors; ++j) {
            __builtin_prefetch(at + j * TileScope::kLine + CodedLayout::kAhead, 0, 2);
            words[j] = words_of(at + j * TileScope::kLine);
          }
#pragma GCC unroll 8
          for (int n = 0; n < Codes::kPerWord; n += 2) {
            const __m512 first = _mm512_set1_ps(a[k + n]);
            const __m512 second = _mm512_set1_ps(a[k + n + 1]);
#pragma GCC unroll 8
            for (Index j = 0; j < kVectors; ++j) {
              const auto one = std::bit_cast<__m512>(Codes::value(words[j], n));
              const auto other = std::bit_cast<__m512>(Codes::value(words[j], n + 1));
              even[s][j] = _mm512_fmadd_ps(first, one, even[s][j]);
              odd[s][j] = _mm512_fmadd_ps(second, other, odd[s][j]);
            }
          }
        }
        if constexpr (Codes::kHasMinimum) {
#pragma GCC unroll 8
          for (int n = 0; n < Codes::kPerWord; n += 2) {
            inputs_even = _mm512_add_ps(inputs_even, _mm512_set1_ps(a[k + n]));
            inputs_odd = _mm512_add_ps(inputs_odd, _mm512_set1_ps(a[k + n + 1]));
          }
        }
      }
#pragma GCC unroll 8
      for (Index s = 0; s < panels; ++s) {
#pragma GCC unroll 8
        for (Index j = 0; j < kVectors; ++j) {
          sum[s][j] = _mm512_add_ps(sum[s][j], _mm512_add_ps(even[s][j], odd[s][j]));
        }
      }
      inputs = _mm512_add_ps(inputs, _mm512_add_ps(inputs_even, inputs_odd));
    }
#pragma GCC unroll 8
    for (Index s = 0; s < panels; ++s) {
#pragma GCC unroll 8
      for (Index j = 0; j < kVectors; ++j) {
        const std::byte* const at = from + s * size;
        float* const to = c + (s * kVectors + j) * kLane;
        __m512 total = _mm512_loadu_ps(to);
        total =
            _mm512_fmadd_ps(std::bit_cast<__m512>(Codes::scale(at, j * kLane)), sum[s][j], total);
        if constexpr (Codes::kHasMinimum) {
          total =
              _mm512_fmadd_ps(std::bit_cast<__m512>(Codes::minimum(at, j * kLane)), inputs, total);
        }
        _mm512_storeu_ps(to, total);
      }
    }
    from += kLayout.bytes();
  }
}

/// What tiles leave behind before it gets its scale: [kRows, 16] numbers for each of two blocks,
/// since one is computed while the other is read.
struct TileSums {
  alignas(64) float of[2][TileScope::kRows * 16] = {};
};

/// c (+)= up to `height` rows times `blocks` blocks of a panel of codes, for tiles of as many rows.
/// To be called under `TileRounding` that keeps small inputs.
/// \param begins   Whether c is set; otherwise it is added to.
/// \param c        [height, kCols], of which rows beyond those of the tiles are for nobody.
template <class Codes, Index height>
[[gnu::noinline]] void multiply_tile_of_codes(const std::byte* a, Index a_row, Index /*rows*/,
                                              const TileBlocks& b, Index blocks, bool begins,
                                              float* c) {
  constexpr CodedLayout kLayout = {Codes::kCode};
  constexpr Index kParts = kLayout.block() / kTileInputs;
  constexpr Index kSums = TileScope::kLine / static_cast<Index>(sizeof(float));
  constexpr Index kPanelRow = 2 * kTileCols * Index{sizeof(BFloat16)};
  constexpr Index kPart = TileScope::kRows * kPanelRow;
  static_assert(kPart == kTileBlock * Index{sizeof(BFloat16)});
  constexpr Index kMostBlocks = 16;
  TileSums sums;
  alignas(64) float inputs[kMostBlocks][TileScope::kRows];
  asm volatile("" : : "r"(a), "r"(b.values) : "memory");
  if constexpr (Codes::kHasMinimum) {
    // The sums of the inputs are products with ones.
    alignas(64) std::uint16_t ones[TileScope::kRows * 2 * kSums];
    std::fill_n(ones, TileScope::kRows * 2 * kSums, std::uint16_t(0x3F80));
    asm volatile("" : : "r"(ones) : "memory");
    _tile_loadd(7, ones, TileScope::kLine);
    for (Index block = 0; block < blocks; ++block) {
      _tile_zero(2);
      _tile_loadd(4, a + block * TileScope::kLine, a_row);
      _tile_dpbf16ps(2, 4, 7);
      _tile_stored(2, sums.of[0], TileScope::kLine);
      asm volatile("" : : : "memory");
      for (Index i = 0; i < height; ++i) inputs[block][i] = sums.of[0][i * kSums];
    }
  }
  for (Index lane = 0; lane < kTileCols; lane += kSums) {
    const std::byte* const values = b.values + lane * 2 * Index{sizeof(BFloat16)};
    const auto begin = [&](Index block) {
      const std::byte* const left = a + block * kParts * TileScope::kLine;
      const std::byte* const right = values + block * kParts * kPart;
      if (block % 2 == 0) {
        _tile_zero(0);
        for (Index part = 0; part < kParts; ++part) {
          _tile_loadd(4, left + part * TileScope::kLine, a_row);
          _tile_loadd(5, right + part * kPart, kPanelRow);
          _tile_dpbf16ps(0, 4, 5);
        }
        _tile_stored(0, sums.of[0], TileScope::kLine);
      } else {
        _tile_zero(1);
        for (Index part = 0; part < kParts; ++part) {
          _tile_loadd(4, left + part * TileScope::kLine, a_row);
          _tile_loadd(6, right + part * kPart, kPanelRow);
          _tile_dpbf16ps(1, 4, 6);
        }
        _tile_stored(1, sums.of[1], TileScope::kLine);
      }
      asm volatile("" : : : "memory");
    };
    __m512 total[height];
#pragma GCC unroll 16
    for (Index i = 0; i < height; ++i) {
      total[i] = begins ? _mm512_setzero_ps() : _mm512_load_ps(c + i * kTileCols + lane);
    }
    begin(0);
    for (Index block = 0; block < blocks; ++block) {
      if (block + 1 < blocks) begin(block + 1);
      const std::byte* const at = b.panel + block * kLayout.bytes();
      const auto scale = std::bit_cast<__m512>(Codes::scale(at, lane));
      const float* const sum = sums.of[block % 2];
#pragma GCC unroll 16
      for (Index i = 0; i < height; ++i) {
        total[i] = _mm512_fmadd_ps(scale, _mm512_load_ps(sum + i * kSums), total[i]);
      }
      if constexpr (Codes::kHasMinimum) {
        const auto minimum = std::bit_cast<__m512>(Codes::minimum(at, lane));
#pragma GCC unroll 16
        for (Index i = 0; i < height; ++i) {
          total[i] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(inputs[block][i]), total[i]);
        }
      }
    }
#pragma GCC unroll 16
    for (Index i = 0; i < height; ++i) _mm512_store_ps(c + i * kTileCols + lane, total[i]);
  }
}

/// The same for rows that are codes themselves, with the results of `multiply_bytes`.
/// \param rows     How many rows the tiles have.
template <class Codes, Index height>
[[gnu::noinline]] void multiply_tile_of_bytes(const std::byte* a, Index a_row, Index rows,
                                              const TileBlocks& b, Index blocks, bool begins,
                                              float* c) {
  constexpr CodedLayout kLayout = {Codes::kCode};
  constexpr Index kSums = TileScope::kLine / static_cast<Index>(sizeof(float));
  constexpr Index kPanelRow = CodedLayout::kCols * CodedLayout::kWord;
  constexpr auto kInputs = static_cast<Index>(sizeof(Int8Inputs));
  constexpr Index kMostBlocks = 16;
  TileSums sums;
  alignas(64) float scales[kMostBlocks][height] = {};
  alignas(64) float of_codes[kMostBlocks][height] = {};
  for (Index block = 0; block < blocks; ++block) {
    for (Index i = 0; i < rows; ++i) {
      Int8Inputs inputs;
      std::memcpy(&inputs, a + i * a_row + block * kInputs, sizeof inputs);
      scales[block][i] = inputs.scale;
      if constexpr (Codes::kHasMinimum) {
        of_codes[block][i] = inputs.scale * static_cast<float>(inputs.sum);
      }
    }
  }
  asm volatile("" : : "r"(a), "r"(b.values) : "memory");
  for (Index lane = 0; lane < kTileCols; lane += kSums) {
    const std::byte* const values = b.values + lane * CodedLayout::kWord;
    const auto begin = [&](Index block) {
      if (block % 2 == 0) {
        _tile_zero(0);
        _tile_loadd(4, a + block * kInputs, a_row);
        _tile_loadd(5, values + block * b.block, kPanelRow);
        _tile_dpbssd(0, 4, 5);
        _tile_stored(0, sums.of[0], TileScope::kLine);
      } else {
        _tile_zero(1);
        _tile_loadd(4, a + block * kInputs, a_row);
        _tile_loadd(6, values + block * b.block, kPanelRow);
        _tile_dpbssd(1, 4, 6);
        _tile_stored(1, sums.of[1], TileScope::kLine);
      }
      asm volatile("" : : : "memory");
    };
    Lanes<float> total[height];
#pragma GCC unroll 16
    for (Index i = 0; i < height; ++i) {
      total[i] = begins ? Lanes<float>{} : load_lanes<float>(c + i * kTileCols + lane);
    }
    begin(0);
    for (Index block = 0; block < blocks; ++block) {
      if (block + 1 < blocks) begin(block + 1);
      const std::byte* const at = b.panel + block * kLayout.bytes();
      const Lanes<float> scale = Codes::scale(at, lane);
      Lanes<float> minimum{};
      if constexpr (Codes::kHasMinimum) minimum = Codes::minimum(at, lane);
      const auto* const sum = reinterpret_cast<const std::byte*>(sums.of[block % 2]);
#pragma GCC unroll 16
      for (Index i = 0; i < height; ++i) {
        const Words words = words_of(sum + i * TileScope::kLine);
        const Lanes<float> scaled = scales[block][i] * __builtin_convertvector(words, Lanes<float>);
        total[i] += scale * scaled;
        if constexpr (Codes::kHasMinimum) total[i] += minimum * of_codes[block][i];
      }
    }
#pragma GCC unroll 16
    for (Index i = 0; i < height; ++i) store_lanes<float>(total[i], c + i * kTileCols + lane);
  }
}

}  // namespace weir::kernels::detail
#endif
