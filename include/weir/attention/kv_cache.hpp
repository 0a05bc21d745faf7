// SPDX-License-Identifier: MIT
/// \file
/// The keys and values a decoder has already computed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Keys (already rotated to their positions) and values of one sequence in one layer, a row per
/// token. Grows geometrically, so that a token costs the same however long the sequence is. A copy
/// is independent: several continuations can start from one prompt.
///
/// Where attention looks back a limited way, `forget` lets go of what it has passed. What is held
/// stays in one piece: the rows that remain are moved to the front once a quarter as many before
/// them are of no more use, so that a token moves four rows on average and memory is bounded.
template <class T>
class KvCache {
 public:
  using View = Eigen::Map<const Matrix<T>>;

  /// How many tokens an attention with a window should be able to take back, see `forget`.
  static constexpr Index kSlack = 64;

  /// Tokens in all; the position of the next one.
  Index length() const { return first_ + held_; }
  bool empty() const { return length() == 0; }

  /// The position of the first token that is still held.
  Index first() const { return first_; }
  /// Tokens held: all from `first()` on.
  Index held() const { return held_; }
  /// Tokens that can be held before memory is allocated; unspecified while there is none.
  Index capacity() const {
    return key_width_ == 0 ? 0 : static_cast<Index>(keys_.capacity()) / key_width_;
  }

  /// [held, key width]. Valid until the next change.
  View keys() const { return {keys_.data(), held_, key_width_}; }
  /// [held, value width]. Valid until the next change.
  View values() const { return {values_.data(), held_, value_width_}; }

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
    held_ += keys.rows();
    extend(keys_, keys);
    extend(values_, values);
  }

  /// Makes room for `length` tokens in all, so that appending up to there allocates nothing. Has an
  /// effect once the first token has told how wide rows are. With `forget`, much less may do.
  void reserve(Index length) {
    const Index rows = std::max(length - first_, held_);
    keys_.reserve(static_cast<std::size_t>(rows * key_width_));
    values_.reserve(static_cast<std::size_t>(rows * value_width_));
  }

  /// Allows to let go of the tokens before `position`, which no token from position `from` on will
  /// look at: not necessarily at once. Once they are gone, the sequence cannot be cut below `from`
  /// tokens, but for being cleared.
  /// \throws ConfigError  unless position <= from <= length().
  void forget(Index position, Index from) {
    if (from > length() || position > from) {
      fail<ConfigError>("KvCache::forget: position = ", position, " and from = ", from,
                        ", expected position <= from <= ", length());
    }
    const Index gone = std::max<Index>(0, position - first_);
    const Index kept = held_ - gone;
    most_ = kept + kept / 4;
    if (gone == 0 || gone < kept / 4) return;
    drop_front(keys_, gone * key_width_);
    drop_front(values_, gone * value_width_);
    first_ = position;
    held_ = kept;
    shortest_ = from;
  }

  /// Takes back all tokens but the first `length`, as after a rejected draft. Keeps the memory.
  /// \throws ConfigError  unless 0 <= length <= this->length().
  /// \throws StateError   if the next token would have to look at some that have been forgotten.
  void truncate(Index length) {
    if (length < 0 || length > this->length()) {
      fail<ConfigError>("KvCache::truncate: length = ", length, ", expected 0 to ", this->length());
    }
    if (length > 0 && length < shortest_) {
      fail<StateError>("KvCache::truncate: length = ", length, ", expected 0 or at least ",
                       shortest_, ": the tokens before position ", first_, " have been forgotten");
    }
    if (length == 0) {
      first_ = shortest_ = 0;
      most_ = kUnlimited;
    }
    held_ = length - first_;
    keys_.resize(static_cast<std::size_t>(held_ * key_width_));
    values_.resize(static_cast<std::size_t>(held_ * value_width_));
  }

  /// Takes back all tokens. Keeps the memory.
  void clear() { truncate(0); }

 private:
  static constexpr Index kUnlimited = std::numeric_limits<Index>::max() / 2;

  void extend(std::vector<T>& rows, MatrixIn<T> more) const {
    const std::size_t size = rows.size() + static_cast<std::size_t>(more.size());
    if (size > rows.capacity()) {
      std::size_t room = 2 * rows.capacity();
      if (most_ < kUnlimited) {
        room = std::min(room, static_cast<std::size_t>((most_ + more.rows()) * more.cols()));
      }
      rows.reserve(std::max(size, room));
    }
    for (Index t = 0; t < more.rows(); ++t) {
      const T* row = more.data() + t * more.outerStride();
      rows.insert(rows.end(), row, row + more.cols());
    }
  }

  static void drop_front(std::vector<T>& rows, Index count) {
    rows.erase(rows.begin(), rows.begin() + count);
  }

  std::vector<T> keys_;
  std::vector<T> values_;
  Index first_ = 0;
  Index held_ = 0;
  Index shortest_ = 0;       // What the sequence may be cut to.
  Index most_ = kUnlimited;  // Rows that `forget` leaves at most.
  Index key_width_ = 0;
  Index value_width_ = 0;
};

}  // namespace weir
