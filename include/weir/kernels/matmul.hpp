// SPDX-License-Identifier: MIT
/// \file
/// Matrix products on all threads, one or many at once, whose results do not depend on the number
/// of threads, nor those of a row on other rows, and which allocate nothing once warm.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <type_traits>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/precision.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/pack.hpp>
#include <weir/kernels/panel.hpp>
#include <weir/kernels/product.hpp>
#include <weir/kernels/schedule.hpp>
#include <weir/kernels/turned_rows.hpp>
#include <weir/ops/lanes.hpp>

namespace weir {

namespace kernels {

/// Columns `col` to `col + cols` of a product of few rows whose operands are both contiguous along
/// k. The results are those of panels, to the bit.
template <class T>
void multiply_few_rows(const Product<T>& p, Index col, Index cols) {
  constexpr Index kFew = 4;
  constexpr Index kCols = Block<T>::kCols;
  for (Index j = col; j < col + cols; j += kLanes<T>) {
    const Index count = std::min(kLanes<T>, col + cols - j);
    // As with ToMatrix, sums are added to at the end where a panel is not full.
    const bool full = (j / kCols + 1) * kCols <= p.n;
    Lanes<T> sums[kFew] = {};
    T* const out = p.out + j;
    for (Index i = 0; full && p.accumulate && i < p.m; ++i) {
      sums[i] = load_lanes<T>(out + i * p.out_row, count);
    }
    const T* const b = p.b + j * p.b_col;
    if (p.m == 1) multiply_turned<T, 1>(p.a, p.a_row, b, p.b_col, count, p.k, sums);
    if (p.m == 2) multiply_turned<T, 2>(p.a, p.a_row, b, p.b_col, count, p.k, sums);
    if (p.m == 3) multiply_turned<T, 3>(p.a, p.a_row, b, p.b_col, count, p.k, sums);
    if (p.m == 4) multiply_turned<T, 4>(p.a, p.a_row, b, p.b_col, count, p.k, sums);
    for (Index i = 0; i < p.m; ++i) {
      T* const target = out + i * p.out_row;
      if (!full) {
        sums[i] += p.accumulate ? load_lanes<T>(target, count) : Lanes<T>{};
      }
      store_lanes<T>(sums[i], target, count);
    }
  }
}

/// Whether packing panels costs more than it saves.
template <class T>
bool has_few_rows(const Product<T>& p) {
  constexpr Index kFew = 4;
  return p.m <= kFew && p.a_col == 1 && p.b_row == 1;
}

/// How many columns a piece has. With few rows there are fewer, so that a small weight such as a
/// router's is shared out too.
template <class T>
Index piece_cols(const Product<T>& p) {
  return has_few_rows(p) ? kLanes<T> : Block<T>::kCols;
}

/// Whether the rows of the left operand are turned before they are multiplied: those of a
/// transposed matrix lie a whole row apart with every step, which few caches can hold.
template <class T>
bool turns_rows(const Product<T>& p) {
  return p.a_col != 1 && p.k >= kLanes<T>;
}

template <class T>
Cut cut(const Product<T>& p, Index most_rows) {
  return Cut::of(p.m, (p.n + piece_cols(p) - 1) / piece_cols(p), most_rows);
}

/// How many steps of the rows of a piece are turned at once, so that they stay in L2, and how many
/// numbers lie between the rows then: they do not begin a power of two apart.
inline constexpr Index kTurnedSteps = 128;
template <class T>
inline constexpr Index kTurnedRow = kTurnedSteps + kLanes<T>;

/// The left operand of rows `row` to `row + rows` and steps `step` to `step + steps`, turned into
/// `space` [rows, kTurnedRow].
template <class T>
LeftRows<Native<T>> turned_rows(const Product<T>& p, Index row, Index rows, Index step, Index steps,
                                T* space) {
  constexpr Index kSide = kLanes<T>;
  const T* const from = p.a + row * p.a_row + step * p.a_col;
  for (Index s = 0; s < steps; s += kSide) {
    pack_strip<kSide>(from + s * p.a_col, p.a_col, p.a_row, std::min(kSide, steps - s), rows,
                      space + s, kTurnedRow<T>);
  }
  return {space, kTurnedRow<T>, 1};
}

/// Pieces `begin` to `end` of a product.
template <class T>
void multiply_pieces_of(const Product<T>& p, const Cut& cut, Index begin, Index end) {
  constexpr Index kCols = Block<T>::kCols;
  if (has_few_rows(p)) {
    const Index col = begin * piece_cols(p);
    return multiply_few_rows(p, col, std::min(end * piece_cols(p), p.n) - col);
  }
  auto& space = ThreadSpace<T, Product<T>>::of_this_thread();
  // All that any product takes, so that a thread that has computed one allocates nothing for
  // others.
  space.reserve(kSlice * kCols + Cut::kMostRows * kTurnedRow<T>);
  T* const packed = space.take(kSlice * kCols);
  T* const turned = space.take(Cut::kMostRows * kTurnedRow<T>);
  const Index slice = turns_rows(p) ? kTurnedSteps : std::max<Index>(1, p.k);
  while (begin < end) {
    const Index first = begin / cut.panels * cut.panels;  // The first piece with these rows.
    const Index last = std::min(end, first + cut.panels);
    const Index row = begin / cut.panels * cut.rows;
    const Cut part = {std::min(cut.rows, cut.total_rows - row), cut.rows, cut.panels};
    Index step = 0;
    do {
      const Index steps = std::min(slice, p.k - step);
      const auto panel_of = [&](Index j, bool followed) -> StridedPanel<T> {
        // An empty operand may have no address.
        const T* const from = p.b + (p.k == 0 ? 0 : step * p.b_row + j * kCols * p.b_col);
        return {from,
                p.b_col,
                p.b_row,
                std::min(kCols, p.n - j * kCols),
                steps,
                packed,
                followed && p.k > 0 ? from + kCols * p.b_col : nullptr};
      };
      const LeftRows<Native<T>> left =
          turns_rows(p) ? turned_rows(p, row, part.total_rows, step, steps, turned)
                        : LeftRows<Native<T>>{p.a + row * p.a_row, p.a_row, p.a_col};
      const ToMatrix<T> to = {p.out + row * p.out_row, p.out_row, p.n, p.accumulate || step > 0};
      multiply_pieces<Native<T>>(part, left, steps, begin - first, last - first, panel_of, to);
      step += slice;
    } while (step < p.k);
    begin = last;
  }
}

/// Computes all `products`, whatever their precision, without rounding the operands.
template <class T>
void multiply_exactly(std::span<const Product<T>> products) {
  const Index most_rows = kernels::most_rows_for_threads([&](Index rows) {
    Index pieces = 0;
    for (const Product<T>& p : products) pieces += kernels::cut(p, rows).pieces(1).count;
    return pieces;
  });
  kernels::parallel_pieces_of(
      static_cast<Index>(products.size()),
      [&](Index i) {
        const Product<T>& p = element(products, i);
        return kernels::cut(p, most_rows).pieces(kernels::piece_cols(p) * std::max<Index>(1, p.k));
      },
      [&](Index i, Index begin, Index end) {
        const Product<T>& p = element(products, i);
        kernels::multiply_pieces_of(p, kernels::cut(p, most_rows), begin, end);
      });
}

}  // namespace kernels

/// Computes all `products`, which must not write to the same place. All threads share the pieces of
/// all products, so that one expert with most of the tokens keeps every core busy.
template <class T>
void multiply(std::span<const Product<T>> products) {
  if constexpr (std::is_same_v<T, float>) {
    while (!products.empty()) {  // Of one precision at a time.
      const RoundedProducts* const rounded = products.front().rounded;
      const auto end =
          std::ranges::find_if(products, [&](const Product<T>& p) { return p.rounded != rounded; });
      const auto count = static_cast<std::size_t>(end - products.begin());
      if (rounded == nullptr) {
        kernels::multiply_exactly<T>(products.first(count));
      } else {
        rounded->multiply(products.first(count));
      }
      products = products.subspan(count);
    }
  } else {
    kernels::multiply_exactly<T>(products);
  }
}

template <class T>
void multiply(const Product<T>& product) {
  multiply<T>(std::span(&product, 1));
}

/// out = a b^T; a [m, k], b [n, k], out [m, n].
/// \throws ShapeError   if the shapes do not fit.
template <class T>
void multiply_nt(MatrixIn<T> a, MatrixIn<T> b, MatrixOut<T> out, bool accumulate = false) {
  expect_shape("multiply_nt", "b", b, b.rows(), a.cols());
  expect_shape("multiply_nt", "out", out, a.rows(), b.rows());
  const Product<T> product = product_nt<T>(a, b, out, accumulate);
  multiply<T>({&product, 1});
}

/// out = a b; a [m, k], b [k, n], out [m, n].
/// \throws ShapeError   if the shapes do not fit.
template <class T>
void multiply_nn(MatrixIn<T> a, MatrixIn<T> b, MatrixOut<T> out, bool accumulate = false) {
  expect_shape("multiply_nn", "b", b, a.cols(), b.cols());
  expect_shape("multiply_nn", "out", out, a.rows(), b.cols());
  const Product<T> product = product_nn<T>(a, b, out, accumulate);
  multiply<T>({&product, 1});
}

/// out = a^T b; a [k, m], b [k, n], out [m, n].
/// \throws ShapeError   if the shapes do not fit.
template <class T>
void multiply_tn(MatrixIn<T> a, MatrixIn<T> b, MatrixOut<T> out, bool accumulate = false) {
  expect_shape("multiply_tn", "b", b, a.rows(), b.cols());
  expect_shape("multiply_tn", "out", out, a.cols(), b.cols());
  const Product<T> product = product_tn<T>(a, b, out, accumulate);
  multiply<T>({&product, 1});
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template void weir::multiply<float>(std::span<const weir::Product<float>>);
extern template void weir::multiply<double>(std::span<const weir::Product<double>>);
#endif
