// SPDX-License-Identifier: MIT
/// \file
/// The rows of a matrix, taken apart into heads.
#pragma once

#include <algorithm>

#include <weir/core/parallel.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Stores the rows of each head by themselves, one behind the other. The rows of the matrix often
/// lie a power of two apart; read column by column, they would push each other out of L1.
template <class T>
class RowsApart {
 public:
  /// Makes room for `rows` rows of `heads` heads, each `dim` wide.
  void reshape(Index heads, Index rows, Index dim) {
    height_ = rows;
    storage_.reshape(heads * rows, dim);
  }

  /// Copies the heads of `rows` rows, which lie `stride` apart, to the rows from `to` on.
  void copy(const T* from, Index stride, Index rows, Index to);

  void set(MatrixIn<T> from, Index heads, Index dim) {
    reshape(heads, from.rows(), dim);
    copy(from.data(), from.outerStride(), from.rows(), 0);
  }

  T* at(Index head, Index row) { return storage_.data() + (head * height_ + row) * row_size(); }
  Index row_size() const { return storage_.cols(); }

 private:
  Scratch<T> storage_;
  Index height_ = 0;
};

template <class T>
void RowsApart<T>::copy(const T* from, Index stride, Index rows, Index to) {
  const Index dim = storage_.cols();
  const Index heads = height_ == 0 ? 0 : storage_.rows() / height_;
  parallel_rows(rows, heads * dim, [&](Index begin, Index end) {
    for (Index head = 0; head < heads; ++head) {
      for (Index row = begin; row < end; ++row) {
        std::copy_n(from + row * stride + head * dim, dim, at(head, to + row));
      }
    }
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::RowsApart<float>;
extern template class weir::RowsApart<double>;
#endif
