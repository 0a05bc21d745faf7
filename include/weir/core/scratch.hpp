// SPDX-License-Identifier: MIT
/// \file
/// Workspace inside a cache that grows and never shrinks.
#pragma once

#include <weir/core/aligned.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A matrix whose number of rows changes from pass to pass, as the tokens of an expert do: memory
/// is allocated only when it grows beyond anything seen before. (Eigen's own matrices allocate at
/// each change of size.)
template <class T>
class Scratch {
 public:
  using Map = Eigen::Map<Matrix<T>>;
  using ConstMap = Eigen::Map<const Matrix<T>>;

  /// Makes the matrix [rows, cols], contents unspecified.
  Map reshape(Index rows, Index cols) {
    reserve(rows * cols);
    rows_ = rows;
    cols_ = cols;
    return view();
  }

  /// Makes room for `count` numbers, contents unspecified, for callers that lay them out
  /// themselves.
  T* reserve(Index count) {
    const auto size = static_cast<std::size_t>(count);
    if (storage_.size() < size) storage_.resize(size);
    return storage_.data();
  }

  Map view() { return {storage_.data(), rows_, cols_}; }
  ConstMap view() const { return {storage_.data(), rows_, cols_}; }

  Index rows() const { return rows_; }
  Index cols() const { return cols_; }
  T* data() { return storage_.data(); }
  const T* data() const { return storage_.data(); }

 private:
  AlignedVector<T> storage_;
  Index rows_ = 0;
  Index cols_ = 0;
};

}  // namespace weir
