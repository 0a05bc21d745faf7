// SPDX-License-Identifier: MIT
/// \file
/// Panels: operands arranged for the innermost loop, and the product of rows with one panel.
#pragma once

#include <algorithm>
#include <type_traits>

#include <weir/core/function_ref.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/pack.hpp>
#include <weir/kernels/register_block.hpp>
#include <weir/kernels/schedule.hpp>

namespace weir::kernels {

/// How many steps of a panel are multiplied before the next ones are read. They stay in L2 while
/// all rows pass by.
inline constexpr Index kSlice = 512;

/// The rows of a left operand: step s of row i is at `at + i * row + s * step`.
template <class Arithmetic>
struct LeftRows {
  const typename Arithmetic::Left* at = nullptr;
  Index row = 0, step = 0;
};

/// A panel that lies packed in memory, and the panel that will be multiplied next.
template <class Arithmetic>
struct PackedPanel {
  using Right = typename Arithmetic::Right;
  static constexpr Index kRow = Block<typename Arithmetic::Sum>::kCols * Arithmetic::kDepth;

  const Right* panel = nullptr;
  const Right* next = nullptr;  ///< Null if unknown.
  Index steps = 0;

  const Right* slice(Index first, Index /*count*/) const { return panel + first * kRow; }

  /// What tile `tile` of `tiles` over the slice [first, first + count) should read ahead: its share
  /// of the following slice, line by line.
  ReadAhead ahead(Index first, Index count, Index tile, Index tiles) const {
    const Right* following = first + count < steps ? panel + (first + count) * kRow : next;
    if (following == nullptr) return {reinterpret_cast<const char*>(panel)};
    const Index bytes = kRow * static_cast<Index>(sizeof(Right));
    const Index near = (bytes + tiles - 1) / tiles;
    return {reinterpret_cast<const char*>(following) + tile * count * near, near,
            ReadAhead::kGroup * near};
  }
};

/// A panel that is packed from a matrix slice by slice, into `space` [kSlice, kCols], unless the
/// matrix is as wide as a panel and lies there as one. Element [p, j] of the matrix is at `from + p
/// * depth_stride + j * stride`.
template <class T>
struct StridedPanel {
  static constexpr Index kCols = Block<T>::kCols;

  const T* from = nullptr;
  Index stride = 0, depth_stride = 0;
  Index cols = 0;
  Index steps = 0;
  T* space = nullptr;
  const T* next = nullptr;  ///< Where the panel that will be multiplied next begins, or null.

  const T* slice(Index first, Index count) const {
    const bool is_panel = stride == 1 && depth_stride == kCols && cols == kCols;
    if (is_panel) return from + first * depth_stride;
    pack_strip<kCols>(from + first * depth_stride, stride, depth_stride, cols, count, space);
    return space;
  }

  ReadAhead ahead(Index first, Index count, Index tile, Index /*tiles*/) const {
    const T* following = first + count < steps ? from + (first + count) * depth_stride : next;
    if (following == nullptr) return {reinterpret_cast<const char*>(space)};
    return ahead_of(following, stride, depth_stride, tile, space);
  }

  /// Reads about a quarter of the following slice, tile by tile.
  static ReadAhead ahead_of(const T* following, Index stride, Index depth_stride, Index tile,
                            const T* idle);
};

template <class T>
ReadAhead StridedPanel<T>::ahead_of(const T* following, Index stride, Index depth_stride,
                                    Index tile, const T* idle) {
  constexpr Index kLine = 64 / static_cast<Index>(sizeof(T));
  constexpr auto kSize = static_cast<Index>(sizeof(T));
  const Index group = ReadAhead::kGroup;
  if (stride == 1 && tile * kLine < kCols) {
    const Index near = depth_stride * kSize;
    return {reinterpret_cast<const char*>(following + tile * kLine), near, group * near};
  }
  if (stride != 1 && tile * group < kCols) {
    return {reinterpret_cast<const char*>(following + tile * group * stride), stride * kSize,
            group * depth_stride * kSize};
  }
  return {reinterpret_cast<const char*>(idle)};
}

/// What to read ahead while a tile of sums is computed that are added to memory: the next tile.
template <class T>
ReadAhead ahead_of_sums(const T* next, Index row, Index steps) {
  constexpr auto kSize = static_cast<Index>(sizeof(T));
  const Index groups = (steps + ReadAhead::kGroup - 1) / ReadAhead::kGroup;
  return {reinterpret_cast<const char*>(next), row * kSize, Block<T>::kCols * kSize / groups};
}

/// What else to read ahead. With many tiles, it is the rows of the next tile. With few tiles, it is
/// the line behind the one that `ahead` reads, so that they suffice to read all of the next slice.
template <class Arithmetic>
ReadAhead also_ahead(LeftRows<Arithmetic> left, const typename Arithmetic::Left* next,
                     ReadAhead ahead, Index tiles) {
  constexpr Index kLine = 64;
  constexpr auto kSize = static_cast<Index>(sizeof(typename Arithmetic::Left));
  if (tiles < 4) return {ahead.at + kLine, ahead.near, ahead.far};
  if (left.step != Arithmetic::kDepth) return {ahead.at};
  return {reinterpret_cast<const char*>(next), left.row * kSize,
          ReadAhead::kGroup * left.step * kSize};
}

/// c[0..rows, 0..kCols] (+)= rows of the left operand times a panel of `steps` steps.
template <class Arithmetic, class Panel>
void multiply_panel(LeftRows<Arithmetic> left, Index rows, Index steps, const Panel& panel,
                    typename Arithmetic::Sum* c, Index c_row, bool accumulate) {
  if (steps == 0 && !accumulate) {
    constexpr Index kCols = Block<typename Arithmetic::Sum>::kCols;
    for (Index i = 0; i < rows; ++i) std::fill_n(c + i * c_row, kCols, typename Arithmetic::Sum(0));
  }
  // One tile reads a panel once, two read it twice. This is worth a row that leaves no register
  // free.
  const bool alone = rows > 0 && rows <= Arithmetic::kMostRows;
  if constexpr (std::is_same_v<Panel, PackedPanel<Arithmetic>>) {
    // A single tile reads the panel front to back. It leaves reading ahead to the processor, which
    // any other access would disturb.
    if (alone) {
      return multiply_rows<Arithmetic>(rows, left.at, left.row, left.step, panel.panel, steps, c,
                                       c_row, accumulate, ReadAhead{}, ReadAhead{});
    }
  }
  const Index tiles = alone ? 1 : (rows + Arithmetic::kRows - 1) / Arithmetic::kRows;
  for (Index first = 0; first < steps; first += kSlice) {
    const Index count = std::min(kSlice, steps - first);
    const typename Arithmetic::Right* b = panel.slice(first, count);
    for (Index tile = 0; tile < tiles; ++tile) {
      const Index row = rows * tile / tiles;
      const Index end = rows * (tile + 1) / tiles;
      const ReadAhead ahead = accumulate && first == 0 && end < rows
                                  ? ahead_of_sums(c + end * c_row, c_row, count)
                                  : panel.ahead(first, count, tile, tiles);
      const auto* const a = left.at + row * left.row + first * left.step;
      multiply_rows<Arithmetic>(end - row, a, left.row, left.step, b, count, c + row * c_row, c_row,
                                accumulate || first > 0, ahead,
                                also_ahead(left, a + (end - row) * left.row, ahead, tiles));
    }
  }
}

/// How the product of one group of rows with one right operand is cut into pieces: each is a range
/// of rows times a panel. A piece's number counts panels first, then rows.
struct Cut {
  /// Up to this many rows are multiplied with several packed panels at once.
  static constexpr Index kMostRowsSideBySide = 3;
  static constexpr Index kMostSideBySide = 4;

  /// The most rows that are multiplied with a panel while it stays in L2.
  static constexpr Index kMostRows = 512;

  Index total_rows = 0;
  Index rows = 1;  ///< The rows of a piece; the last piece may have fewer.
  Index panels = 0;

  /// Pieces of about equal size, of at most `most_rows` rows.
  static Cut of(Index total_rows, Index panels, Index most_rows = kMostRows) {
    const Index groups = std::max<Index>(1, (total_rows + most_rows - 1) / most_rows);
    return {total_rows, std::max<Index>(1, (total_rows + groups - 1) / groups), panels};
  }

  /// \param panel_cost  How many numbers a panel has.
  Pieces pieces(Index panel_cost) const {
    constexpr Index kReading = 8;  // How many rows take as long as reading a panel.
    return {(total_rows + rows - 1) / rows * panels, std::max(kReading, rows) * panel_cost,
            rows <= kMostRowsSideBySide ? kMostSideBySide : 1};
  }
};

/// The most rows a piece should have, so that every thread gets enough pieces.
/// `pieces_with(most_rows)` counts the pieces.
inline Index most_rows_for_threads(FunctionRef<Index(Index)> pieces_with) {
  constexpr Index kEnough = 8;  // For each thread.
  constexpr Index kFewestRows = 48;
  Index most_rows = Cut::kMostRows;
  while (most_rows > kFewestRows && pieces_with(most_rows) < kEnough * threads()) most_rows /= 2;
  return most_rows;
}

/// `compute(c, c_row, accumulate)` computes a part of a product. Row i goes to `c + i * c_row`, all
/// kCols columns; it is added to the numbers there if `accumulate`.
template <class Sum>
using Compute = FunctionRef<void(Sum* c, Index c_row, bool accumulate)>;

/// `store(row, rows, j, compute)` has to call `compute` once, with the place of rows `row` to `row
/// + rows` of panel j. With packed panels it must not ask it to accumulate, since sums that begin
/// in different places would have different bits.
template <class Sum>
using Store = FunctionRef<void(Index row, Index rows, Index j, Compute<Sum> compute)>;

/// Multiplies up to three rows with several of the `remaining` packed panels from `panel` on, side
/// by side: a core that waits for memory gets more from it by reading at several places. `behind`
/// is the number of panels that the operand has from `panel` on. Returns how many panels were
/// multiplied; with more rows, it is 0.
template <class Arithmetic>
Index multiply_side_by_side(LeftRows<Arithmetic> left, Index row, Index rows,
                            const PackedPanel<Arithmetic>& panel, Index j, Index remaining,
                            Index behind, Store<typename Arithmetic::Sum> store) {
  using Sum = typename Arithmetic::Sum;
  constexpr Index kCols = Block<Sum>::kCols;
  constexpr Index kMostSums = 6;
  Sum sums[kMostSums * kCols];
  const auto multiply = [&]<Index kRows, Index kStreams>(std::integral_constant<Index, kRows>,
                                                         std::integral_constant<Index, kStreams>) {
    static_assert(kRows * kStreams <= kMostSums);
    const Index size = panel.steps * PackedPanel<Arithmetic>::kRow;
    const auto* const next = behind >= 2 * kStreams ? panel.panel + kStreams * size : nullptr;
    multiply_streams<Arithmetic, kRows, kStreams>(left.at, left.row, left.step, panel.panel, size,
                                                  panel.steps, next, sums);
    return kStreams;
  };
  constexpr std::integral_constant<Index, 1> kOne;
  constexpr std::integral_constant<Index, 2> kTwo;
  constexpr std::integral_constant<Index, 3> kThree;
  constexpr std::integral_constant<Index, 4> kFour;
  Index done = 0;
  if (rows == 1 && remaining >= 4) {
    done = multiply(kOne, kFour);
  } else if (rows == 1 && remaining >= 2) {
    done = multiply(kOne, kTwo);
  } else if (rows == 2 && remaining >= 2) {
    done = multiply(kTwo, kTwo);
  } else if (rows == 3 && remaining >= 2) {
    done = multiply(kThree, kTwo);
  }
  for (Index s = 0; s < done; ++s) {
    store(row, rows, j + s, [&](Sum* c, Index c_row, bool /*accumulate*/) {
      for (Index i = 0; i < rows; ++i) {
        std::copy_n(sums + (s * rows + i) * kCols, kCols, c + i * c_row);
      }
    });
  }
  return done;
}

/// Pieces `begin` to `end` of a product.
///
/// \param panel_of  `panel_of(j, followed)` gives panel j, `followed` telling whether panel j + 1
///                  will be multiplied after it.
template <class Arithmetic, class PanelOf>
void multiply_pieces(const Cut& cut, LeftRows<Arithmetic> left, Index steps, Index begin, Index end,
                     PanelOf&& panel_of, Store<typename Arithmetic::Sum> store) {
  Index piece = begin;
  while (piece < end) {
    const Index row = piece / cut.panels * cut.rows;
    const Index rows = std::min(cut.rows, cut.total_rows - row);
    const Index j = piece % cut.panels;
    const Index remaining = std::min(end - piece, cut.panels - j);
    const auto panel = panel_of(j, remaining > 1);
    const LeftRows<Arithmetic> from = {left.at + row * left.row, left.row, left.step};
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(panel)>, PackedPanel<Arithmetic>>) {
      const Index done = multiply_side_by_side<Arithmetic>(from, row, rows, panel, j, remaining,
                                                           cut.panels - j, store);
      piece += done;
      if (done > 0) continue;
    }
    ++piece;
    store(row, rows, j, [&](typename Arithmetic::Sum* c, Index c_row, bool accumulate) {
      multiply_panel<Arithmetic>(from, rows, steps, panel, c, c_row, accumulate);
    });
  }
}

/// A `Store` for a product that is a matrix of `cols` columns. It adds to the matrix if
/// `accumulate`.
template <class T>
struct ToMatrix {
  T* out = nullptr;
  Index out_row = 0;
  Index cols = 0;
  bool accumulate = false;

  void operator()(Index row, Index rows, Index j, Compute<T> compute) const {
    constexpr Index kCols = Block<T>::kCols;
    const Index width = std::min(kCols, cols - j * kCols);
    T* const to = out + row * out_row + j * kCols;
    if (width == kCols) return compute(to, out_row, accumulate);
    auto& space = ThreadSpace<T, ToMatrix>::of_this_thread();
    space.reserve(Cut::kMostRows * kCols);
    T* const edge = space.take(Cut::kMostRows * kCols);
    compute(edge, kCols, false);
    for (Index i = 0; i < rows; ++i) {
      for (Index c = 0; c < width; ++c) {
        T& target = to[i * out_row + c];
        target = (accumulate ? target : T(0)) + edge[i * kCols + c];
      }
    }
  }
};

}  // namespace weir::kernels

#ifdef WEIR_COMPILED
extern template struct weir::kernels::StridedPanel<float>;
extern template struct weir::kernels::StridedPanel<double>;
#endif
