// SPDX-License-Identifier: MIT
/// \file
/// Workspace inside a cache that grows and never shrinks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <utility>

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

  Scratch() = default;
  Scratch(const Scratch& other) { *this = other; }
  Scratch(Scratch&& other) noexcept { swap(other); }
  Scratch& operator=(const Scratch& other) {
    if (this == &other) return *this;
    reserve(static_cast<Index>(other.storage_.get_deleter().size));
    std::copy_n(other.data(), other.storage_.get_deleter().size, data());
    rows_ = other.rows_;
    cols_ = other.cols_;
    return *this;
  }
  Scratch& operator=(Scratch&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Scratch() = default;

  void swap(Scratch& other) noexcept {
    storage_.swap(other.storage_);
    std::swap(rows_, other.rows_);
    std::swap(cols_, other.cols_);
  }

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
    if (storage_.get_deleter().size < size) {
      storage_ = AlignedMemory<T>();
      rows_ = cols_ = 0;
      storage_ = allocate_aligned<T>(size);
    }
    return data();
  }

  Map view() { return {data(), rows_, cols_}; }
  ConstMap view() const { return {data(), rows_, cols_}; }

  Index rows() const { return rows_; }
  Index cols() const { return cols_; }
  T* data() { return storage_.get(); }
  const T* data() const { return storage_.get(); }

 private:
  AlignedMemory<T> storage_;
  Index rows_ = 0;
  Index cols_ = 0;
};

}  // namespace weir
