// SPDX-License-Identifier: MIT
/// \file
/// The backward pass of softmax attention in cells of queries and keys.
#pragma once

#include <algorithm>

#include <weir/attention/operands.hpp>
#include <weir/attention/query_blocks.hpp>
#include <weir/attention/score_strips.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/core/workspace.hpp>
#include <weir/kernels/pack.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// The part of `CausalAttention` that computes gradients. Probabilities are computed anew, once:
///
///     p_ij = exp(s_ij - logsumexp_i),    ds_ij = p_ij (d_out_i . v_j - d_out_i . out_i)
///     dv_j = sum_i p_ij d_out_i,    dk_j = scale * sum_i ds_ij q_i
///     dq_i = scale * sum_j ds_ij k_j
///
/// With a softcap, ds_ij also has its slope, 1 - tanh^2. These are five products, in cells of some
/// queries of a head and some keys. All three sums lie in memory, and each cell adds to them. Cells
/// are computed in waves: those of a wave have neither queries nor keys in common, so that each sum
/// is added up by one thread at a time and in one order, over keys from the first to the last, over
/// the heads of a group, and over queries from the first to the last. The order is that of strips
/// of keys and of blocks of queries, which are the same whatever the size of cells is.
template <class T>
class BackwardCells {
  using Strips = ScoreStrips<T>;
  using Cache = typename QueryBlocks<T>::Cache;
  static constexpr Index kStrip = Strips::kStrip;
  static constexpr Index kRowBlock = 128;   // The queries that are computed with a strip of keys.
  static constexpr Index kSmallCell = 128;  // The queries of a cell, and its keys.
  static constexpr Index kLargeCell = 256;
  static_assert(kSmallCell % kRowBlock == 0 && kSmallCell % kStrip == 0);

 public:
  /// What one task computes.
  struct Cell {
    Index span;
    Index head;        ///< Of a group.
    Index query, key;  ///< The first ones, by their numbers in the span.
  };

  /// Workspace.
  struct Lists {
    List<Cell> cells;    ///< Of one wave.
    List<Index> strips;  ///< Where the strips of each span's keys begin, and the end.
  };

  using Loop = FunctionRef<void(Index, FunctionRef<void(Index)>)>;

  /// \param cache     With logsumexp, dot, q, k and d_out of `in`.
  /// \param frame     Sums lie there.
  /// \param parallel  `parallel(count, body)` calls `body(i)` for each i in [0, count), on all
  ///                  threads if that is worthwhile.
  BackwardCells(const AttentionOperands<T>& in, Cache& cache, Lists& lists, Workspace::Frame& frame,
                Loop parallel);

  /// Computes the gradients, see CausalAttention::backward.
  void run(MatrixOut<T> dq, MatrixOut<T> dk, MatrixOut<T> dv) const;

 private:
  /// What scores of a strip of keys are made of, and space for them.
  struct Block {
    T *keys, *values;   ///< Right operands, [head_dim, kStrip] and [value_dim, kStrip].
    const T* key_rows;  ///< Right operands of dq, each [keys, kStrip].
    T *p, *ds, *slopes;
  };

  Index dq_strips() const { return Strips::strips_for(in_.shape.head_dim); }

  /// The sums of queries from `row` on, [queries, kStrip] for each strip of head_dim.
  T* dq_sums(Index head, Index strip, Index row) const {
    return dq_ + ((head * dq_strips() + strip) * in_.q.rows() + row) * kStrip;
  }
  /// The sums of a strip of keys, [dim, kStrip].
  T* key_sums(T* sums, Index kv_head, Index strip, Index dim) const {
    return sums + (kv_head * lists_.strips.back() + strip) * dim * kStrip;
  }
  Index strip_of(Index span, Index key) const { return lists_.strips[span] + key / kStrip; }

  /// Whether a query of the cell sees one of its keys.
  bool sees(const AttentionSpan& span, Index query, Index key) const {
    const Index last_query = std::min(query + cell_, span.queries) - 1;
    const Index last_key = std::min(key + cell_, span.keys) - 1;
    return span.prefix() + last_query >= key &&
           in_.last_query(span, last_key) >= span.prefix() + query;
  }

  /// Lists the cells of a wave. Each pair of a head and a cell's queries, one pair in each wave
  /// after the other, meets the keys from the first cell to the last.
  void list(Index wave) const;

  void compute(const Cell& cell, Index kv_head) const;

  /// Computes `rows` queries, from the one on whose own key is `own`, with a strip of keys.
  void compute_block(const Cell& cell, Index kv_head, Index own, Index rows, Index key,
                     const Block& block) const;

  /// Sets p and ds to zero where a query does not see a key.
  void hide(const AttentionSpan& span, Index own, Index rows, Index key, const Block& block) const;

  void write_queries(MatrixOut<T>& dq) const;
  void write_keys(MatrixOut<T>& dk, MatrixOut<T>& dv) const;

  const AttentionOperands<T>& in_;
  Cache& cache_;
  Lists& lists_;
  Loop parallel_;
  Index cell_ = kSmallCell;
  T *dq_ = nullptr, *dk_ = nullptr, *dv_ = nullptr;
};

template <class T>
BackwardCells<T>::BackwardCells(const AttentionOperands<T>& in, Cache& cache, Lists& lists,
                                Workspace::Frame& frame, Loop parallel)
    : in_(in), cache_(cache), lists_(lists), parallel_(parallel) {
  constexpr Index kLong = 1024;  // Shorter sequences would be too few cells for all threads.
  lists.strips.assign(1, 0);
  for (const AttentionSpan& span : in.spans) {
    if (span.queries > kLong) cell_ = kLargeCell;
    lists.strips.push_back(lists.strips.back() + Strips::strips_for(span.keys));
  }
  const AttentionHeads& shape = in.shape;
  const auto zeros = [&](Index rows, Index width) {
    T* const sums = frame.take<T>(rows * width);
    parallel_rows(rows, width, [&](Index begin, Index end) {
      std::fill_n(sums + begin * width, (end - begin) * width, T(0));
    });
    return sums;
  };
  dq_ = zeros(shape.heads * dq_strips() * in.q.rows(), kStrip);
  dk_ = zeros(shape.kv_heads * lists.strips.back() * shape.head_dim, kStrip);
  dv_ = zeros(shape.kv_heads * lists.strips.back() * shape.value_dim, kStrip);
}

template <class T>
void BackwardCells<T>::run(MatrixOut<T> dq, MatrixOut<T> dk, MatrixOut<T> dv) const {
  const AttentionHeads& shape = in_.shape;
  Index waves = 0;
  for (const AttentionSpan& span : in_.spans) {
    const Index query_cells = (span.queries + cell_ - 1) / cell_;
    if (query_cells == 0) continue;
    const Index key_cells = (span.keys + cell_ - 1) / cell_;
    waves = std::max(waves, shape.group() * query_cells + key_cells - 1);
  }
  for (Index wave = 0; wave < waves; ++wave) {
    list(wave);
    parallel_(lists_.cells.count() * shape.kv_heads,
              [&](Index i) { compute(lists_.cells[i / shape.kv_heads], i % shape.kv_heads); });
  }
  write_queries(dq);
  write_keys(dk, dv);
}

template <class T>
void BackwardCells<T>::list(Index wave) const {
  lists_.cells.clear();
  for (Index s = 0; s < in_.span_count(); ++s) {
    const AttentionSpan& span = in_.span(s);
    const Index query_cells = (span.queries + cell_ - 1) / cell_;
    const Index pairs = in_.shape.group() * query_cells;
    for (Index key = 0; key * cell_ < span.keys && key <= wave; ++key) {
      const Index pair = wave - key;
      if (pair >= pairs) continue;
      const Cell cell = {s, pair / query_cells, pair % query_cells * cell_, key * cell_};
      if (sees(span, cell.query, cell.key)) lists_.cells.push_back(cell);
    }
  }
}

template <class T>
void BackwardCells<T>::compute(const Cell& cell, Index kv_head) const {
  const AttentionSpan& span = in_.span(cell.span);
  const Index dim = in_.shape.head_dim;
  const Index value_dim = in_.shape.value_dim;
  auto& space = ThreadSpace<T, BackwardCells>::of_this_thread();
  space.reserve(kStrip * (dim + value_dim + 3 * kRowBlock + kStrip * dq_strips()));
  Block block = {};
  block.keys = space.take(dim * kStrip);
  block.values = space.take(value_dim * kStrip);
  block.p = space.take(kRowBlock * kStrip);
  block.ds = space.take(kRowBlock * kStrip);
  block.slopes = space.take(kRowBlock * kStrip);
  T* const key_rows = space.take(dq_strips() * kStrip * kStrip);
  const Index end_key = std::min(cell.key + cell_, span.keys);
  const Index end_query = std::min(cell.query + cell_, span.queries);
  for (Index key = cell.key; key < end_key; key += kStrip) {
    const Index keys = std::min(kStrip, end_key - key);
    // The queries that see a key of the strip, by their own keys.
    const Index begin = std::max(span.prefix() + cell.query, key);
    const Index end = std::min(span.prefix() + end_query, in_.last_query(span, key + keys - 1) + 1);
    if (begin >= end) continue;
    const Index row = span.key_begin + key;
    Strips::pack(in_.k, row, keys, kv_head, dim, static_cast<T>(in_.factor()), block.keys);
    Strips::pack(in_.v, row, keys, kv_head, value_dim, T(1), block.values);
    block.key_rows = cache_.k.at(kv_head, row);
    if (dim != kStrip) {
      for (Index strip = 0; strip < dq_strips(); ++strip) {
        kernels::pack_strip<kStrip>(cache_.k.at(kv_head, row) + strip * kStrip, 1, dim,
                                    std::min(kStrip, dim - strip * kStrip), keys,
                                    key_rows + strip * kStrip * kStrip);
      }
      block.key_rows = key_rows;
    }
    for (Index query = cell.query; query < end_query; query += kRowBlock) {
      const Index first = std::max(begin, span.prefix() + query);
      const Index last = std::min(end, span.prefix() + query + kRowBlock);
      if (first < last) compute_block(cell, kv_head, first, last - first, key, block);
    }
  }
}

template <class T>
void BackwardCells<T>::compute_block(const Cell& cell, Index kv_head, Index own, Index rows,
                                     Index key, const Block& block) const {
  const AttentionSpan& span = in_.span(cell.span);
  const Index dim = in_.shape.head_dim;
  const Index value_dim = in_.shape.value_dim;
  const Index head = kv_head * in_.shape.group() + cell.head;
  const Index keys = std::min(kStrip, span.keys - key);
  const auto softcap = static_cast<T>(in_.shape.softcap);
  const Index query = span.query_begin + own - span.prefix();
  Strips::multiply(Strips::rows_of(cache_.q, query, head), rows, block.keys, dim, block.p, false);
  Strips::multiply(Strips::rows_of(cache_.d_out, query, head), rows, block.values, value_dim,
                   block.ds, false);
  if (softcap > 0) Strips::cap(softcap, rows, block.p, block.slopes);
  const T* const logsumexp = &cache_.logsumexp.view()(head, query);
  const T* const dot = &cache_.dot.view()(head, query);
  for (Index r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (Index j = 0; j < kStrip; j += kLanes<T>) {
      T* const p = block.p + r * kStrip + j;
      T* const ds = block.ds + r * kStrip + j;
      const Lanes<T> share = exp_lanes<T>(load_lanes<T>(p) - logsumexp[r]);
      store_lanes<T>(share, p);
      store_lanes<T>(share * (load_lanes<T>(ds) - dot[r]), ds);
    }
  }
  if (softcap > 0) loops::multiply<T>(rows * kStrip, block.ds, block.slopes, block.ds);
  hide(span, own, rows, key, block);
  const Index strip = strip_of(cell.span, key);
  Strips::multiply(Strips::columns_of(cache_.d_out, query, head), value_dim, block.p, rows,
                   key_sums(dv_, kv_head, strip, value_dim), true);
  Strips::multiply(Strips::columns_of(cache_.q, query, head), dim, block.ds, rows,
                   key_sums(dk_, kv_head, strip, dim), true);
  for (Index part = 0; part < dq_strips(); ++part) {
    Strips::multiply({block.ds, kStrip, 1}, rows, block.key_rows + part * kStrip * kStrip, keys,
                     dq_sums(head, part, query), true);
  }
}

template <class T>
void BackwardCells<T>::hide(const AttentionSpan& span, Index own, Index rows, Index key,
                            const Block& block) const {
  const Index keys = std::min(kStrip, span.keys - key);
  if (own < key + kStrip - 1 || in_.first_key(span, own + rows - 1) > key) {
    for (Index r = 0; r < rows; ++r) {
      const Index begin = std::clamp<Index>(in_.first_key(span, own + r) - key, 0, kStrip);
      const Index end = std::clamp<Index>(own + r - key + 1, begin, kStrip);
      for (T* const of_row : {block.p + r * kStrip, block.ds + r * kStrip}) {
        std::fill_n(of_row, begin, T(0));
        std::fill_n(of_row + end, kStrip - end, T(0));
      }
    }
  }
  if (!in_.any_padding(span, key, key + keys)) return;
  for (Index j = 0; j < keys; ++j) {
    if (!in_.is_padding(span, key + j)) continue;
    for (Index r = 0; r < rows; ++r) {
      block.p[r * kStrip + j] = T(0);
      block.ds[r * kStrip + j] = T(0);
    }
  }
}

template <class T>
void BackwardCells<T>::write_queries(MatrixOut<T>& dq) const {
  const Index dim = in_.shape.head_dim;
  const auto scale = static_cast<T>(in_.shape.scale);
  for (const AttentionSpan& span : in_.spans) {
    parallel_rows(span.queries, in_.shape.heads * dim, [&](Index begin, Index end) {
      for (Index row = span.query_begin + begin; row < span.query_begin + end; ++row) {
        for (Index head = 0; head < in_.shape.heads; ++head) {
          for (Index strip = 0; strip < dq_strips(); ++strip) {
            const Index first = strip * kStrip;
            loops::scale<T>(std::min(kStrip, dim - first), scale, dq_sums(head, strip, row),
                            &dq(row, head * dim + first));
          }
        }
      }
    });
  }
}

template <class T>
void BackwardCells<T>::write_keys(MatrixOut<T>& dk, MatrixOut<T>& dv) const {
  const AttentionHeads& shape = in_.shape;
  for (Index s = 0; s < in_.span_count(); ++s) {
    const AttentionSpan& span = in_.span(s);
    const Index strips = Strips::strips_for(span.keys);
    parallel_(strips * shape.kv_heads, [&](Index i) {
      const Index kv_head = i % shape.kv_heads;
      const Index key = i / shape.kv_heads * kStrip;
      const Index keys = std::min(kStrip, span.keys - key);
      const Index strip = strip_of(s, key);
      const Index row = span.key_begin + key;
      Strips::unpack(key_sums(dk_, kv_head, strip, shape.head_dim), static_cast<T>(shape.scale),
                     row, keys, kv_head, shape.head_dim, dk);
      Strips::unpack(key_sums(dv_, kv_head, strip, shape.value_dim), T(1), row, keys, kv_head,
                     shape.value_dim, dv);
    });
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::BackwardCells<float>;
extern template class weir::BackwardCells<double>;
#endif
