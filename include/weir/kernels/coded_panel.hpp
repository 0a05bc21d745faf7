// SPDX-License-Identifier: MIT
/// \file
/// Panels of codes, and the product of rows with them.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>

#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/coded_block.hpp>
#include <weir/kernels/coded_tiles.hpp>
#include <weir/kernels/dot_block.hpp>
#include <weir/kernels/panel.hpp>
#include <weir/kernels/tiles.hpp>

namespace weir::kernels {

/// The loops for one kind of codes.
struct CodedLoops {
  template <class Number>
  using Few = void (*)(const Number* const* a, const std::byte* const* panels, Index blocks,
                       float* const* c);

  /// For 1 row and 4 panels, for 2 rows and 2 panels, and for 4 rows and one panel.
  std::array<Few<float>, 3> few = {};
  std::array<Few<std::byte>, 3> bytes = {};  ///< Null where inputs cannot be codes.
  void (*unpack)(const std::byte*, Index, const UnpackedBlocks&) = nullptr;

#if WEIR_TILES
  using Row = void (*)(const float* a, const std::byte* from, Index size, Index blocks, float* c);
  using Tile = void (*)(const std::byte* a, Index a_row, Index rows, const detail::TileBlocks& b,
                        Index blocks, bool begins, float* c);

  void (*widen)(const std::byte*, Index, BFloat16*) = nullptr;
  std::array<Row, 2> row = {};         ///< For one panel, and for two.
  std::array<Tile, 2> tile = {};       ///< For up to 8 rows, and for 16.
  std::array<Tile, 2> byte_tile = {};  ///< Null where inputs cannot be codes.
#endif
};

/// All panels of a weight, whose numbers are codes.
struct CodedPanels {
  static constexpr Index kCols = CodedLayout::kCols;
  static constexpr Index kMostFew = 4;  ///< Up to this many rows multiply codes in registers.

  CodedLayout layout;
  const std::byte* at = nullptr;
  Index blocks = 0;  ///< Of one panel.

  const std::byte* panel(Index j) const { return at + j * blocks * layout.bytes(); }

  /// Pieces `begin` to `end` of a product of rows, as RowFormat leaves them, with the panels.
  /// A row's result depends neither on the other rows nor on the pieces. Rows of bfloat16 numbers
  /// are multiplied in tiles, or one of them in their order.
  void multiply(const Cut& cut, RowKind kind, const std::byte* left, Index left_row, Index begin,
                Index end, Store<float> store) const;

 private:
  /// The loops for the codes.
  const CodedLoops& loops() const;

  /// How many panels are multiplied side by side with that many rows.
  static Index side_by_side(Index rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

  /// `rows` <= kMostFew rows times the `count` <= side_by_side(rows) panels from j on. The sums of
  /// row i and panel s go to `c + (s * rows + i) * c_row`.
  void multiply_few(RowKind kind, const std::byte* left, Index left_row, Index rows, Index j,
                    Index count, float* c, Index c_row) const;

#if WEIR_TILES
  /// Any number of rows times panel j, in tiles.
  void multiply_tiles(TileScope& tiles, RowKind kind, const std::byte* left, Index left_row,
                      Index rows, Index j, float* c, Index c_row) const;

  /// `multiply` for rows of bfloat16 numbers.
  void multiply_in_tiles(const Cut& cut, const std::byte* left, Index left_row, Index begin,
                         Index end, Store<float> store) const;
#endif

  /// More rows than that times panel j.
  void multiply_many(RowKind kind, const std::byte* left, Index left_row, Index rows, Index j,
                     float* c, Index c_row) const;
  void multiply_unpacked_slices(const float* left, Index left_row, Index rows, Index j, float* c,
                                Index c_row) const;
};

namespace detail {

template <class Codes>
constexpr CodedLoops coded_loops() {
  CodedLoops loops;
  loops.few = {multiply_codes<Codes, 1, 4>, multiply_codes<Codes, 2, 2>,
               multiply_codes<Codes, 4, 1>};
  loops.unpack = unpack_codes<Codes>;
#if WEIR_TILES
  loops.widen = widen_codes<Codes>;
  loops.row = {multiply_row_of_codes<Codes, 1>, multiply_row_of_codes<Codes, 2>};
  loops.tile = {multiply_tile_of_codes<Codes, 8>, multiply_tile_of_codes<Codes, 16>};
#endif
  return loops;
}

template <class Codes>
constexpr CodedLoops coded_loops_with_bytes() {
  CodedLoops loops = coded_loops<Codes>();
  loops.bytes = {multiply_bytes<Codes, 1, 4>, multiply_bytes<Codes, 2, 2>,
                 multiply_bytes<Codes, 4, 1>};
#if WEIR_TILES
  loops.byte_tile = {multiply_tile_of_bytes<Codes, 8>, multiply_tile_of_bytes<Codes, 16>};
#endif
  return loops;
}

/// Tiles of rows times unpacked blocks have from 3 to this many rows, if there are 5 or more rows.
inline constexpr Index kUnpackedRows = Block<float>::kRows;

/// `multiply_unpacked` for a number of rows known at run time.
template <Index rows = kUnpackedRows>
void multiply_unpacked_rows(Index count, const float* a, Index a_row, const UnpackedBlocks& b,
                            Index blocks, float* c, Index c_row, bool accumulate) {
  if constexpr (rows > 3) {
    if (count < rows) {
      return multiply_unpacked_rows<rows - 1>(count, a, a_row, b, blocks, c, c_row, accumulate);
    }
  }
  multiply_unpacked<rows>(a, a_row, b, blocks, c, c_row, accumulate);
}

}  // namespace detail

inline const CodedLoops& CodedPanels::loops() const {
  static constexpr std::array<CodedLoops, 4> kLoops = {
      detail::coded_loops_with_bytes<Int8Bytes>(), detail::coded_loops_with_bytes<Int4Bytes>(),
      detail::coded_loops<MxFp4Codes>(), detail::coded_loops<Fp8Codes>()};
  return kLoops[static_cast<std::size_t>(layout.code)];
}

inline void CodedPanels::multiply_few(RowKind kind, const std::byte* left, Index left_row,
                                      Index rows, Index j, Index count, float* c,
                                      Index c_row) const {
  // Loops have fixed numbers of rows and panels. What is missing is done in another's place: the
  // last row a second time, with the same result, and the last panel for nobody.
  const Index height = rows == 3 ? 4 : rows;
  const Index width = side_by_side(rows);
  std::array<const std::byte*, kMostFew> panels = {};
  std::array<const std::byte*, kMostFew> a = {};
  std::array<float*, kMostFew> to = {};
  float nobody[kMostFew * kCols];
  for (Index i = 0; i < height; ++i) {
    a[static_cast<std::size_t>(i)] = left + std::min(i, rows - 1) * left_row;
  }
  for (Index s = 0; s < width; ++s) {
    panels[static_cast<std::size_t>(s)] = panel(j + std::min(s, count - 1));
    for (Index i = 0; i < height; ++i) {
      to[static_cast<std::size_t>(s * height + i)] =
          s < count ? c + (s * rows + std::min(i, rows - 1)) * c_row : nobody + i * kCols;
    }
  }
  const auto loop = static_cast<std::size_t>(std::min<Index>(rows, 3) - 1);
  if (kind == RowKind::kInt8) {
    return loops().bytes[loop](a.data(), panels.data(), blocks, to.data());
  }
  std::array<const float*, kMostFew> exact = {};
  for (std::size_t i = 0; i < a.size(); ++i) exact[i] = reinterpret_cast<const float*>(a[i]);
  loops().few[loop](exact.data(), panels.data(), blocks, to.data());
}

inline void CodedPanels::multiply_unpacked_slices(const float* left, Index left_row, Index rows,
                                                  Index j, float* c, Index c_row) const {
  constexpr Index kMostBlocks = kSlice / 32;
  auto& space = ThreadSpace<float, CodedPanels>::of_this_thread();
  space.reserve((kSlice + 2 * kMostBlocks) * kCols);
  UnpackedBlocks b = {space.take(kSlice * kCols), space.take(kMostBlocks * kCols), nullptr,
                      layout.block()};
  if (layout.code == Code::kInt4) b.minima = space.take(kMostBlocks * kCols);
  const Index tiles = (rows + detail::kUnpackedRows - 1) / detail::kUnpackedRows;
  const Index slice = kSlice / layout.block();
  for (Index first = 0; first < blocks; first += slice) {
    const Index count = std::min(slice, blocks - first);
    loops().unpack(panel(j) + first * layout.bytes(), count, b);
    for (Index tile = 0; tile < tiles; ++tile) {
      const Index row = rows * tile / tiles;
      const Index end = rows * (tile + 1) / tiles;
      detail::multiply_unpacked_rows(end - row, left + row * left_row + first * layout.block(),
                                     left_row, b, count, c + row * c_row, c_row, first > 0);
    }
  }
}

inline void CodedPanels::multiply_many(RowKind kind, const std::byte* left, Index left_row,
                                       Index rows, Index j, float* c, Index c_row) const {
  if (kind == RowKind::kInt8) {
    // The last tile begins earlier rather than being smaller: some rows are computed twice.
    for (Index tile = 0; tile < rows; tile += kMostFew) {
      const Index row = std::min(tile, rows - kMostFew);
      multiply_few(kind, left + row * left_row, left_row, kMostFew, j, 1, c + row * c_row, c_row);
    }
    return;
  }
  constexpr auto kSize = static_cast<Index>(sizeof(float));
  multiply_unpacked_slices(reinterpret_cast<const float*>(left), left_row / kSize, rows, j, c,
                           c_row);
}

#if WEIR_TILES
inline void CodedPanels::multiply_tiles(TileScope& tiles, RowKind kind, const std::byte* left,
                                        Index left_row, Index rows, Index j, float* c,
                                        Index c_row) const {
  constexpr Index kRows = TileScope::kRows;
  constexpr Index kInputsInL1 = 256;
  constexpr Index kDepthOfBytes = Int8Inputs::kCount / 4;
  const bool bytes = kind == RowKind::kInt8;
  const bool widens = !bytes || layout.code == Code::kInt4;
  const Index slice = kInputsInL1 / layout.block();
  const Index widened = bytes ? layout.block() * kCols
                              : layout.block() * kCols * static_cast<Index>(sizeof(BFloat16));
  const Index of_left = bytes ? static_cast<Index>(sizeof(Int8Inputs))
                              : layout.block() * static_cast<Index>(sizeof(BFloat16));
  auto& space = ThreadSpace<std::byte, TileScope>::of_this_thread();
  const Index padded = (rows + kRows - 1) / kRows * kRows;
  const auto sums_bytes = padded * kCols * static_cast<Index>(sizeof(float));
  space.reserve(slice * widened + sums_bytes);
  std::byte* const values = space.take(slice * widened);
  auto* const sums = reinterpret_cast<float*>(space.take(sums_bytes));
  for (Index first = 0; first < blocks; first += slice) {
    const Index count = std::min(slice, blocks - first);
    const std::byte* const from = panel(j) + first * layout.bytes();
    detail::TileBlocks b = {from, values, widened};
    if (!widens) {
      b = {from, from + layout.scale_part(), layout.bytes()};
    } else if (bytes) {
      detail::widen_to_bytes(from, count, values);
    } else {
      loops().widen(from, count, reinterpret_cast<BFloat16*>(values));
    }
    for (Index row = 0; row < rows; row += kRows) {
      const Index height = std::min(kRows, rows - row);
      tiles.set_rows(height, bytes ? kDepthOfBytes : kRows);
      const auto& multiply = bytes ? loops().byte_tile : loops().tile;
      multiply[height <= kRows / 2 ? 0 : 1](left + row * left_row + first * of_left, left_row,
                                            height, b, count, first == 0, sums + row * kCols);
      if (first + count < blocks) continue;
      for (Index i = row; i < row + height; ++i)
        std::copy_n(sums + i * kCols, kCols, c + i * c_row);
    }
  }
}

inline void CodedPanels::multiply_in_tiles(const Cut& cut, const std::byte* left, Index left_row,
                                           Index begin, Index end, Store<float> store) const {
  constexpr Index kSideBySide = 2;
  const Index inputs = blocks * layout.block();
  auto& space = ThreadSpace<float, CodedPanels>::of_this_thread();
  space.reserve(inputs);
  float* const widened = space.take(inputs);
  TileScope tiles;
  Index last = -1;  // The row that has been widened.
  Index piece = begin;
  while (piece < end) {
    const Index row = piece / cut.panels * cut.rows;
    const Index rows = std::min(cut.rows, cut.total_rows - row);
    const Index j = piece % cut.panels;
    const std::byte* const from = left + row * left_row;
    if (rows > 1) {
      store(row, rows, j, [&](float* c, Index c_row, bool /*accumulate*/) {
        const detail::TileRounding rounding(true);
        multiply_tiles(tiles, RowKind::kBfloat16, from, left_row, rows, j, c, c_row);
      });
      ++piece;
      continue;
    }
    if (row != last) detail::widen_row(reinterpret_cast<const BFloat16*>(from), inputs, widened);
    last = row;
    const Index count = std::min({kSideBySide, end - piece, cut.panels - j});
    float sums[kSideBySide * kCols];
    {
      const detail::TileRounding rounding(true);
      loops().row[static_cast<std::size_t>(count - 1)](widened, panel(j), blocks * layout.bytes(),
                                                       blocks, sums);
    }
    for (Index s = 0; s < count; ++s) {
      store(row, rows, j + s, [&](float* c, Index /*c_row*/, bool /*accumulate*/) {
        std::copy_n(sums + s * kCols, kCols, c);
      });
    }
    piece += count;
  }
}
#endif

inline void CodedPanels::multiply(const Cut& cut, RowKind kind, const std::byte* left,
                                  Index left_row, Index begin, Index end,
                                  Store<float> store) const {
#if WEIR_TILES
  if (kind == RowKind::kBfloat16) {
    return multiply_in_tiles(cut, left, left_row, begin, end, store);
  }
  const bool in_tiles = kind == RowKind::kInt8 && uses_tiles();
  TileScope tiles;
#endif
  Index piece = begin;
  while (piece < end) {
    const Index row = piece / cut.panels * cut.rows;
    const Index rows = std::min(cut.rows, cut.total_rows - row);
    const Index j = piece % cut.panels;
    const std::byte* const from = left + row * left_row;
    const Index count = std::min({side_by_side(rows), end - piece, cut.panels - j});
    piece += count;
    if (side_by_side(rows) == 1) {
      store(row, rows, j, [&](float* c, Index c_row, bool /*accumulate*/) {
        if (rows <= kMostFew) return multiply_few(kind, from, left_row, rows, j, 1, c, c_row);
#if WEIR_TILES
        if (in_tiles) return multiply_tiles(tiles, kind, from, left_row, rows, j, c, c_row);
#endif
        multiply_many(kind, from, left_row, rows, j, c, c_row);
      });
      continue;
    }
    float sums[kMostFew * kCols];
    multiply_few(kind, from, left_row, rows, j, count, sums, kCols);
    for (Index s = 0; s < count; ++s) {
      store(row, rows, j + s, [&](float* c, Index c_row, bool /*accumulate*/) {
        for (Index i = 0; i < rows; ++i) {
          std::copy_n(sums + (s * rows + i) * kCols, kCols, c + i * c_row);
        }
      });
    }
  }
}

}  // namespace weir::kernels
