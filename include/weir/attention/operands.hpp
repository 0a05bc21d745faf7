// SPDX-License-Identifier: MIT
/// \file
/// The inputs of softmax attention.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>

#include <weir/attention/heads.hpp>
#include <weir/attention/spans.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Where the keys and values of one sequence lie, a row of all heads for each token.
template <class T>
struct KeyValueRows {
  const T* keys = nullptr;
  Index key_stride = 0;
  const T* values = nullptr;
  Index value_stride = 0;
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
