// SPDX-License-Identifier: MIT
/// \file
/// The rows of a matrix, taken apart into heads.
#pragma once

#include <algorithm>

#include <weir/core/function_ref.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>
#include <weir/core/workspace.hpp>

namespace weir {

/// Stores the rows of each head by themselves, one behind the other. The rows of the matrix often
/// lie a power of two apart; read column by column, they would push each other out of L1.
template <class T>
class RowsApart {
 public:
  /// Takes memory for `rows` rows of `heads` heads, each `dim` wide. It lasts as long as the frame.
  void reshape(Workspace::Frame& frame, Index heads, Index rows, Index dim) {
    heads_ = heads;
    height_ = rows;
    dim_ = dim;
    storage_ = frame.take<T>(heads * rows * dim);
  }

  /// Copies the heads of `rows` rows, of which row i lies at `row_of(i)`, to the rows from `to` on.
  void copy(FunctionRef<const T*(Index)> row_of, Index rows, Index to);

  void set(Workspace::Frame& frame, MatrixIn<T> from, Index heads, Index dim) {
    reshape(frame, heads, from.rows(), dim);
    copy([&](Index i) { return from.data() + i * from.outerStride(); }, from.rows(), 0);
  }

  T* at(Index head, Index row) { return storage_ + (head * height_ + row) * dim_; }
  Index row_size() const { return dim_; }

 private:
  T* storage_ = nullptr;
  Index heads_ = 0, height_ = 0, dim_ = 0;
};

template <class T>
void RowsApart<T>::copy(FunctionRef<const T*(Index)> row_of, Index rows, Index to) {
  parallel_rows(rows, heads_ * dim_, [&](Index begin, Index end) {
    for (Index row = begin; row < end; ++row) {
      const T* const from = row_of(row);
      for (Index head = 0; head < heads_; ++head) {
        std::copy_n(from + head * dim_, dim_, at(head, to + row));
      }
    }
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::RowsApart<float>;
extern template class weir::RowsApart<double>;
#endif
