// SPDX-License-Identifier: MIT
/// \file
/// The keys and values a decoder has already computed.
#pragma once

#include <algorithm>
#include <cstddef>

#include <weir/attention/head_pages.hpp>
#include <weir/attention/pages.hpp>
#include <weir/core/cache_storage.hpp>
#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Keys (already rotated to their positions) and values of one sequence in one layer, for each
/// token and each key head, in pages of Pages::kRows tokens (HeadPages). A copy is independent, and
/// shares the pages that neither of the two writes to: several continuations can start from one
/// prompt and hold it once.
///
/// If attention only looks back a limited way, `forget` drops the pages behind that, so that memory
/// is bounded. Room for a prompt far longer than attention looks back is given up afterwards.
template <class T>
class KvCache {
 public:
  /// How many tokens attention with a window should be able to take back, see `forget`.
  static constexpr Index kSlack = 64;

  KvCache() = default;
  explicit KvCache(CacheStorage storage) { layout_.storage = storage; }

  CacheStorage storage() const { return layout_.storage; }

  /// How many tokens there were in all, which is the position of the next one.
  Index length() const { return first_ + held(); }
  bool empty() const { return length() == 0; }

  /// The position of the first token that is still held.
  Index first() const { return first_; }
  /// How many tokens are held: all from `first()` on.
  Index held() const { return pages_.count(); }
  /// How many tokens can be held before memory is allocated; unspecified while there is none.
  Index capacity() const { return pages_.capacity(); }
  /// What a token takes, scales included; 0 before the first one.
  Index bytes_per_token() const { return pages_.page_bytes() / Pages::kRows; }

  /// How many heads the keys and values of a token divide into, and how wide they are in all.
  Index heads() const { return layout_.heads; }
  Index key_width() const { return layout_.heads * layout_.key_dim; }
  Index value_width() const { return layout_.heads * layout_.value_dim; }

  /// What is held, and how it lies there.
  const Pages& pages() const { return pages_; }
  const HeadPages<T>& layout() const { return layout_; }

  /// The keys and values as attention takes them, [held, width].
  Matrix<T> keys() const { return matrix(true); }
  Matrix<T> values() const { return matrix(false); }

  /// Adds the keys and values of the next tokens. The first call after construction or `clear`
  /// decides how wide they are.
  /// \param keys    [tokens, key width]
  /// \param values  [tokens, value width]
  /// \param heads   Divides both widths.
  /// \throws ShapeError   if the widths are not those of what is held, or the rows differ.
  /// \throws ConfigError  if `heads` does not divide the widths, or differs from before.
  void append(MatrixIn<T> keys, MatrixIn<T> values, Index heads = 1);

  /// Makes room for `length` tokens in all, so that appending up to there allocates nothing. Has no
  /// effect before the first token, which tells how wide rows are. With `forget`, much less room
  /// may do.
  void reserve(Index length) { pages_.reserve(length - first_); }

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
  void check_append(MatrixIn<T> keys, MatrixIn<T> values, Index heads) const;

  Matrix<T> matrix(bool of_keys) const;

  Pages pages_;
  HeadPages<T> layout_;
  Index first_ = 0;     // The first of a page.
  Index shortest_ = 0;  // The least length above 0 that the sequence can be cut to.
};

template <class T>
void KvCache<T>::append(MatrixIn<T> keys, MatrixIn<T> values, Index heads) {
  check_append(keys, values, heads);
  if (empty()) layout_ = {layout_.storage, heads, keys.cols() / heads, values.cols() / heads};
  const Index key_dim = layout_.key_dim;
  const Index value_dim = layout_.value_dim;
  pages_.append(keys.rows(), layout_.page_bytes(),
                [&](std::byte* page, Index first, Index end, Index row) {
                  const T* const key = keys.data() + row * keys.outerStride();
                  const T* const value = values.data() + row * values.outerStride();
                  const Index cost = 4 * (end - first) * (key_dim + value_dim);
                  parallel_rows(heads, cost, [&](Index begin_head, Index end_head) {
                    for (Index h = begin_head; h < end_head; ++h) {
                      layout_.put(page, h, first, end, key + h * key_dim, keys.outerStride(),
                                  value + h * value_dim, values.outerStride());
                    }
                  });
                });
}

template <class T>
void KvCache<T>::check_append(MatrixIn<T> keys, MatrixIn<T> values, Index heads) const {
  constexpr auto kWhere = "KvCache::append";
  expect_shape(kWhere, "values", values, keys.rows(), empty() ? values.cols() : value_width());
  if (!empty()) expect_columns(kWhere, "keys", keys, key_width());
  expect_at_least<Index>(kWhere, "heads", heads, 1);
  if (keys.cols() % heads != 0 || values.cols() % heads != 0) {
    throw_error<ConfigError>(kWhere, ": heads = ", heads, ", expected a divisor of ", keys.cols(),
                             " and ", values.cols(), ", the widths of keys and values");
  }
  if (!empty() && heads != layout_.heads) {
    throw_error<ConfigError>(kWhere, ": heads = ", heads, ", expected ", layout_.heads,
                             " as before");
  }
}

template <class T>
Matrix<T> KvCache<T>::matrix(bool of_keys) const {
  const Index dim = of_keys ? layout_.key_dim : layout_.value_dim;
  Matrix<T> result(held(), layout_.heads * dim);
  const CodeMatrix<T> codes = of_keys ? layout_.key_codes() : layout_.value_codes();
  for (Index i = 0; i < held(); ++i) {
    std::byte* const page = pages_.pages()[static_cast<std::size_t>(i / Pages::kRows)].get();
    const Index place = i % Pages::kRows;
    for (Index h = 0; h < layout_.heads; ++h) {
      const auto head = layout_.at(page, h);
      for (Index d = 0; d < dim; ++d) {
        const T scale = !codes.has_scales() ? T(1)
                        : of_keys           ? head.key_scales[place]
                                            : head.value_scales[place];
        result(i, h * dim + d) = of_keys ? codes.value(head.keys, d, place, scale)
                                         : codes.value(head.values, place, d, scale);
      }
    }
  }
  return result;
}

template <class T>
void KvCache<T>::forget(Index position, Index from) {
  if (from > length() || position > from) {
    throw_error<ConfigError>("KvCache::forget: position = ", position, " and from = ", from,
                             ", expected position <= from <= ", length());
  }
  const Index pages = std::max<Index>(0, position - first_) / Pages::kRows;
  if (pages == 0) return;
  first_ += pages * Pages::kRows;
  shortest_ = from;
  pages_.drop_front(pages);  // Has dropped them if it throws because memory has run out.
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
  pages_.truncate(length - first_);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::KvCache<float>;
extern template class weir::KvCache<double>;
#endif
