// SPDX-License-Identifier: MIT
/// \file
/// Products of rows with packed weights, many at once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include <weir/core/function_ref.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/arranged_rows.hpp>
#include <weir/kernels/packed_weight.hpp>
#include <weir/kernels/panel.hpp>
#include <weir/kernels/schedule.hpp>
#include <weir/kernels/tiles.hpp>

namespace weir::kernels {

/// A group of rows that is multiplied with one packed weight.
template <class T>
struct PackedProduct {
  const std::byte* left = nullptr;  ///< As `arrange_rows` leaves them for the weight.
  Index rows = 0;
  const PackedWeight<T>* weight = nullptr;
};

/// How many rows stay near while panels pass by. Tiles multiply so fast that rows from beyond L2,
/// which has 2 MiB where there are tiles, would take longer than reading panels again.
template <class T>
Index most_rows_in_l2(const RowFormat<T>& format) {
  constexpr Index kBytes = Index{1} << 19;
  constexpr Index kFewest = 64;
  if (!uses_tiles() || format.kind == RowKind::kExact) return Cut::kMostRows;
  return std::clamp<Index>(kBytes / std::max<Index>(1, format.bytes()), kFewest, Cut::kMostRows);
}

/// Computes `count` products. `product_of(i)` is number i; its parts go to `store(i, row, rows, j,
/// compute)`, see `Store`. All threads share the pieces of all products.
template <class T>
void multiply_packed(
    Index count, FunctionRef<PackedProduct<T>(Index)> product_of,
    FunctionRef<void(Index i, Index row, Index rows, Index j, Compute<T> compute)> store) {
  const Index most_rows = most_rows_for_threads([&](Index rows) {
    Index pieces = 0;
    for (Index i = 0; i < count; ++i) {
      const PackedProduct<T> p = product_of(i);
      pieces += Cut::of(p.rows, p.weight->panels(), rows).pieces(1).count;
    }
    return pieces;
  });
  const auto cut_of = [&](const PackedProduct<T>& p) {
    return Cut::of(p.rows, p.weight->panels(),
                   std::min(most_rows, most_rows_in_l2(p.weight->row_format())));
  };
  parallel_pieces_of(
      count,
      [&](Index i) {
        const PackedProduct<T> p = product_of(i);
        return cut_of(p).pieces(p.weight->panel_cost());
      },
      [&](Index i, Index begin, Index end) {
        const PackedProduct<T> p = product_of(i);
        p.weight->multiply(cut_of(p), p.left, begin, end,
                           [&](Index row, Index rows, Index j, Compute<T> compute) {
                             store(i, row, rows, j, compute);
                           });
      });
}

/// A product of the rows `first` to `first + rows` with a packed weight, which goes to `out` [rows,
/// rows of the weight].
template <class T>
struct PackedTo {
  const PackedWeight<T>* weight = nullptr;
  Index first = 0, rows = 0;
  T* out = nullptr;
  Index out_row = 0;
};

/// out_i = x_i W_i^T for groups of the rows of x and several packed weights, all in the same
/// storage and as wide as x.
template <class T>
void multiply_packed(MatrixIn<T> x, std::span<const PackedTo<T>> products) {
  if (products.empty()) return;
  const RowFormat<T> format = products[0].weight->row_format();
  const std::byte* const left = arranged_rows<PackedWeight<T>>(format, x);
  multiply_packed<T>(
      static_cast<Index>(products.size()),
      [&](Index i) -> PackedProduct<T> {
        const PackedTo<T>& p = element(products, i);
        return {left + p.first * format.bytes(), p.rows, p.weight};
      },
      [&](Index i, Index row, Index rows, Index j, Compute<T> compute) {
        const PackedTo<T>& p = element(products, i);
        const ToMatrix<T> to = {p.out, p.out_row, p.weight->rows()};
        to(row, rows, j, compute);
      });
}

}  // namespace weir::kernels
