// SPDX-License-Identifier: MIT
/// \file
/// Products of rows with packed weights, many at once.
#pragma once

#include <algorithm>
#include <span>
#include <type_traits>

#include <weir/core/function_ref.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/packed_weight.hpp>
#include <weir/kernels/panel.hpp>
#include <weir/kernels/schedule.hpp>

namespace weir::kernels {

/// A group of rows that is multiplied with one packed weight.
template <class Arithmetic>
struct PackedProduct {
  const typename Arithmetic::Left* left = nullptr;  ///< As `arrange_rows` leaves them.
  Index rows = 0;
  const PackedWeight<typename Arithmetic::Sum>* weight = nullptr;
};

/// How far one arranged row is from the next.
template <class Arithmetic>
Index row_length(Index cols) {
  return (cols + Arithmetic::kDepth - 1) / Arithmetic::kDepth * Arithmetic::kDepth;
}

/// to[i] = the `cols` numbers at `row_of(i)`, rounded if the arithmetic asks for it, and filled up
/// with zeros to `row_length`.
template <class Arithmetic>
void arrange_rows(Index rows, Index cols,
                  FunctionRef<const typename Arithmetic::Sum*(Index)> row_of,
                  typename Arithmetic::Left* to) {
  using Left = typename Arithmetic::Left;
  const Index length = row_length<Arithmetic>(cols);
  parallel_rows(rows, cols, [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      Left* const row = to + i * length;
      if constexpr (std::is_same_v<Left, BFloat16>) {
        round_to_bfloat16(cols, row_of(i), row);
      } else {
        std::copy_n(row_of(i), cols, row);
      }
      std::fill(row + cols, row + length, Left());
    }
  });
}

/// The rows of x as `arrange_rows` leaves them, in space of this thread that `User` has for itself.
template <class Arithmetic, class User>
const typename Arithmetic::Left* arranged_rows(MatrixIn<typename Arithmetic::Sum> x) {
  const Index size = x.rows() * row_length<Arithmetic>(x.cols());
  auto& space = ThreadSpace<typename Arithmetic::Left, User>::of_this_thread();
  space.reserve(size);
  auto* const left = space.take(size);
  arrange_rows<Arithmetic>(
      x.rows(), x.cols(), [&](Index i) { return x.data() + i * x.outerStride(); }, left);
  return left;
}

/// Computes `count` products. `product_of(i)` is number i; its parts go to `store(i, row, rows, j,
/// compute)`, see `Store`. All threads share the pieces of all products.
template <class Arithmetic>
void multiply_packed(Index count, FunctionRef<PackedProduct<Arithmetic>(Index)> product_of,
                     FunctionRef<void(Index i, Index row, Index rows, Index j,
                                      Compute<typename Arithmetic::Sum> compute)>
                         store) {
  const Index most_rows = most_rows_for_threads([&](Index rows) {
    Index pieces = 0;
    for (Index i = 0; i < count; ++i) {
      const PackedProduct<Arithmetic> p = product_of(i);
      pieces += Cut::of(p.rows, p.weight->panels(), rows).pieces(1).count;
    }
    return pieces;
  });
  const auto cut_of = [&](const PackedProduct<Arithmetic>& p) {
    return Cut::of(p.rows, p.weight->panels(), most_rows);
  };
  parallel_pieces_of(
      count,
      [&](Index i) {
        const PackedProduct<Arithmetic> p = product_of(i);
        return cut_of(p).pieces(p.weight->steps() * Block<typename Arithmetic::Sum>::kCols);
      },
      [&](Index i, Index begin, Index end) {
        const PackedProduct<Arithmetic> p = product_of(i);
        const LeftRows<Arithmetic> left = {p.left, row_length<Arithmetic>(p.weight->cols()),
                                           Arithmetic::kDepth};
        multiply_pieces<Arithmetic>(
            cut_of(p), left, p.weight->steps(), begin, end,
            [&](Index j, bool followed) {
              return p.weight->template panel<Arithmetic>(j, followed);
            },
            [&](Index row, Index rows, Index j, Compute<typename Arithmetic::Sum> compute) {
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
  products[0].weight->with_arithmetic([&](auto arithmetic) {
    using Arithmetic = decltype(arithmetic);
    const Index length = row_length<Arithmetic>(x.cols());
    const auto* const left = arranged_rows<Arithmetic, PackedWeight<T>>(x);
    multiply_packed<Arithmetic>(
        static_cast<Index>(products.size()),
        [&](Index i) -> PackedProduct<Arithmetic> {
          const PackedTo<T>& p = element(products, i);
          return {left + p.first * length, p.rows, p.weight};
        },
        [&](Index i, Index row, Index rows, Index j, Compute<T> compute) {
          const PackedTo<T>& p = element(products, i);
          const ToMatrix<T> to = {p.out, p.out_row, p.weight->rows()};
          to(row, rows, j, compute);
        });
  });
}

}  // namespace weir::kernels
