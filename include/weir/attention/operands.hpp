// SPDX-License-Identifier: MIT
/// \file
/// The inputs of softmax attention.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>

#include <weir/attention/head_pages.hpp>
#include <weir/attention/heads.hpp>
#include <weir/attention/kv_cache.hpp>
#include <weir/attention/latent_cache.hpp>
#include <weir/attention/latent_pages.hpp>
#include <weir/attention/pages.hpp>
#include <weir/attention/spans.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Where the keys and values of one sequence lie: in matrices with a row of all heads for each
/// token, or in the pages of a cache.
template <class T>
struct KeyValueRows {
  const T* keys = nullptr;
  Index key_stride = 0;
  const T* values = nullptr;
  Index value_stride = 0;
  std::span<const Page> pages = {};     ///< Instead of `keys` and `values`; or empty.
  const HeadPages<T>* heads = nullptr;  ///< How the pages are laid out: either of the two.
  const LatentPages<T>* latents = nullptr;

  /// What a cache holds, as long as it does not change.
  static KeyValueRows of(const KvCache<T>& cache) {
    return {.pages = cache.pages().pages(), .heads = &cache.layout()};
  }
  static KeyValueRows of(const LatentCache<T>& cache) {
    return {.pages = cache.pages().pages(), .latents = &cache.layout()};
  }

  /// How many numbers `block` needs.
  Index block_size() const {
    if (heads != nullptr) return heads->unpacked_size();
    return latents != nullptr ? latents->unpacked_size() : 0;
  }

  /// The keys and values of a head from token `i` on, as numbers: where they lie, or unpacked to
  /// `space`. Pages have them up to the next token whose number is a multiple of Pages::kRows.
  /// \param count  How many tokens are wanted, up to there.
  KeyValueBlock<T> block(const AttentionHeads& shape, Index head, Index i, Index count,
                         T* space) const {
    const Index place = i % Pages::kRows;
    if (heads != nullptr) return heads->unpacked(page_of(i), head, space).from(place);
    if (latents != nullptr) return latents->block(page_of(i), place + count, space).from(place);
    return {keys + i * key_stride + head * shape.head_dim, key_stride, 1,
            values + i * value_stride + head * shape.value_dim, value_stride};
  }

  /// Fetches the beginning of what a page has of a head: reading at a new place starts slowly.
  void fetch(Index head, Index i) const {
    constexpr Index kBytes = 2048;
    if (heads == nullptr) return;
    const auto at = heads->at(page_of(i).get(), head);
    const auto* const from = reinterpret_cast<const char*>(at.key_scales);
    for (Index line = 0; line < kBytes; line += 64) __builtin_prefetch(from + line, 0, 3);
  }

  const Page& page_of(Index i) const { return element(pages, i / Pages::kRows); }
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
