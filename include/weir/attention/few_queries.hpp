// SPDX-License-Identifier: MIT
/// \file
/// Softmax attention of a few queries: one by one, reading each key and value once.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <weir/attention/key_runs.hpp>
#include <weir/attention/operands.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/turned_rows.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/tanh.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// The part of `CausalAttention` for spans with few queries. The keys of a query are cut into runs,
/// see KeyRuns, which may be computed in parallel. The sums of the runs, relative to their largest
/// scores, are combined afterwards.
///
/// Every product and every sum is made in the order of QueryBlocks, where another side of it lies
/// in the lanes of a register. So it does not matter to a query which of the two computes it.
template <class T>
struct FewQueries {
  const AttentionOperands<T>& in;

  /// Numbers in the result of a run of keys: [totals | largest scores | sums of values].
  Index partial_width() const { return in.shape.heads * (2 + in.shape.value_dim); }

  /// Computes all heads of one query over the keys `begin` to `end`, which it sees. Reading keys
  /// and values takes most of the time, so whole rows are read, each once.
  /// \param query  Its number in span s.
  void attend(Index s, Index query, Index begin, Index end, T* partial) const;

  /// Adds up the results of the runs of one query, in the order of the keys.
  /// \param row      The row of q and of out.
  /// \param partial  [runs, partial_width()]
  void combine(Index row, MatrixIn<T> partial, MatrixOut<T>& out, Scratch<T>& logsumexp) const;

 private:
  /// For this many keys the scores of all heads are held at once.
  static constexpr Index kRows = KeyRuns::kBlock;
  static_assert(kRows % kLanes<T> == 0);

  /// Some keys or values of one key head, and the heads that read them: rows of `from`, `stride`
  /// apart.
  struct Rows {
    const T* from;
    Index stride, count;
  };

  /// scores [heads, kRows] = q [heads, head_dim] times keys.
  void score(Rows keys, Index heads, const T* q, T* scores) const {
    Index h = 0;
    for (; h + 8 <= heads; h += 8) score_heads<8>(keys, q, scores, h);
    for (; h + 4 <= heads; h += 4) score_heads<4>(keys, q, scores, h);
    for (; h < heads; ++h) score_heads<1>(keys, q, scores, h);
  }
  template <int heads>
  void score_heads(const Rows& keys, const T* q, T* scores, Index head) const;

  /// Turns the scores of one head into their shares, relative to its `top`, and adjusts `total` and
  /// `sums` to a larger one.
  void soften(Index rows, T* scores, T& top, T& total, T* sums) const;

  /// sums [heads, value_dim] += p [heads, kRows] times values.
  void add_values(Rows values, Index heads, const T* p, T* sums) const {
    Index h = 0;
    for (; h + 4 <= heads; h += 4) add_values_of<4>(values, p + h * kRows, sums, h);
    for (; h < heads; ++h) add_values_of<1>(values, p + h * kRows, sums, h);
  }
  template <int heads>
  void add_values_of(const Rows& values, const T* p, T* sums, Index head) const;

  /// The same for `blocks` blocks of kLanes columns, of which the last one has `lanes` columns.
  template <int heads, int blocks>
  static void add_columns(const Rows& values, Index lanes, const T* p, T* sums, Index sums_row);
};

template <class T>
void FewQueries<T>::attend(Index s, Index query, Index begin, Index end, T* partial) const {
  // These are copies, so that no store of a score can change them.
  const AttentionHeads shape = in.shape;
  const AttentionSpan span = in.span(s);
  const KeyValueRows<T> rows_of = in.rows_of(s);
  const Index dim = shape.head_dim;
  const Index value_dim = shape.value_dim;
  const Index group = shape.group();
  const auto softcap = static_cast<T>(shape.softcap);
  T* const total = partial;
  T* const top = total + shape.heads;
  T* const sums = top + shape.heads;
  std::fill_n(total, shape.heads, T(0));
  std::fill_n(top, shape.heads, std::numeric_limits<T>::lowest());
  std::fill_n(sums, shape.heads * value_dim, T(0));

  auto& space = ThreadSpace<T, FewQueries>::of_this_thread();
  space.reserve(shape.heads * (kRows + dim));
  T* const scores = space.take(shape.heads * kRows);
  T* const q = space.take(shape.heads * dim);
  loops::scale<T>(shape.heads * dim, static_cast<T>(in.factor()),
                  in.q.data() + (span.query_begin + query) * in.q.outerStride(), q);
  for (Index row = begin, rows = 0; row < end; row += rows) {
    rows = std::min(in.together(span, row, kRows), end - row);
    const bool padding = in.any_padding(span, row, row + rows);
    // Keys for all heads come first, then values for all: a group's share of both exceeds L1.
    for (Index head = 0; head < shape.heads; head += group) {
      score({rows_of.key(row) + head / group * dim, rows_of.key_stride, rows}, group,
            q + head * dim, scores + head * kRows);
    }
    for (Index head = 0; head < shape.heads; ++head) {
      T* const p = scores + head * kRows;
      if (softcap > 0) loops::scaled_tanh<T>(rows, softcap, p, p);
      for (Index r = 0; padding && r < rows; ++r) {
        if (in.is_padding(span, row + r)) p[r] = -std::numeric_limits<T>::infinity();
      }
      soften(rows, p, top[head], total[head], sums + head * value_dim);
    }
    for (Index r = 0; r < rows; ++r) {
      for (Index head = 0; head < shape.heads; ++head) total[head] += scores[head * kRows + r];
    }
    for (Index head = 0; head < shape.heads; head += group) {
      add_values({rows_of.value(row) + head / group * value_dim, rows_of.value_stride, rows}, group,
                 scores + head * kRows, sums + head * value_dim);
    }
  }
}

template <class T>
void FewQueries<T>::combine(Index row, MatrixIn<T> partial, MatrixOut<T>& out,
                            Scratch<T>& logsumexp) const {
  struct Combining {};
  const Index heads = in.shape.heads;
  const Index dim = in.shape.value_dim;
  auto& space = ThreadSpace<T, Combining>::of_this_thread();
  space.reserve(4 * heads);
  T* const top = space.take(heads);
  T* const total = space.take(heads);
  T* const keep = space.take(heads);
  T* const add = space.take(heads);
  for (Index head = 0; head < heads; ++head) {
    const T sink = in.sink(head);
    top[head] = std::max(std::numeric_limits<T>::lowest(), sink);
    total[head] = std::exp(sink - top[head]);
  }
  out.row(row).setZero();
  for (Index i = 0; i < partial.rows(); ++i) {
    const T* const run = &partial.coeffRef(i, 0);
    merge_tops<T>(heads, run + heads, top, keep, add);
    merge_sums<T>(heads, keep, add, run, total);
    for (Index head = 0; head < heads; ++head) {
      T* const sum = &out(row, head * dim);
      loops::scale<T>(dim, keep[head], sum, sum);
      loops::add_scaled<T>(dim, add[head], run + 2 * heads + head * dim, sum);
    }
  }
  for (Index head = 0; head < heads; ++head) {
    T* const sum = &out(row, head * dim);
    logsumexp.view()(head, row) = total[head] == T(0) ? std::numeric_limits<T>::infinity()
                                                      : top[head] + std::log(total[head]);
    if (total[head] != T(0)) loops::scale<T>(dim, T(1) / total[head], sum, sum);
  }
}

template <class T>
template <int heads>
void FewQueries<T>::score_heads(const Rows& keys, const T* q, T* scores, Index head) const {
  const Index dim = in.shape.head_dim;
  for (Index r = 0; r < keys.count; r += kLanes<T>) {
    Lanes<T> sums[heads] = {};
    kernels::multiply_turned<T, heads>(q + head * dim, dim, keys.from + r * keys.stride,
                                       keys.stride, std::min(kLanes<T>, keys.count - r), dim, sums);
    for (int h = 0; h < heads; ++h) store_lanes<T>(sums[h], scores + (head + h) * kRows + r);
  }
}

template <class T>
void FewQueries<T>::soften(Index rows, T* scores, T& top, T& total, T* sums) const {
  const T old = top;
  top = std::max(old, loops::max<T>(rows, scores));
  if (top != old) {
    const T shrink = exp_lanes<T>(Lanes<T>{} + (old - top))[0];
    total *= shrink;
    loops::scale<T>(in.shape.value_dim, shrink, sums, sums);
  }
  loops::exp_shifted<T>(rows, scores, top, scores);
}

template <class T>
template <int heads>
void FewQueries<T>::add_values_of(const Rows& values, const T* p, T* sums, Index head) const {
  constexpr Index kLane = kLanes<T>;
  const Index dim = in.shape.value_dim;
  T* const of_heads = sums + head * dim;
  Index d = 0;
  for (; d + 4 * kLane <= dim; d += 4 * kLane) {
    add_columns<heads, 4>({values.from + d, values.stride, values.count}, kLane, p, of_heads + d,
                          dim);
  }
  for (; d < dim; d += kLane) {
    add_columns<heads, 1>({values.from + d, values.stride, values.count}, std::min(kLane, dim - d),
                          p, of_heads + d, dim);
  }
}

template <class T>
template <int heads, int blocks>
void FewQueries<T>::add_columns(const Rows& values, Index lanes, const T* p, T* sums,
                                Index sums_row) {
  constexpr Index kLane = kLanes<T>;
  Lanes<T> sum[heads][blocks];
  for (int h = 0; h < heads; ++h) {
    for (int j = 0; j < blocks; ++j) {
      sum[h][j] = load_lanes<T>(sums + h * sums_row + j * kLane, lanes);
    }
  }
  for (Index r = 0; r < values.count; ++r) {
    Lanes<T> value[blocks];
#pragma GCC unroll 4
    for (int j = 0; j < blocks; ++j) {
      value[j] = load_lanes<T>(values.from + r * values.stride + j * kLane, lanes);
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; ++h) {
#pragma GCC unroll 4
      for (int j = 0; j < blocks; ++j) {
        kernels::add_product<T>(sum[h][j], p[h * kRows + r], value[j]);
      }
    }
  }
  for (int h = 0; h < heads; ++h) {
    for (int j = 0; j < blocks; ++j) {
      store_lanes<T>(sum[h][j], sums + h * sums_row + j * kLane, lanes);
    }
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template struct weir::FewQueries<float>;
extern template struct weir::FewQueries<double>;
#endif
