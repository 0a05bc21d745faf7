// SPDX-License-Identifier: MIT
/// \file
/// Softmax attention of a few queries: one by one, reading each key and value once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <weir/attention/code_products.hpp>
#include <weir/attention/head_pages.hpp>
#include <weir/attention/key_runs.hpp>
#include <weir/attention/operands.hpp>
#include <weir/core/cache_storage.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/bfloat16.hpp>
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

  /// The heads of a query are computed in parts, which may be computed in parallel, too: a run has
  /// to be shared out where there are few.
  Index parts() const { return std::min(kMostParts, units()); }

  /// Computes a part of the heads of one query over the keys `begin` to `end`, which it sees.
  /// Reading keys and values takes most of the time, so each is read once, as it is stored.
  /// \param query    Its number in span s.
  /// \param partial  Its places for these heads are set.
  void attend(Index s, Index query, Index begin, Index end, Index part, T* partial) const;

  /// Adds up the results of the runs of one query, in the order of the keys.
  /// \param row      The row of q and of out.
  /// \param partial  [runs, partial_width()]
  void combine(Index row, MatrixIn<T> partial, MatrixOut<T>& out, Scratch<T>& logsumexp) const;

 private:
  /// For this many keys the scores of some heads are held at once.
  static constexpr Index kRows = KeyRuns::kBlock;
  static_assert(kRows == Pages::kRows);
  static constexpr Index kMostParts = 4;

  /// A unit is heads of one group that are computed together.
  static constexpr Index kMostHeads = 8;
  Index units_of_group() const { return (in.shape.group() + kMostHeads - 1) / kMostHeads; }
  Index units() const { return in.shape.kv_heads * units_of_group(); }
  Index kv_head_of(Index unit) const { return unit / units_of_group(); }
  Index first_head_of(Index unit) const {
    return kv_head_of(unit) * in.shape.group() + unit % units_of_group() * kMostHeads;
  }

  /// The query, the keys and the units of a part.
  struct Part {
    Index span, query, begin, end;
    Index first, last;
  };

  template <class Code>
  void attend_as(const Part& part, T* partial) const;

  /// The keys and values of a head from `row` on.
  template <class Code>
  KeyValueBlock<T, Code> block(const KeyValueRows<T>& rows, Index kv_head, Index row, Index count,
                               T* space) const {
    if constexpr (std::is_same_v<Code, T>) {
      return rows.block(in.shape, kv_head, row, count, space);
    } else {
      return rows.heads->template block<Code>(rows.page_of(row), kv_head).from(row % kRows);
    }
  }

  /// Places for some heads.
  struct Sums {
    T *total, *top, *sums;
  };

  /// Adds up the values of `count` keys from `row` on for some heads.
  /// \param scores   Space, [heads, kRows].
  template <class Code>
  void attend_block(const AttentionSpan& span, const KeyValueBlock<T, Code>& block, Index row,
                    Index count, Index heads, const T* q, T* scores, const Sums& to) const;

  /// Calls `chunk(heads, h)` with constants of at most `most` that add up to `heads`.
  template <int most, class Chunk>
  static void for_each_chunk(Index heads, Chunk&& chunk) {
    Index h = 0;
    if constexpr (most > 1) {
      for (; h + most <= heads; h += most) chunk(std::integral_constant<int, most>{}, h);
      if (h < heads) {
        for_each_chunk<most / 2>(heads - h, [&](auto n, Index i) { chunk(n, h + i); });
      }
    } else {
      for (; h < heads; ++h) chunk(std::integral_constant<int, 1>{}, h);
    }
  }

  /// scores [heads, kRows] = q [heads, head_dim] times keys that are rows.
  template <int heads>
  static void score_rows(const KeyValueBlock<T>& keys, Index count, Index dim, const T* q,
                         T* scores);

  /// Turns the scores of one head into their shares, relative to its `top`, and adjusts `total` and
  /// `sums` to a larger one.
  void soften(Index rows, T* scores, T& top, T& total, T* sums) const;
};

template <class T>
void FewQueries<T>::attend(Index s, Index query, Index begin, Index end, Index part,
                           T* partial) const {
  const Part of_units = {
      s, query, begin, end, part * units() / parts(), (part + 1) * units() / parts()};
  const HeadPages<T>* const pages = in.rows_of(s).heads;
  const CacheStorage storage = pages == nullptr ? CacheStorage::kFull : pages->storage;
  if (storage == CacheStorage::kBfloat16) {
    attend_as<kernels::BFloat16>(of_units, partial);
  } else if (storage == CacheStorage::kInt8) {
    attend_as<std::int8_t>(of_units, partial);
  } else {
    attend_as<T>(of_units, partial);
  }
}

template <class T>
template <class Code>
void FewQueries<T>::attend_as(const Part& part, T* partial) const {
  // These are copies, so that no store of a score can change them.
  const AttentionHeads shape = in.shape;
  const AttentionSpan span = in.span(part.span);
  const KeyValueRows<T> rows_of = in.rows_of(part.span);
  const Index dim = shape.head_dim;
  const Index value_dim = shape.value_dim;
  const Index first = first_head_of(part.first);
  const Index heads = (part.last == units() ? shape.heads : first_head_of(part.last)) - first;
  T* const total = partial;
  T* const top = total + shape.heads;
  T* const sums = top + shape.heads;
  std::fill_n(total + first, heads, T(0));
  std::fill_n(top + first, heads, std::numeric_limits<T>::lowest());
  std::fill_n(sums + first * value_dim, heads * value_dim, T(0));

  auto& space = ThreadSpace<T, FewQueries>::of_this_thread();
  space.reserve(kMostHeads * kRows + heads * dim + rows_of.block_size());
  T* const unpacked = space.take(rows_of.block_size());
  T* const scores = space.take(kMostHeads * kRows);
  T* const q = space.take(heads * dim);
  const T* const from =
      in.q.data() + (span.query_begin + part.query) * in.q.outerStride() + first * dim;
  loops::scale<T>(heads * dim, static_cast<T>(in.factor()), from, q);
  for (Index row = part.begin, rows = 0; row < part.end; row += rows) {
    rows = std::min(in.together(span, row, kRows), part.end - row);
    KeyValueBlock<T, Code> of_head;
    for (Index unit = part.first, last = -1; unit < part.last; ++unit) {
      const Index kv_head = kv_head_of(unit);
      if (kv_head != last) of_head = block<Code>(rows_of, kv_head, row, rows, unpacked);
      last = kv_head;
      if (unit + 1 == part.last && row + rows < part.end) {
        rows_of.fetch(kv_head_of(part.first), row + rows);
      }
      const Index head = first_head_of(unit);
      const Index group_end = (kv_head + 1) * shape.group();
      attend_block(span, of_head, row, rows, std::min(kMostHeads, group_end - head),
                   q + (head - first) * dim, scores,
                   {total + head, top + head, sums + head * value_dim});
    }
  }
}

template <class T>
template <class Code>
void FewQueries<T>::attend_block(const AttentionSpan& span, const KeyValueBlock<T, Code>& block,
                                 Index row, Index count, Index heads, const T* q, T* scores,
                                 const Sums& to) const {
  using Products = CodeProducts<T, Code>;
  const Index dim = in.shape.head_dim;
  const Index value_dim = in.shape.value_dim;
  const auto softcap = static_cast<T>(in.shape.softcap);
  const bool padding = in.any_padding(span, row, row + count);
  // In a page, keys lie side by side. Elsewhere they are rows.
  const bool side_by_side = block.key_step != 1;
  const Index place = side_by_side ? row % kRows : 0;
  for_each_chunk<8>(heads, [&](auto chunk, Index h) {
    if (side_by_side) {
      Products::template score<chunk>(block.keys - place, place, count, dim, q + h * dim,
                                      scores + h * kRows);
    } else if constexpr (std::is_same_v<Code, T>) {
      score_rows<chunk>(block, count, dim, q + h * dim, scores + h * kRows);
    }
  });
  for (Index h = 0; h < heads; ++h) {
    T* const p = scores + h * kRows + place;
    if (block.key_scales != nullptr) loops::multiply<T>(count, p, block.key_scales, p);
    if (softcap > 0) loops::scaled_tanh<T>(count, softcap, p, p);
    for (Index r = 0; padding && r < count; ++r) {
      if (in.is_padding(span, row + r)) p[r] = -std::numeric_limits<T>::infinity();
    }
    soften(count, p, to.top[h], to.total[h], to.sums + h * value_dim);
  }
  for (Index r = place; r < place + count; ++r) {
    for (Index h = 0; h < heads; ++h) to.total[h] += scores[h * kRows + r];
  }
  for (Index h = 0; h < heads && block.value_scales != nullptr; ++h) {
    T* const p = scores + h * kRows + place;
    loops::multiply<T>(count, p, block.value_scales, p);
  }
  for_each_chunk<4>(heads, [&](auto chunk, Index h) {
    Products::template add_values<chunk>(block.values, block.value_row, count, value_dim,
                                         scores + h * kRows + place, to.sums + h * value_dim);
  });
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
void FewQueries<T>::score_rows(const KeyValueBlock<T>& keys, Index count, Index dim, const T* q,
                               T* scores) {
  for (Index r = 0; r < count; r += kLanes<T>) {
    Lanes<T> sums[heads] = {};
    kernels::multiply_turned<T, heads>(q, dim, keys.keys + r * keys.key_row, keys.key_row,
                                       std::min(kLanes<T>, count - r), dim, sums);
    for (int h = 0; h < heads; ++h) store_lanes<T>(sums[h], scores + h * kRows + r);
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

}  // namespace weir

#ifdef WEIR_COMPILED
extern template struct weir::FewQueries<float>;
extern template struct weir::FewQueries<double>;
#endif
