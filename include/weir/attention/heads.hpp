// SPDX-License-Identifier: MIT
/// \file
/// What softmax attention is computed of: heads, sequences, and who sees whom.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// How the columns of queries, keys and values divide into heads, and what becomes of the product
/// of a query and a key. Query head h reads the keys and values of head h / (heads / kv_heads)
/// (Ainslie et al. 2023, arXiv:2305.13245).
struct AttentionHeads {
  Index heads = 0;      ///< of the queries; a multiple of kv_heads
  Index kv_heads = 0;   ///< of the keys and values
  Index head_dim = 0;   ///< numbers in a query and in a key
  Index value_dim = 0;  ///< numbers in a value
  double scale = 1.0;   ///< of the product of a query and a key, such as 1 / sqrt(head_dim)

  /// Above zero, a score becomes softcap * tanh(score / softcap), which keeps it in (-softcap,
  /// softcap). (Gemma Team 2024, arXiv:2408.00118; before it Grok-1's released code.)
  double softcap = 0.0;

  /// Above zero, a query sees the last `window` keys, its own included (Beltagy et al. 2020,
  /// arXiv:2004.05150; Jiang et al. 2023, arXiv:2310.06825).
  Index window = 0;

  /// Above zero, a query sees keys of its own chunk: those whose position / chunk, rounded down, is
  /// its own (Llama 4's released code).
  Index chunk = 0;

  Index group() const { return heads / kv_heads; }

  /// The lowest position that a query at `position` sees.
  Index first_visible(Index position) const {
    Index first = 0;
    if (window > 0) first = std::max<Index>(first, position - window + 1);
    if (chunk > 0) first = std::max(first, position / chunk * chunk);
    return first;
  }

  /// The highest position from which a key at `position` is seen.
  Index last_seeing(Index position) const {
    constexpr Index kFar = std::numeric_limits<Index>::max() / 2;  // Still an Index with something
    Index last = kFar;                                             // added to it.
    if (window > 0) last = std::min(last, position + std::min(window, kFar / 2) - 1);
    if (chunk > 0) last = std::min(last, position + (chunk - position % chunk) - 1);
    return last;
  }

  /// The most keys that one of the queries of `keys` tokens sees.
  Index most_visible(Index keys) const {
    if (window > 0) keys = std::min(keys, window);
    if (chunk > 0) keys = std::min(keys, chunk);
    return keys;
  }
};

/// One sequence: its queries are its last tokens, its keys all of them, or all that have not been
/// forgotten. Query i sees the keys up to its own, number `prefix() + i`.
struct AttentionSpan {
  Index query_begin, queries;  ///< rows of q
  Index key_begin, keys;       ///< rows of k and v; keys >= queries
  Index first_key = 0;         ///< position of the first key

  /// Keys before that of the first query.
  Index prefix() const { return keys - queries; }
  /// Position of the first query.
  Index first_position() const { return first_key + prefix(); }
};

/// Sets `spans` to the sequences of the pass, each with its own tokens as keys.
/// \param tokens  How many there are in all.
inline void fill_spans(const Pass& pass, Index tokens, std::vector<AttentionSpan>& spans) {
  spans.clear();
  if (pass.sequences == nullptr) {
    spans.push_back({0, tokens, 0, tokens});
    return;
  }
  for (Index s = 0; s < pass.sequences->count(); ++s) {
    const Index begin = pass.sequences->begin(s);
    const Index length = pass.sequences->length(s);
    spans.push_back({begin, length, begin, length});
  }
}

/// Sets `positions` to those of the queries of all spans.
/// \param tokens  How many queries there are in all.
inline void fill_positions(std::span<const AttentionSpan> spans, Index tokens,
                           std::vector<Index>& positions) {
  positions.resize(static_cast<std::size_t>(tokens));
  for (const AttentionSpan& s : spans) {
    const auto first = positions.begin() + s.query_begin;
    std::iota(first, first + s.queries, s.first_position());
  }
}

/// Where the keys and values of one sequence lie, a row of all heads for each token.
template <class T>
struct KeyValueRows {
  const T* keys = nullptr;
  Index key_stride = 0;
  const T* values = nullptr;
  Index value_stride = 0;
};

/// All that attention is computed of. Keys of a span are numbered from 0 here.
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
  const AttentionSpan& span(Index s) const { return spans[static_cast<std::size_t>(s)]; }

  KeyValueRows<T> rows_of(Index s) const {
    if (!rows.empty()) return rows[static_cast<std::size_t>(s)];
    const Index begin = span(s).key_begin;
    return {k.data() + begin * k.outerStride(), k.outerStride(), v.data() + begin * v.outerStride(),
            v.outerStride()};
  }

  /// The logit that joins the scores of a head; -infinity, which is no score, if there is none.
  T sink(Index head) const {
    return sinks.empty() ? -std::numeric_limits<T>::infinity()
                         : sinks[static_cast<std::size_t>(head)];
  }

  /// What q is multiplied by: the softcap's tangent is taken of the product.
  double factor() const { return shape.softcap > 0 ? shape.scale / shape.softcap : shape.scale; }

  /// The first key that the query of key `own` sees.
  Index first_key(const AttentionSpan& s, Index own) const {
    return std::max<Index>(0, shape.first_visible(s.first_key + own) - s.first_key);
  }
  /// The key of the last query that sees `key`; may be beyond the end.
  Index last_query(const AttentionSpan& s, Index key) const {
    return shape.last_seeing(s.first_key + key) - s.first_key;
  }

  bool is_padding(const AttentionSpan& s, Index key) const {
    return !mask.empty() && mask[static_cast<std::size_t>(s.key_begin + key)] == 0;
  }
  bool any_padding(const AttentionSpan& s, Index begin, Index end) const {
    for (Index key = begin; key < end && !mask.empty(); ++key) {
      if (is_padding(s, key)) return true;
    }
    return false;
  }
};

}  // namespace weir
