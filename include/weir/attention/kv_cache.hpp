// SPDX-License-Identifier: MIT
/// \file
/// The keys and values a decoder has already computed.
#pragma once

#include <algorithm>

#include <weir/attention/paged_rows.hpp>
#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Keys (already rotated to their positions) and values of one sequence in one layer, a row per
/// token, in pages of PagedRows::kPage tokens. A copy is independent, and shares the pages that
/// neither of the two writes to: several continuations can start from one prompt and hold it once.
///
/// If attention only looks back a limited way, `forget` drops the pages behind that, so that memory
/// is bounded. Room for a prompt far longer than attention looks back is given up afterwards.
template <class T>
class KvCache {
 public:
  /// How many tokens attention with a window should be able to take back, see `forget`.
  static constexpr Index kSlack = 64;

  /// How many tokens there were in all, which is the position of the next one.
  Index length() const { return first_ + held(); }
  bool empty() const { return length() == 0; }

  /// The position of the first token that is still held.
  Index first() const { return first_; }
  /// How many tokens are held: all from `first()` on.
  Index held() const { return keys_.count(); }
  /// How many tokens can be held before memory is allocated; unspecified while there is none.
  Index capacity() const { return keys_.capacity(); }

  /// [held, key width]
  const PagedRows<T>& key_rows() const { return keys_; }
  /// [held, value width]
  const PagedRows<T>& value_rows() const { return values_; }
  /// Copies of them.
  Matrix<T> keys() const { return keys_.matrix(); }
  Matrix<T> values() const { return values_.matrix(); }

  /// Adds the keys and values of the next tokens. The first call after construction or `clear`
  /// decides how wide they are.
  /// \param keys    [tokens, key width]
  /// \param values  [tokens, value width]
  /// \throws ShapeError   if the widths are not those of what is held, or the rows differ.
  void append(MatrixIn<T> keys, MatrixIn<T> values) {
    expect_shape("KvCache::append", "values", values, keys.rows(),
                 empty() ? values.cols() : values_.width());
    if (!empty()) expect_columns("KvCache::append", "keys", keys, keys_.width());
    keys_.append(keys);
    try {
      values_.append(values);
    } catch (...) {
      keys_.truncate(held() - keys.rows());
      throw;
    }
  }

  /// Makes room for `length` tokens in all, so that appending up to there allocates nothing. Has no
  /// effect before the first token, which tells how wide rows are. With `forget`, much less room
  /// may do.
  void reserve(Index length) {
    keys_.reserve(length - first_);
    values_.reserve(length - first_);
  }

  /// Allows the cache to drop the tokens before `position`, in whole pages. No token from
  /// position `from` on may see them. Once they are gone, the sequence can only be cut to `from`
  /// tokens or more, or to none.
  /// \throws ConfigError  unless position <= from <= length().
  void forget(Index position, Index from);

  /// Takes back all tokens but the first `length`, as after a rejected draft. Keeps the memory.
  /// \throws ConfigError  unless 0 <= length <= this->length().
  /// \throws StateError   if the next token would have to see some that have been forgotten.
  void truncate(Index length);

  /// Takes back all tokens. Keeps the memory.
  void clear() { truncate(0); }

 private:
  PagedRows<T> keys_, values_;
  Index first_ = 0;     // The first of a page.
  Index shortest_ = 0;  // The least length above 0 that the sequence can be cut to.
};

template <class T>
void KvCache<T>::forget(Index position, Index from) {
  if (from > length() || position > from) {
    throw_error<ConfigError>("KvCache::forget: position = ", position, " and from = ", from,
                             ", expected position <= from <= ", length());
  }
  const Index pages = std::max<Index>(0, position - first_) / PagedRows<T>::kPage;
  if (pages == 0) return;
  keys_.drop_front(pages);
  values_.drop_front(pages);
  first_ += pages * PagedRows<T>::kPage;
  shortest_ = from;
}

template <class T>
void KvCache<T>::truncate(Index length) {
  expect_in<Index>("KvCache::truncate", "length", length, 0, this->length());
  if (length > 0 && length < shortest_) {
    throw_error<StateError>("KvCache::truncate: length = ", length, ", expected 0 or at least ",
                            shortest_, ": the tokens before position ", first_,
                            " have been forgotten");
  }
  if (length == 0) first_ = shortest_ = 0;
  keys_.truncate(length - first_);
  values_.truncate(length - first_);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::KvCache<float>;
extern template class weir::KvCache<double>;
#endif
