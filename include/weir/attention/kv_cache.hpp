// SPDX-License-Identifier: MIT
/// \file
/// The keys and values a decoder has already computed.
#pragma once

#include <algorithm>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Keys (already rotated to their positions) and values of one sequence in one layer, a row per
/// token. Grows by doubling, so that a token costs the same however long the sequence is. A copy is
/// independent: several continuations can start from one prompt.
template <class T>
class KvCache {
 public:
  using View = Eigen::Map<const Matrix<T>>;

  /// Tokens held; the position of the next one.
  Index length() const { return length_; }
  bool empty() const { return length_ == 0; }

  /// [length, key width]. Valid until the next change.
  View keys() const { return {keys_.data(), length_, key_width_}; }
  /// [length, value width]. Valid until the next change.
  View values() const { return {values_.data(), length_, value_width_}; }

  /// Adds the keys and values of the next tokens. The first call after construction or `clear`
  /// decides how wide they are.
  /// \param keys    [tokens, key width]
  /// \param values  [tokens, value width]
  /// \throws ShapeError   if the widths are not those of what is held, or the rows differ.
  void append(MatrixIn<T> keys, MatrixIn<T> values) {
    expect_shape("KvCache::append", "values", values, keys.rows(),
                 empty() ? values.cols() : value_width_);
    if (!empty()) expect_columns("KvCache::append", "keys", keys, key_width_);
    key_width_ = keys.cols();
    value_width_ = values.cols();
    length_ += keys.rows();
    extend(keys_, keys);
    extend(values_, values);
  }

  /// Makes room for `length` tokens in all, so that appending up to there allocates nothing. Has an
  /// effect once the first token has told how wide rows are.
  void reserve(Index length) {
    keys_.reserve(static_cast<std::size_t>(std::max(length, length_) * key_width_));
    values_.reserve(static_cast<std::size_t>(std::max(length, length_) * value_width_));
  }

  /// Forgets all tokens but the first `length`, as after a rejected draft. Keeps the memory.
  /// \throws ConfigError  unless 0 <= length <= length().
  void truncate(Index length) {
    if (length < 0 || length > length_) {
      fail<ConfigError>("KvCache::truncate: length = ", length, ", expected 0 to ", length_);
    }
    length_ = length;
    keys_.resize(static_cast<std::size_t>(length * key_width_));
    values_.resize(static_cast<std::size_t>(length * value_width_));
  }

  /// Forgets all tokens. Keeps the memory.
  void clear() { truncate(0); }

 private:
  static void extend(std::vector<T>& rows, MatrixIn<T> more) {
    const std::size_t size = rows.size() + static_cast<std::size_t>(more.size());
    if (size > rows.capacity()) rows.reserve(std::max(size, 2 * rows.capacity()));
    for (Index t = 0; t < more.rows(); ++t) {
      const T* row = more.data() + t * more.outerStride();
      rows.insert(rows.end(), row, row + more.cols());
    }
  }

  std::vector<T> keys_;
  std::vector<T> values_;
  Index length_ = 0;
  Index key_width_ = 0;
  Index value_width_ = 0;
};

}  // namespace weir
