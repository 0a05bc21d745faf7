// SPDX-License-Identifier: MIT
/// \file
/// The inputs of softmax attention.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>

#include <weir/attention/heads.hpp>
#include <weir/attention/paged_rows.hpp>
#include <weir/attention/spans.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Where the keys and values of one sequence lie, a row of all heads for each token: in one piece,
/// or in pages.
template <class T>
struct KeyValueRows {
  const T* keys = nullptr;
  Index key_stride = 0;
  const T* values = nullptr;
  Index value_stride = 0;
  std::span<const RowPage<T>> key_pages = {};  ///< Instead of `keys`; or empty.
  std::span<const RowPage<T>> value_pages = {};

  /// Rows of which the pages begin at multiples of kPage. The keys are as wide as a row of `k`, and
  /// values as a row of `v`, of which a part may be meant.
  static KeyValueRows of(const PagedRows<T>& k, const PagedRows<T>& v) {
    return {nullptr, k.width(), nullptr, v.width(), k.pages(), v.pages()};
  }

  /// The row of key i, from which on the rows of its page follow, `key_stride` apart.
  const T* key(Index i) const { return row(keys, key_pages, key_stride, i); }
  const T* value(Index i) const { return row(values, value_pages, value_stride, i); }

 private:
  static const T* row(const T* rows, std::span<const RowPage<T>> pages, Index stride, Index i) {
    constexpr Index kPage = PagedRows<T>::kPage;
    if (pages.empty()) return rows + i * stride;
    return element(pages, i / kPage).get() + i % kPage * stride;
  }
};

/// The inputs of attention. Members count the keys of a span from 0.
template <class T>
struct AttentionOperands {
  AttentionHeads shape;
  std::span<const AttentionSpan> spans;
  std::span<const std::uint8_t> mask;     ///< One byte per row of k, 0 for padding; or empty.
  Eigen::Ref<const Matrix<T>> q;          ///< [queries, heads * head_dim]
  Eigen::Ref<const Matrix<T>> k;          ///< [keys, kv_heads * head_dim]
  Eigen::Ref<const Matrix<T>> v;          ///< [keys, kv_heads * value_dim]
  std::span<const T> sinks;               ///< One for each query head; or empty.
  std::span<const KeyValueRows<T>> rows;  ///< One for each span, instead of k and v; or empty.

  /// How many of the keys from `key` of span s on, at most `size` of them, are read at a time: up
  /// to the next position that is a multiple of `size`. So what is read together does not depend on
  /// where a query's keys begin, and lies in one page.
  static Index together(const AttentionSpan& s, Index key, Index size) {
    return size - (s.first_key + key) % size;
  }

  Index span_count() const { return static_cast<Index>(spans.size()); }
  const AttentionSpan& span(Index s) const { return element(spans, s); }

  KeyValueRows<T> rows_of(Index s) const {
    if (!rows.empty()) return element(rows, s);
    const Index begin = span(s).key_begin;
    return {k.data() + begin * k.outerStride(), k.outerStride(), v.data() + begin * v.outerStride(),
            v.outerStride()};
  }

  /// The logit that joins the scores of a head; -infinity, which is no score, if there is none.
  T sink(Index head) const {
    return sinks.empty() ? -std::numeric_limits<T>::infinity() : element(sinks, head);
  }

  /// The factor of q. With a softcap, tanh is taken of the product.
  double factor() const { return shape.softcap > 0 ? shape.scale / shape.softcap : shape.scale; }

  /// The first key that is seen by the query whose own key is `own`.
  Index first_key(const AttentionSpan& s, Index own) const {
    return std::max<Index>(0, shape.first_visible(s.first_key + own) - s.first_key);
  }
  /// The own key of the last query that sees `key`; may be beyond the end.
  Index last_query(const AttentionSpan& s, Index key) const {
    return shape.last_seeing(s.first_key + key) - s.first_key;
  }

  bool is_padding(const AttentionSpan& s, Index key) const {
    return !mask.empty() && element(mask, s.key_begin + key) == 0;
  }
  bool any_padding(const AttentionSpan& s, Index begin, Index end) const {
    for (Index key = begin; key < end && !mask.empty(); ++key) {
      if (is_padding(s, key)) return true;
    }
    return false;
  }
};

}  // namespace weir
