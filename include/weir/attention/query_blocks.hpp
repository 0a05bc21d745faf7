// SPDX-License-Identifier: MIT
/// \file
/// Softmax attention in blocks of queries or keys, forward and backward.
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

/// The part of `CausalAttention` for spans with many queries, and of its backward pass.
///
/// One side of the attention matrix is "rows", cut in blocks of kRowBlock; the other is "columns",
/// cut in blocks of kBlock, which are a few strips, see ScoreStrips. Strips of which no query sees
/// anything, such as those outside of a window, are not computed.
template <class T>
struct QueryBlocks {
  using Strips = ScoreStrips<T>;
  static constexpr Index kStrip = Strips::kStrip;
  static constexpr Index kBlock = 64;  ///< The queries of a block, or in `backward_keys` the keys.

  struct Cache {
    /// [heads, queries]; +infinity for a query that sees no key, so that all its p are zero.
    Scratch<T> logsumexp;
    Scratch<T> dot;               ///< d_out . out, [heads, queries].
    RowsApart<T> q, k, v, d_out;  ///< Copies that live as long as the pass that needs them.
  };

  const AttentionOperands<T>& in;
  Cache& cache;

  /// Computes one block of queries of one head, from query `first` of span s on.
  void forward(Index s, Index first, Index head, MatrixOut<T>& out) const;

  /// Computes dq of one block of queries of one head:
  ///
  ///     ds_ij = p_ij (d_out_i . v_j - d_out_i . out_i),    dq_i = scale * sum_j ds_ij k_j
  ///
  /// With a softcap, ds_ij also has its slope, 1 - tanh^2.
  void backward_queries(Index s, Index first, Index head, MatrixIn<T> d_out,
                        MatrixOut<T>& dq) const;

  /// Computes dk and dv of a block of keys of a key head, from the queries of its group's heads:
  ///
  ///     dv_j = sum_i p_ij d_out_i,    dk_j = scale * sum_i ds_ij q_i
  void backward_keys(Index s, Index first, Index kv_head, MatrixOut<T>& dk, MatrixOut<T>& dv) const;

 private:
  static constexpr Index kRowBlock = KeyRuns::kBlock;
  static_assert(kBlock % kStrip == 0);

  /// The numbers of a head that belong to the queries of a span, which may have none.
  static const T* of_queries(const Scratch<T>& numbers, Index head, const AttentionSpan& span) {
    return numbers.data() + head * numbers.cols() + span.query_begin;
  }

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

  static constexpr auto kNothing = [](Index /*row*/, Index /*count*/) {};

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

  /// Sets those numbers of a and b that must not count to zero. They are [rows, kStrip]: queries by
  /// keys.
  /// \param own  The key of the first query.
  void hide_keys(const AttentionSpan& span, Index own, Index rows, Index key, T* a, T* b) const;
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
void QueryBlocks<T>::backward_queries(Index s, Index first, Index head, MatrixIn<T> d_out,
                                      MatrixOut<T>& dq) const {
  const AttentionSpan& span = in.span(s);
  const Index queries = std::min(kBlock, span.queries - first);
  const Index own = span.prefix() + first;
  const Index kv_head = head / in.shape.group();
  const Index dim = in.shape.head_dim;
  const Index value_dim = in.shape.value_dim;
  const auto softcap = static_cast<T>(in.shape.softcap);

  auto& space = ThreadSpace<T, QueryBlocks>::of_this_thread();
  space.reserve(kBlock * (2 * dim + value_dim + 2) + 3 * kRowBlock * kStrip);
  T* const right = space.take(kBlock * dim);
  T* const d_right = space.take(kBlock * value_dim);
  T* const sums = space.take_zeros(kBlock * dim);
  T* const scores = space.take(kRowBlock * kStrip);
  T* const d_p = space.take(kRowBlock * kStrip);
  T* const slopes = space.take(kRowBlock * kStrip);
  Strips::pack(in.q, span.query_begin + first, queries, head, dim, static_cast<T>(in.factor()),
               right);
  Strips::pack(d_out, span.query_begin + first, queries, head, value_dim, T(1), d_right);
  T* const logsumexp = space.take_zeros(kBlock);
  T* const dot = space.take_zeros(kBlock);
  std::copy_n(of_queries(cache.logsumexp, head, span) + first, queries, logsumexp);
  std::copy_n(of_queries(cache.dot, head, span) + first, queries, dot);
  for_each_strip(span, own, queries, kNothing, [&](Index column, const VisibleKeys& keys) {
    const Index key = span.key_begin + keys.begin;
    Strips::multiply(Strips::rows_of(cache.k, key, kv_head), keys.count, right + column * dim, dim,
                     scores, false);
    const typename Strips::Left values = {&in.v.coeffRef(key, kv_head * value_dim),
                                          in.v.outerStride(), 1};
    Strips::multiply(values, keys.count, d_right + column * value_dim, value_dim, d_p, false);
    if (softcap > 0) Strips::cap(softcap, keys.count, scores, slopes);
    for (Index j = 0; j < kStrip; j += kLanes<T>) {
      const Lanes<T> lse = load_lanes<T>(logsumexp + column + j);
      const Lanes<T> along_out = load_lanes<T>(dot + column + j);
      for (Index r = 0; r < keys.count; ++r) {
        T* const ds = scores + r * kStrip + j;
        const Lanes<T> p = exp_lanes<T>(load_lanes<T>(ds) - lse);
        store_lanes<T>(p * (load_lanes<T>(d_p + r * kStrip + j) - along_out), ds);
      }
    }
    if (softcap > 0) loops::multiply<T>(keys.count * kStrip, scores, slopes, scores);
    if (keys.partly_hidden) hide(span, keys, own + column, T(0), scores);
    Strips::multiply(Strips::columns_of(cache.k, key, kv_head), dim, scores, keys.count,
                     sums + column * dim, true);
  });
  Strips::unpack(sums, static_cast<T>(in.shape.scale), span.query_begin + first, queries, head, dim,
                 dq);
}

template <class T>
void QueryBlocks<T>::backward_keys(Index s, Index first, Index kv_head, MatrixOut<T>& dk,
                                   MatrixOut<T>& dv) const {
  const AttentionSpan& span = in.span(s);
  const Index keys = std::min(kBlock, span.keys - first);
  const Index dim = in.shape.head_dim;
  const Index value_dim = in.shape.value_dim;
  const auto softcap = static_cast<T>(in.shape.softcap);

  auto& space = ThreadSpace<T, QueryBlocks>::of_this_thread();
  space.reserve(2 * kBlock * (dim + value_dim) + 3 * kRowBlock * kStrip);
  T* const right = space.take(kBlock * dim);
  T* const value_right = space.take(kBlock * value_dim);
  T* const dk_sums = space.take_zeros(kBlock * dim);
  T* const dv_sums = space.take_zeros(kBlock * value_dim);
  T* const scores = space.take(kRowBlock * kStrip);
  T* const d_p = space.take(kRowBlock * kStrip);
  T* const slopes = space.take(kRowBlock * kStrip);
  Strips::pack(in.k, span.key_begin + first, keys, kv_head, dim, static_cast<T>(in.factor()),
               right);
  Strips::pack(in.v, span.key_begin + first, keys, kv_head, value_dim, T(1), value_right);
  // Rows run from the first block with a query that sees the first key to the last query that
  // sees the last one.
  const Index first_row = std::max<Index>(0, first - span.prefix()) / kRowBlock * kRowBlock;
  const Index end_row =
      std::min(span.queries, in.last_query(span, first + keys - 1) - span.prefix() + 1);
  const Index group = in.shape.group();
  for (Index head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const T* const logsumexp = of_queries(cache.logsumexp, head, span);
    const T* const dot = of_queries(cache.dot, head, span);
    for (Index row = first_row; row < end_row; row += kRowBlock) {
      for (Index strip = 0; strip < Strips::strips_for(keys); ++strip) {
        const Index key = first + strip * kStrip;
        // The queries of the block that see a key of the strip, by their own keys.
        const Index begin = std::max(span.prefix() + row, key);
        const Index end = std::min({span.prefix() + std::min(row + kRowBlock, span.queries),
                                    in.last_query(span, key + kStrip - 1) + 1});
        const Index rows = end - begin;
        if (rows <= 0) continue;
        const Index query = begin - span.prefix();
        T* const dk_sum = dk_sums + strip * kStrip * dim;
        T* const dv_sum = dv_sums + strip * kStrip * value_dim;
        Strips::multiply(Strips::rows_of(cache.q, span.query_begin + query, head), rows,
                         right + strip * kStrip * dim, dim, scores, false);
        Strips::multiply(Strips::rows_of(cache.d_out, span.query_begin + query, head), rows,
                         value_right + strip * kStrip * value_dim, value_dim, d_p, false);
        if (softcap > 0) Strips::cap(softcap, rows, scores, slopes);
        for (Index r = 0; r < rows; ++r) {
#pragma GCC unroll 4
          for (Index j = 0; j < kStrip; j += kLanes<T>) {
            T* const p = scores + r * kStrip + j;
            T* const ds = d_p + r * kStrip + j;
            const Lanes<T> share = exp_lanes<T>(load_lanes<T>(p) - logsumexp[query + r]);
            store_lanes<T>(share, p);
            store_lanes<T>(share * (load_lanes<T>(ds) - dot[query + r]), ds);
          }
        }
        if (softcap > 0) loops::multiply<T>(rows * kStrip, d_p, slopes, d_p);
        if (begin < key + kStrip - 1 || in.first_key(span, end - 1) > key) {
          hide_keys(span, begin, rows, key, scores, d_p);
        }
        Strips::multiply(Strips::columns_of(cache.d_out, span.query_begin + query, head), value_dim,
                         scores, rows, dv_sum, true);
        Strips::multiply(Strips::columns_of(cache.q, span.query_begin + query, head), dim, d_p,
                         rows, dk_sum, true);
      }
    }
  }
  const Index begin = span.key_begin + first;
  Strips::unpack(dk_sums, static_cast<T>(in.shape.scale), begin, keys, kv_head, dim, dk);
  Strips::unpack(dv_sums, T(1), begin, keys, kv_head, value_dim, dv);
  for (Index i = 0; i < keys; ++i) {
    if (!in.is_padding(span, first + i)) continue;
    dk.row(begin + i).segment(kv_head * dim, dim).setZero();
    dv.row(begin + i).segment(kv_head * value_dim, value_dim).setZero();
  }
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

template <class T>
void QueryBlocks<T>::hide_keys(const AttentionSpan& span, Index own, Index rows, Index key, T* a,
                               T* b) const {
  for (Index r = 0; r < rows; ++r) {
    const Index begin = std::clamp<Index>(in.first_key(span, own + r) - key, 0, kStrip);
    const Index end = std::clamp<Index>(own + r - key + 1, begin, kStrip);
    for (T* const of_row : {a + r * kStrip, b + r * kStrip}) {
      std::fill_n(of_row, begin, T(0));
      std::fill_n(of_row + end, kStrip - end, T(0));
    }
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template struct weir::QueryBlocks<float>;
extern template struct weir::QueryBlocks<double>;
#endif
