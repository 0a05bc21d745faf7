// SPDX-License-Identifier: MIT
/// \file
/// Softmax attention in blocks of queries.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <weir/attention/key_runs.hpp>
#include <weir/attention/operands.hpp>
#include <weir/attention/rows_apart.hpp>
#include <weir/attention/score_strips.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// The part of `CausalAttention` for spans with many queries.
///
/// Keys are the rows of the attention matrix, cut in blocks of kRowBlock; queries are its columns,
/// cut in blocks of kBlock, which are a few strips, see ScoreStrips. Strips of which no query sees
/// anything, such as those outside of a window, are not computed.
template <class T>
struct QueryBlocks {
  using Strips = ScoreStrips<T>;
  static constexpr Index kStrip = Strips::kStrip;
  static constexpr Index kBlock = 64;  ///< The queries of a block.

  struct Cache {
    /// [heads, queries]; +infinity for a query that sees no key, so that all its p are zero.
    Scratch<T> logsumexp;
    Scratch<T> dot;               ///< d_out . out, [heads, queries], for the backward pass.
    RowsApart<T> q, k, v, d_out;  ///< Copies that live as long as the pass that needs them.
  };

  const AttentionOperands<T>& in;
  Cache& cache;

  /// Computes one block of queries of one head, from query `first` of span s on.
  void forward(Index s, Index first, Index head, MatrixOut<T>& out) const;

 private:
  static constexpr Index kRowBlock = KeyRuns::kBlock;
  static_assert(kBlock % kStrip == 0);

  /// The keys that a strip of queries sees.
  struct VisibleKeys {
    Index begin = 0, count = 0;
    bool partly_hidden = false;  ///< Whether some are padding, or some query does not see them all.
  };

  /// Those of the `capacity` keys from `row` on that some query of the strip sees.
  /// \param own  The key of the strip's first query.
  VisibleKeys visible_keys(const AttentionSpan& span, Index own, Index row, Index capacity) const {
    const Index begin = std::max(row, in.first_key(span, own));
    const Index end = std::min(row + capacity, own + kStrip);
    return {begin, end - begin, end - 1 > own || in.last_query(span, begin) < own + kStrip - 1};
  }

  /// Calls `body(column, keys)` for the strips of a block of queries, each with blocks of the keys
  /// that it sees, and `begin_keys(row, count)` before those of such a block of keys. `column` is
  /// the first query of the strip.
  /// \param own  The key of the block's first query.
  template <class BeginKeys, class Body>
  void for_each_strip(const AttentionSpan& span, Index own, Index queries, BeginKeys&& begin_keys,
                      Body&& body) const {
    Index capacity = 0;
    for (Index row = in.first_key(span, own); row < own + queries; row += capacity) {
      capacity = std::min(in.together(span, row, kRowBlock), span.keys - row);
      begin_keys(row, capacity);
      const bool padding = in.any_padding(span, row, row + capacity);
      for (Index column = 0; column < queries; column += kStrip) {
        VisibleKeys keys = visible_keys(span, own + column, row, capacity);
        keys.partly_hidden = keys.partly_hidden || padding;
        if (keys.count > 0) body(column, keys);
      }
    }
  }

  /// Sets those of the scores that must not count to `value`. They are [keys, kStrip]: keys by
  /// queries.
  /// \param own  The key of the strip's first query.
  void hide(const AttentionSpan& span, const VisibleKeys& keys, Index own, T value,
            T* scores) const;
};

template <class T>
void QueryBlocks<T>::forward(Index s, Index first, Index head, MatrixOut<T>& out) const {
  const AttentionSpan& span = in.span(s);
  const KeyValueRows<T> rows_of = in.rows_of(s);
  const Index queries = std::min(kBlock, span.queries - first);
  const Index own = span.prefix() + first;  // The key of the first query.
  const Index kv_head = head / in.shape.group();
  const Index dim = in.shape.head_dim;
  const Index value_dim = in.shape.value_dim;
  const auto softcap = static_cast<T>(in.shape.softcap);
  auto& space = ThreadSpace<T, QueryBlocks>::of_this_thread();
  space.reserve(kBlock * (dim + 2 * value_dim + 4) + kRowBlock * kStrip + rows_of.block_size());
  T* const unpacked = space.take(rows_of.block_size());
  T* const right = space.take(kBlock * dim);
  T* const sums = space.take_zeros(kBlock * value_dim);  // Over all runs of keys.
  T* const run_sums = space.take_zeros(kBlock * value_dim);
  T* const scores = space.take(kRowBlock * kStrip);
  T* const top = space.take(kBlock);  // The largest score so far.
  T* const total = space.take(kBlock);
  T* const run_top = space.take(kBlock);
  T* const run_total = space.take_zeros(kBlock);
  // The sink is a score like any other, but has no value.
  const T sink = in.sink(head);
  std::fill_n(top, kBlock, std::max(std::numeric_limits<T>::lowest(), sink));
  std::fill_n(total, kBlock, std::exp(sink - top[0]));
  std::fill_n(run_top, kBlock, std::numeric_limits<T>::lowest());
  Strips::pack(in.q, span.query_begin + first, queries, head, dim, static_cast<T>(in.factor()),
               right);
  Index runs[kBlock / kStrip];  // The run of keys that each strip is in.
  std::fill_n(runs, kBlock / kStrip, Index{-1});
  const auto end_run = [&](Index column) {
    Strips::end_run({run_top + column, run_total + column, run_sums + column * value_dim},
                    {top + column, total + column, sums + column * value_dim}, value_dim);
  };
  KeyValueBlock<T> block;
  Index block_begin = 0;
  const auto begin_keys = [&](Index row, Index count) {
    block = rows_of.block(in.shape, kv_head, row, count, unpacked);
    block_begin = row;
    if (in.rows.empty()) {  // Values of matrices have been copied.
      block.values = cache.v.at(kv_head, span.key_begin + row);
      block.value_row = value_dim;
    }
  };
  for_each_strip(span, own, queries, begin_keys, [&](Index column, const VisibleKeys& keys) {
    const KeyValueBlock<T> seen = block.from(keys.begin - block_begin);
    Index& run = runs[column / kStrip];
    const Index now = (span.first_key + keys.begin) / KeyRuns::kRun;
    if (run >= 0 && run != now) end_run(column);
    run = now;
    Strips::multiply({seen.keys, seen.key_row, seen.key_step}, keys.count, right + column * dim,
                     dim, scores, false);
    if (seen.key_scales != nullptr) Strips::scale_rows(seen.key_scales, keys.count, scores);
    if (softcap > 0) Strips::cap(softcap, keys.count, scores);
    if (keys.partly_hidden) {
      hide(span, keys, own + column, -std::numeric_limits<T>::infinity(), scores);
    }
    T* const sum = run_sums + column * value_dim;
    Strips::soften(keys.count, scores, run_top + column, run_total + column, sum, value_dim);
    if (seen.value_scales != nullptr) Strips::scale_rows(seen.value_scales, keys.count, scores);
    Strips::multiply({seen.values, 1, seen.value_row}, value_dim, scores, keys.count, sum, true);
  });
  for (Index column = 0; column < queries; column += kStrip) end_run(column);
  for (Index i = 0; i < queries; ++i) {
    cache.logsumexp.view()(head, span.query_begin + first + i) =
        total[i] == T(0) ? std::numeric_limits<T>::infinity() : top[i] + std::log(total[i]);
    total[i] = total[i] == T(0) ? T(0) : T(1) / total[i];
  }
  Strips::scale_columns(total, queries, value_dim, sums);
  Strips::unpack(sums, T(1), span.query_begin + first, queries, head, value_dim, out);
}

template <class T>
void QueryBlocks<T>::hide(const AttentionSpan& span, const VisibleKeys& keys, Index own, T value,
                          T* scores) const {
  for (Index r = 0; r < keys.count; ++r) {
    const Index key = keys.begin + r;
    const bool padding = in.is_padding(span, key);
    const Index begin = padding ? kStrip : std::clamp<Index>(key - own, 0, kStrip);
    const Index end = std::clamp<Index>(in.last_query(span, key) - own + 1, begin, kStrip);
    std::fill_n(scores + r * kStrip, begin, value);
    std::fill_n(scores + r * kStrip + end, kStrip - end, value);
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template struct weir::QueryBlocks<float>;
extern template struct weir::QueryBlocks<double>;
#endif
