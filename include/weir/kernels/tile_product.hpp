// SPDX-License-Identifier: MIT
/// \file
/// Products of bfloat16 numbers in the processor's tiles.
#pragma once

#include <algorithm>
#include <cstring>

#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/bfloat16.hpp>
#include <weir/kernels/panel.hpp>
#include <weir/kernels/register_block.hpp>
#include <weir/kernels/tiles.hpp>

namespace weir::kernels {

/// How many steps, of two numbers each, a block of a panel has that is multiplied in tiles. Panels
/// have whole blocks: zeros fill them up.
inline constexpr Index kTileSteps = kHasTiles ? 16 : 1;

/// Bfloat16 numbers between the rows of a left operand that is multiplied in tiles: whole blocks,
/// and an odd number of cache lines, so that the 16 lines of a tile are spread over the cache.
constexpr Index tile_row(Index steps) {
  if (!kHasTiles) return 2 * steps;
  const Index blocks = steps / kTileSteps;
  return 2 * kTileSteps * (blocks + 1 - blocks % 2);
}

#if WEIR_TILES
namespace detail {

inline constexpr Index kTileCols = Block<float>::kCols;
/// Numbers of a block of a panel.
inline constexpr Index kTileBlock = 2 * kTileSteps * kTileCols;

/// Rounds as tiles do for as long as it lives: to nearest, with numbers below the normal range as
/// zeros, unless they are inputs and `keeps_small_inputs`. What is computed under it has to be in a
/// function of its own, or the compiler might move it elsewhere.
class TileRounding {
 public:
  explicit TileRounding(bool keeps_small_inputs = false) {
    _mm_setcsr(keeps_small_inputs ? kFlush : kFlush | kSmallInputsAreZeros);
  }
  TileRounding(const TileRounding&) = delete;
  TileRounding& operator=(const TileRounding&) = delete;
  ~TileRounding() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlush = 0x9F80;  // No exceptions.
  static constexpr unsigned kSmallInputsAreZeros = 0x0040;
  unsigned before_ = _mm_getcsr();
};

/// c = one row times `panels` panels, in the order of tiles, under `TileRounding`.
template <Index panels>
[[gnu::noinline]] void multiply_row_as_tiles(const BFloat16* a, const BFloat16* b, Index blocks,
                                             float* c) {
  constexpr Index kVectors = Block<float>::kVectors;
  constexpr Index kVector = 2 * kLanes<float>;
  constexpr Index kAhead = 2048 / static_cast<Index>(sizeof(BFloat16));
  const Index panel_size = blocks * kTileBlock;
  const __m512i of_odd = _mm512_set1_epi32(static_cast<int>(0xFFFF0000U));
  const auto even_of = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
  const auto odd_of = [&](__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, of_odd)); };
  std::fill_n(c, panels * kTileCols, 0.0F);
  for (Index block = 0; block < blocks; ++block) {
    __m512 even[panels][kVectors] = {};
    __m512 odd[panels][kVectors] = {};
#pragma GCC unroll 1
    for (Index step = 0; step < kTileSteps; ++step) {
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(load_pair(a)));
      const __m512 first = even_of(pair);
      const __m512 second = odd_of(pair);
#pragma GCC unroll 8
      for (Index s = 0; s < panels; ++s) {
#pragma GCC unroll 8
        for (Index j = 0; j < kVectors; ++j) {
          const BFloat16* const from = b + s * panel_size + j * kVector;
          __builtin_prefetch(from + kAhead, 0, 2);
          const __m512i column = _mm512_loadu_si512(from);
          even[s][j] = _mm512_fmadd_ps(first, even_of(column), even[s][j]);
          odd[s][j] = _mm512_fmadd_ps(second, odd_of(column), odd[s][j]);
        }
      }
      a += 2;
      b += kVectors * kVector;
    }
#pragma GCC unroll 8
    for (Index s = 0; s < panels; ++s) {
#pragma GCC unroll 8
      for (Index j = 0; j < kVectors; ++j) {
        float* const sum = c + (s * kVectors + j) * kLanes<float>;
        const __m512 added = _mm512_add_ps(even[s][j], odd[s][j]);
        _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), added));
      }
    }
  }
}

/// Reads a block in the order of memory, and has the lines behind it fetched.
inline void stream_block(const BFloat16* block) {
  constexpr Index kAhead = 2048;
  constexpr Index kBytes = kTileBlock * static_cast<Index>(sizeof(BFloat16));
  const char* const from = reinterpret_cast<const char*>(block);
#pragma GCC unroll 4
  for (Index line = 0; line < kBytes; line += TileScope::kLine) {
    __builtin_prefetch(from + line + kAhead, 0, 2);
    static_cast<void>(*static_cast<const volatile char*>(from + line));
  }
}

/// sums = before + up to 16 rows times `blocks` blocks of a panel, for tiles of as many rows.
/// \param before   Zeros if null.
/// \param sums     [rows, kTileCols]
/// \param streams  Whether the blocks come from memory.
inline void multiply_tile(const BFloat16* a, Index a_row, const BFloat16* b, Index blocks,
                          const float* before, Index before_row, float* sums, bool streams) {
  constexpr Index kNumbers = TileScope::kLine / static_cast<Index>(sizeof(BFloat16));
  constexpr Index kSums = TileScope::kLine / static_cast<Index>(sizeof(float));
  // In bytes.
  constexpr auto kPanelRow = static_cast<Index>(2 * kTileCols * sizeof(BFloat16));
  constexpr auto kSumRow = static_cast<Index>(kTileCols * sizeof(float));
  const auto left_row = a_row * static_cast<Index>(sizeof(BFloat16));
  // The compiler may not know that tiles read memory.
  asm volatile("" : : "r"(a), "r"(b), "r"(before) : "memory");
  if (before != nullptr) {
    const auto row = before_row * static_cast<Index>(sizeof(float));
    _tile_loadd(0, before, row);
    _tile_loadd(1, before + kSums, row);
    _tile_loadd(2, before + 2 * kSums, row);
    _tile_loadd(3, before + 3 * kSums, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (Index block = 0; block < blocks; ++block) {
    if (streams) stream_block(b);
    _tile_loadd(4, a, left_row);
    _tile_loadd(5, b, kPanelRow);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, b + kNumbers, kPanelRow);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, b + 2 * kNumbers, kPanelRow);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, b + 3 * kNumbers, kPanelRow);
    _tile_dpbf16ps(3, 4, 5);
    a += kNumbers;
    b += kTileBlock;
  }
  _tile_stored(0, sums, kSumRow);
  _tile_stored(1, sums + kSums, kSumRow);
  _tile_stored(2, sums + 2 * kSums, kSumRow);
  _tile_stored(3, sums + 3 * kSums, kSumRow);
}

}  // namespace detail

/// c[0..rows, 0..kCols] (+)= rows of the left operand times a panel of `steps` steps, in tiles. One
/// block of 32 inputs i is added to a sum after the other:
///
///     c = c + (sum over even i of a_i b_i + sum over odd i of a_i b_i)
///
/// with all sums in fp32, inputs in order, each product added without being rounded before. Numbers
/// below the normal range count as zero, and such results become zero; infinities and NaNs are
/// those of IEEE arithmetic. (Intel 64 and IA-32 Architectures Software Developer's Manual,
/// TDPBF16PS.)
///
/// \param left    At steps of two numbers.
/// \param steps   A multiple of kTileSteps.
inline void multiply_panel_in_tiles(TileScope& tiles, LeftRows<PairedBFloat16> left, Index rows,
                                    const BFloat16* panel, Index steps, float* c, Index c_row,
                                    bool accumulate) {
  constexpr Index kCols = detail::kTileCols;
  constexpr Index kBlocksInL1 = 8;  // Blocks that stay in L1 while all rows pass by.
  const Index blocks = steps / kTileSteps;
  const Index slice = rows <= TileScope::kRows ? std::max<Index>(1, blocks) : kBlocksInL1;
  // Rows of c may be so far apart that they want the same places of the cache.
  float* sums = c;
  if (c_row != kCols) {
    auto& space = ThreadSpace<float, TileScope>::of_this_thread();
    space.reserve(rows * kCols);
    sums = space.take(rows * kCols);
  }
  Index first = 0;
  do {
    const Index count = std::min(slice, blocks - first);
    for (Index row = 0; row < rows; row += TileScope::kRows) {
      const Index height = std::min(TileScope::kRows, rows - row);
      float* const of_tile = sums + row * kCols;
      const bool begins = first == 0;
      const float* const before = !begins ? of_tile : accumulate ? c + row * c_row : nullptr;
      tiles.set_rows(height);
      detail::multiply_tile(left.at + row * left.row + first * 2 * kTileSteps, left.row,
                            panel + first * detail::kTileBlock, count, before,
                            begins ? c_row : kCols, of_tile, row == 0);
      if (sums == c || first + count < blocks) continue;
      for (Index i = 0; i < height; ++i) {
        std::memcpy(c + (row + i) * c_row, of_tile + i * kCols, kCols * sizeof *c);
      }
    }
    first += slice;
  } while (first < blocks);
}

/// Pieces `begin` to `end` of a product in tiles. A single row is multiplied in vector registers,
/// in the same order to the bit: a tile would wait for memory more often.
/// \param panels  Where the panels begin, one behind the other.
/// \param steps   A multiple of kTileSteps.
inline void multiply_pieces_in_tiles(const Cut& cut, LeftRows<PairedBFloat16> left,
                                     const BFloat16* panels, Index steps, Index begin, Index end,
                                     Store<float> store) {
  constexpr Index kCols = detail::kTileCols;
  constexpr Index kSideBySide = 2;
  const Index size = 2 * steps * kCols;
  TileScope tiles;
  Index piece = begin;
  while (piece < end) {
    const Index row = piece / cut.panels * cut.rows;
    const Index rows = std::min(cut.rows, cut.total_rows - row);
    const Index j = piece % cut.panels;
    const LeftRows<PairedBFloat16> from = {left.at + row * left.row, left.row, left.step};
    if (rows > 1) {
      store(row, rows, j, [&](float* c, Index c_row, bool accumulate) {
        multiply_panel_in_tiles(tiles, from, rows, panels + j * size, steps, c, c_row, accumulate);
      });
      ++piece;
      continue;
    }
    const bool two = end - piece >= kSideBySide && cut.panels - j >= kSideBySide;
    const auto multiply =
        two ? detail::multiply_row_as_tiles<kSideBySide> : detail::multiply_row_as_tiles<1>;
    float sums[kSideBySide * kCols];
    {
      const detail::TileRounding rounding;
      multiply(from.at, panels + j * size, steps / kTileSteps, sums);
    }
    for (Index s = 0; s < (two ? kSideBySide : 1); ++s) {
      store(row, rows, j + s, [&](float* c, Index /*c_row*/, bool /*accumulate*/) {
        std::copy_n(sums + s * kCols, kCols, c);
      });
    }
    piece += two ? kSideBySide : 1;
  }
}
#endif

}  // namespace weir::kernels
