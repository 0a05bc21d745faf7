// SPDX-License-Identifier: MIT
/// \file
/// Panels of codes, and the product of rows with them.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <tuple>

#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/coded_block.hpp>
#include <weir/kernels/dot_block.hpp>
#include <weir/kernels/panel.hpp>

namespace weir::kernels {

/// The loops for one kind of codes.
struct CodedLoops {
  /// For 1 row and 4 panels, for 2 rows and 2 panels, and for more rows and one panel each.
  using Few = void (*)(const float*, Index, const std::byte* const*, Index, CodedSums);
  using FewBytes = void (*)(const std::byte*, Index, const std::byte* const*, Index, CodedSums);

  std::array<Few, 4> few = {};
  void (*unpack)(const std::byte*, Index, const UnpackedBlocks&) = nullptr;
  std::array<FewBytes, 5> bytes = {};  ///< Null where inputs cannot be codes.
};

/// All panels of a weight, whose numbers are codes.
struct CodedPanels {
  static constexpr Index kCols = CodedLayout::kCols;
  static constexpr Index kMostFew = 4;  ///< Up to this many rows multiply codes in registers.
  static constexpr Index kMostSideBySide = 4;

  CodedLayout layout;
  const std::byte* at = nullptr;
  Index blocks = 0;  ///< Of one panel.

  const std::byte* panel(Index j) const { return at + j * blocks * layout.bytes(); }

  /// Pieces `begin` to `end` of a product of rows, as RowFormat leaves them, with the panels.
  /// A row's result depends neither on the other rows nor on the pieces.
  void multiply(const Cut& cut, RowKind kind, const std::byte* left, Index left_row, Index begin,
                Index end, Store<float> store) const;

 private:
  /// The loops for the codes.
  const CodedLoops& loops() const;

  /// How many panels are multiplied side by side with that many rows.
  static Index side_by_side(Index rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

  /// `rows` <= kMostFew rows times the panels from j on, as many as the loop takes, of which
  /// `available` exist.
  void multiply_few(RowKind kind, const std::byte* left, Index left_row, Index rows, Index j,
                    Index available, CodedSums c) const;

  void multiply_byte_slices(const std::byte* left, Index left_row, Index rows, Index j, float* c,
                            Index c_row) const;
  void multiply_unpacked_slices(const float* left, Index left_row, Index rows, Index j, float* c,
                                Index c_row) const;
};

namespace detail {

template <class Codes>
constexpr CodedLoops coded_loops() {
  return {{multiply_codes<Codes, 1, 4>, multiply_codes<Codes, 2, 2>, multiply_codes<Codes, 3, 1>,
           multiply_codes<Codes, 4, 1>},
          unpack_codes<Codes>,
          {}};
}

template <class Codes>
constexpr CodedLoops coded_loops_with_bytes() {
  CodedLoops loops = coded_loops<Codes>();
  loops.bytes = {multiply_bytes<Codes, 1, 4>, multiply_bytes<Codes, 2, 2>,
                 multiply_bytes<Codes, 3, 1>, multiply_bytes<Codes, 4, 1>,
                 multiply_bytes<Codes, 5, 1>};
  return loops;
}

inline constexpr Index kUnpackedRows = Block<float>::kRows;

/// `multiply_unpacked` for a number of rows known at run time.
template <Index rows = kUnpackedRows>
void multiply_unpacked_rows(Index count, const float* a, Index a_row, const UnpackedBlocks& b,
                            Index blocks, CodedSums c) {
  if constexpr (rows > 1) {
    if (count < rows) return multiply_unpacked_rows<rows - 1>(count, a, a_row, b, blocks, c);
  }
  multiply_unpacked<rows>(a, a_row, b, blocks, c);
}

}  // namespace detail

inline const CodedLoops& CodedPanels::loops() const {
  static constexpr std::array<CodedLoops, 4> kLoops = {
      detail::coded_loops_with_bytes<Int8Bytes>(), detail::coded_loops_with_bytes<Int4Bytes>(),
      detail::coded_loops<MxFp4Codes>(), detail::coded_loops<Fp8Codes>()};
  return kLoops[static_cast<std::size_t>(layout.code)];
}

inline void CodedPanels::multiply_few(RowKind kind, const std::byte* left, Index left_row,
                                      Index rows, Index j, Index available, CodedSums c) const {
  std::array<const std::byte*, kMostSideBySide> panels = {};
  for (Index s = 0; s < kMostSideBySide; ++s) {
    panels[static_cast<std::size_t>(s)] = panel(j + std::min(s, available - 1));
  }
  const auto loop = static_cast<std::size_t>(rows - 1);
  if (kind == RowKind::kInt8) {
    return loops().bytes[loop](left, left_row, panels.data(), blocks, c);
  }
  loops().few[loop](reinterpret_cast<const float*>(left),
                    left_row / static_cast<Index>(sizeof(float)), panels.data(), blocks, c);
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
                                     left_row, b, count, {c + row * c_row, c_row, 0, first > 0});
    }
  }
}

inline void CodedPanels::multiply_byte_slices(const std::byte* left, Index left_row, Index rows,
                                              Index j, float* c, Index c_row) const {
  constexpr Index kMost = static_cast<Index>(std::tuple_size_v<decltype(CodedLoops::bytes)>);
  const Index tiles = (rows + kMost - 1) / kMost;  // Of at least three rows each.
  const Index slice = kSlice / layout.block();
  for (Index first = 0; first < blocks; first += slice) {
    const std::byte* const slice_at = panel(j) + first * layout.bytes();
    const std::byte* const a = left + first * static_cast<Index>(sizeof(Int8Inputs));
    const Index count = std::min(slice, blocks - first);
    for (Index tile = 0; tile < tiles; ++tile) {
      const Index row = rows * tile / tiles;
      const Index height = rows * (tile + 1) / tiles - row;
      loops().bytes[static_cast<std::size_t>(height - 1)](
          a + row * left_row, left_row, &slice_at, count, {c + row * c_row, c_row, 0, first > 0});
    }
  }
}

inline void CodedPanels::multiply(const Cut& cut, RowKind kind, const std::byte* left,
                                  Index left_row, Index begin, Index end,
                                  Store<float> store) const {
  Index piece = begin;
  while (piece < end) {
    const Index row = piece / cut.panels * cut.rows;
    const Index rows = std::min(cut.rows, cut.total_rows - row);
    const Index j = piece % cut.panels;
    const std::byte* const from = left + row * left_row;
    const Index count = std::min({side_by_side(rows), end - piece, cut.panels - j});
    piece += count;
    if (side_by_side(rows) > 1) {
      float sums[kMostSideBySide * kCols];
      multiply_few(kind, from, left_row, rows, j, count, {sums, kCols, rows * kCols, false});
      for (Index s = 0; s < count; ++s) {
        store(row, rows, j + s, [&](float* c, Index c_row, bool /*accumulate*/) {
          for (Index i = 0; i < rows; ++i) {
            std::copy_n(sums + (s * rows + i) * kCols, kCols, c + i * c_row);
          }
        });
      }
      continue;
    }
    store(row, rows, j, [&](float* c, Index c_row, bool /*accumulate*/) {
      if (rows <= kMostFew) {
        multiply_few(kind, from, left_row, rows, j, 1, {c, c_row, 0, false});
      } else if (kind == RowKind::kInt8) {
        multiply_byte_slices(from, left_row, rows, j, c, c_row);
      } else {
        multiply_unpacked_slices(reinterpret_cast<const float*>(from),
                                 left_row / static_cast<Index>(sizeof(float)), rows, j, c, c_row);
      }
    });
  }
}

}  // namespace weir::kernels
