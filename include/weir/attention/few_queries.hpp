// SPDX-License-Identifier: MIT
/// \file
/// Softmax attention of a few queries: one by one, reading each key and value once.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <weir/attention/operands.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/tanh.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// The part of `CausalAttention` for spans with few queries. The keys of a query are cut into runs,
/// which may be computed in parallel. The sums of the runs, relative to their largest scores, are
/// combined afterwards.
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
  /// For this many keys the scores of all heads are held at once, in L1.
  static constexpr Index kRows = 32;
  static_assert(kRows % kLanes<T> == 0 && PagedRows<T>::kPage % kRows == 0);

  /// Applies the softcap to the scores [heads, kRows], of which the first `rows` columns count.
  void cap(Index rows, T* scores) const {
    const auto softcap = static_cast<T>(in.shape.softcap);
    for (Index head = 0; head < in.shape.heads; ++head) {
      loops::scaled_tanh<T>(rows, softcap, scores + head * kRows, scores + head * kRows);
    }
  }

  /// The products of one query and `count` <= kLanes keys.
  static Lanes<T> inner_products(const T* query, const T* key, Index stride, Index count,
                                 Index dim);

  /// The products of one query and `keys` keys, not yet summed over lanes.
  template <int keys>
  static void inner_products(const T* query, const T* key, Index stride, Index dim,
                             Lanes<T>* sums) {
    Lanes<T> sum[keys] = {};
    Index d = 0;
    for (; d + kLanes<T> <= dim; d += kLanes<T>) {
      const Lanes<T> part = load_lanes<T>(query + d);
#pragma GCC unroll 4
      for (Index i = 0; i < keys; ++i) sum[i] += part * load_lanes<T>(key + i * stride + d);
    }
    if (d < dim) {
      const Lanes<T> part = load_lanes<T>(query + d, dim - d);
#pragma GCC unroll 4
      for (Index i = 0; i < keys; ++i) {
        sum[i] += part * load_lanes<T>(key + i * stride + d, dim - d);
      }
    }
#pragma GCC unroll 4
    for (Index i = 0; i < keys; ++i) sums[i] = sum[i];
  }

  /// sum += p [rows] * values [rows, value_dim].
  void add_values(const T* p, const T* values, Index stride, Index rows, T* sum) const;

  /// Adds `blocks` blocks of kLanes columns, of which the last one has `lanes` columns.
  template <int blocks>
  static void add_values(const T* p, const T* values, Index stride, Index rows, Index lanes,
                         T* sum) {
    Lanes<T> even[blocks] = {};  // Neither sum waits for the other.
    Lanes<T> odd[blocks] = {};
    Index r = 0;
    for (; r + 1 < rows; r += 2) {
      const T* const first = values + r * stride;
      const T* const second = first + stride;
#pragma GCC unroll 4
      for (Index j = 0; j < blocks; ++j) {
        even[j] += p[r] * load_lanes<T>(first + j * kLanes<T>, lanes);
        odd[j] += p[r + 1] * load_lanes<T>(second + j * kLanes<T>, lanes);
      }
    }
    if (r < rows) {
      for (Index j = 0; j < blocks; ++j) {
        even[j] += p[r] * load_lanes<T>(values + r * stride + j * kLanes<T>, lanes);
      }
    }
#pragma GCC unroll 4
    for (Index j = 0; j < blocks; ++j) {
      T* const to = sum + j * kLanes<T>;
      store_lanes<T>(load_lanes<T>(to, lanes) + (even[j] + odd[j]), to, lanes);
    }
  }
};

template <class T>
void FewQueries<T>::attend(Index s, Index query, Index begin, Index end, T* partial) const {
  // These are copies, so that no store of a score can change them.
  const AttentionHeads shape = in.shape;
  const AttentionSpan span = in.span(s);
  const KeyValueRows<T> rows_of = in.rows_of(s);
  const Index dim = shape.head_dim;
  const Index value_dim = shape.value_dim;
  const auto factor = static_cast<T>(in.factor());
  T* const total = partial;
  T* const top = total + shape.heads;
  T* const sums = top + shape.heads;
  std::fill_n(total, shape.heads, T(0));
  std::fill_n(top, shape.heads, std::numeric_limits<T>::lowest());
  std::fill_n(sums, shape.heads * value_dim, T(0));

  auto& space = ThreadSpace<T, FewQueries>::of_this_thread();
  space.reserve(shape.heads * kRows);
  T* const scores = space.take(shape.heads * kRows);
  const T* const of_query = in.q.data() + (span.query_begin + query) * in.q.outerStride();
  for (Index row = begin, rows = 0; row < end; row += rows) {
    rows = std::min(in.together(span, row, kRows), end - row);
    const bool padding = in.any_padding(span, row, row + rows);
    // Keys for all heads come first, then values for all: a group's share of both exceeds L1.
    for (Index head = 0; head < shape.heads; ++head) {
      const T* const of_head = rows_of.key(row) + head / shape.group() * dim;
      for (Index r = 0; r < rows; r += kLanes<T>) {
        const Index count = std::min(kLanes<T>, rows - r);
        const Lanes<T> products =
            inner_products(of_query + head * dim, of_head + r * rows_of.key_stride,
                           rows_of.key_stride, count, dim);
        store_lanes<T>(factor * products, scores + head * kRows + r);
      }
    }
    if (shape.softcap > 0) cap(rows, scores);
    for (Index head = 0; head < shape.heads; ++head) {
      T* const p = scores + head * kRows;
      // Scores beyond the keys are hidden too, so that softmax works on whole vectors.
      std::fill(p + rows, p + kRows, -std::numeric_limits<T>::infinity());
      for (Index r = 0; padding && r < rows; ++r) {
        if (in.is_padding(span, row + r)) p[r] = -std::numeric_limits<T>::infinity();
      }
      const T old_top = top[head];
      top[head] = std::max(old_top, loops::max<T>(kRows, p));
      loops::exp_shifted<T>(kRows, p, top[head], p);
      if (top[head] != old_top) {
        const T shrink = std::exp(old_top - top[head]);
        total[head] *= shrink;
        loops::scale<T>(value_dim, shrink, sums + head * value_dim, sums + head * value_dim);
      }
      total[head] += loops::sum<T>(kRows, p);
    }
    for (Index head = 0; head < shape.heads; ++head) {
      const T* const values = rows_of.value(row) + head / shape.group() * value_dim;
      add_values(scores + head * kRows, values, rows_of.value_stride, rows,
                 sums + head * value_dim);
    }
  }
}

template <class T>
void FewQueries<T>::combine(Index row, MatrixIn<T> partial, MatrixOut<T>& out,
                            Scratch<T>& logsumexp) const {
  const Index count = in.shape.heads;
  const Index dim = in.shape.value_dim;
  out.row(row).setZero();
  for (Index head = 0; head < count; ++head) {
    auto sum = out.row(row).segment(head * dim, dim);
    const T sink = in.sink(head);
    const T top = std::max(partial.col(count + head).maxCoeff(), sink);
    T total = std::exp(sink - top);
    for (Index i = 0; i < partial.rows(); ++i) {
      const T share = std::exp(partial(i, count + head) - top);
      total += share * partial(i, head);
      sum += share * partial.row(i).segment(2 * count + head * dim, dim);
    }
    logsumexp.view()(head, row) =
        total == T(0) ? std::numeric_limits<T>::infinity() : top + std::log(total);
    if (total != T(0)) sum *= T(1) / total;
  }
}

template <class T>
Lanes<T> FewQueries<T>::inner_products(const T* query, const T* key, Index stride, Index count,
                                       Index dim) {
  Lanes<T> sums[kLanes<T>];
  Index i = 0;
  for (; i + 4 <= count; i += 4) inner_products<4>(query, key + i * stride, stride, dim, sums + i);
  for (; i < count; ++i) inner_products<1>(query, key + i * stride, stride, dim, sums + i);
  for (; i < kLanes<T>; ++i) sums[i] = Lanes<T>{};
  return sums_of<T>(sums);
}

template <class T>
void FewQueries<T>::add_values(const T* p, const T* values, Index stride, Index rows,
                               T* sum) const {
  const Index dim = in.shape.value_dim;
  Index d = 0;
  for (; d + 4 * kLanes<T> <= dim; d += 4 * kLanes<T>) {
    add_values<4>(p, values + d, stride, rows, kLanes<T>, sum + d);
  }
  for (; d < dim; d += kLanes<T>) {
    const Index lanes = std::min(kLanes<T>, dim - d);
    add_values<1>(p, values + d, stride, rows, lanes, sum + d);
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template struct weir::FewQueries<float>;
extern template struct weir::FewQueries<double>;
#endif
