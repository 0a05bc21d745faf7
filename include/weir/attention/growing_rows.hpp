// SPDX-License-Identifier: MIT
/// \file
/// Rows that are added token by token.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <utility>
#include <vector>

#include <weir/core/types.hpp>

namespace weir {

/// A matrix that grows by rows at its end. Memory grows geometrically, so that a row costs the same
/// however many there are, and is kept when rows are taken back. A copy is independent.
template <class T>
class GrowingRows {
 public:
  using View = Eigen::Map<const Matrix<T>>;

  /// Stands for no limit in `append`.
  static constexpr Index kUnlimited = std::numeric_limits<Index>::max() / 2;

  Index count() const { return count_; }
  bool empty() const { return count_ == 0; }
  /// How many numbers a row has; 0 before the first row.
  Index width() const { return width_; }
  /// How many rows fit before memory is allocated; 0 while the width is unknown.
  Index capacity() const {
    return width_ == 0 ? 0 : static_cast<Index>(numbers_.capacity()) / width_;
  }

  /// [count, width]. Valid until the next change.
  View view() const { return {numbers_.data(), count_, width_}; }

  /// Adds rows, which have to be as wide as the rows that are there, if there are any.
  /// \param most  How many rows there will be in the long run, beside those that are added now.
  ///              Memory is set aside for no more than these.
  void append(MatrixIn<T> rows, Index most = kUnlimited) {
    make_room(rows.rows(), rows.cols(), most);
    for (Index i = 0; i < rows.rows(); ++i) add_row_of(rows, i);
    count_ += rows.rows();
  }

  /// Adds the rows [left | right].
  void append(MatrixIn<T> left, MatrixIn<T> right);

  /// Makes room for `count` rows in all. Has no effect before the width is known.
  /// \throws std::length_error  if no memory is that large.
  void reserve(Index count) { numbers_.reserve(size_of(std::max(count, count_))); }

  /// Takes back all rows but the first `count`. Keeps the memory.
  void truncate(Index count) {
    count_ = count;
    numbers_.resize(size_of(count));
  }

  /// Removes the first `count` rows; the others move to the front. Memory for far more than `most`
  /// rows is given up.
  void drop_front(Index count, Index most);

 private:
  std::size_t size_of(Index rows) const {
    constexpr Index kMost = std::numeric_limits<Index>::max();
    return static_cast<std::size_t>(width_ > 0 && rows > kMost / width_ ? kMost : rows * width_);
  }

  void make_room(Index more, Index width, Index most);

  void add_row_of(MatrixIn<T> rows, Index i) {
    const T* const row = rows.data() + i * rows.outerStride();
    numbers_.insert(numbers_.end(), row, row + rows.cols());
  }

  std::vector<T> numbers_;
  Index count_ = 0;
  Index width_ = 0;
};

template <class T>
void GrowingRows<T>::append(MatrixIn<T> left, MatrixIn<T> right) {
  make_room(left.rows(), left.cols() + right.cols(), kUnlimited);
  for (Index i = 0; i < left.rows(); ++i) {
    add_row_of(left, i);
    add_row_of(right, i);
  }
  count_ += left.rows();
}

template <class T>
void GrowingRows<T>::drop_front(Index count, Index most) {
  constexpr std::size_t kFarTooMuch = 4;
  const auto kept = numbers_.begin() + count * width_;
  if (numbers_.capacity() <= kFarTooMuch * size_of(most)) {
    numbers_.erase(numbers_.begin(), kept);
  } else {
    std::vector<T> rest;
    rest.reserve(size_of(most));
    rest.insert(rest.end(), kept, numbers_.end());
    numbers_ = std::move(rest);
  }
  count_ -= count;
}

template <class T>
void GrowingRows<T>::make_room(Index more, Index width, Index most) {
  if (empty()) width_ = width;
  const std::size_t size = size_of(count_ + more);
  if (size <= numbers_.capacity()) return;
  std::size_t room = 2 * numbers_.capacity();
  if (most < kUnlimited) room = std::min(room, size_of(most + more));
  numbers_.reserve(std::max(size, room));
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::GrowingRows<float>;
extern template class weir::GrowingRows<double>;
#endif
