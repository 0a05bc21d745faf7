// SPDX-License-Identifier: MIT
/// \file
/// The loops of attention over keys and values as a cache stores them, for a few heads at a time.
#pragma once

#include <algorithm>
#include <type_traits>

#include <weir/attention/cache_codes.hpp>
#include <weir/attention/pages.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/register_block.hpp>
#include <weir/kernels/turned_rows.hpp>
#include <weir/ops/lanes.hpp>

namespace weir {

/// Every sum is made number by number, in the order of `kernels::multiply_block`: see FewQueries.
///
/// \tparam Code  See `load_codes`.
template <class T, class Code>
struct CodeProducts {
  static constexpr Index kRows = Pages::kRows;

  /// scores [heads, kRows], from `place` to `place + count`, = q [heads, dim] times the keys at
  /// these places of a page, [dim, kRows]. Other scores may be overwritten.
  template <int heads>
  static void score(const Code* keys, Index place, Index count, Index dim, const T* q, T* scores) {
    // Whole tiles of three or six registers of keys, of which each divides kRows.
    constexpr bool kManyRegisters = kernels::kVectorRegisters == 32;
    constexpr bool kHasLarge = heads <= (kManyRegisters ? 4 : 2);
    constexpr Index kSmall = 3 * kLanes<T>;
    static_assert(kRows % (2 * kSmall) == 0);
    const Index end = place + count;
    for (Index i = place / kSmall * kSmall; i < end;) {
      if (kHasLarge && i % (2 * kSmall) == 0 && i + kSmall < end) {
        score_tile<heads, kHasLarge ? 6 : 3>(keys + i, dim, q, scores + i);
        i += 2 * kSmall;
      } else {
        score_tile<heads, 3>(keys + i, dim, q, scores + i);
        i += kSmall;
      }
    }
  }

  /// sums [heads, dim] += p [heads, kRows] times `count` values, which lie `stride` apart.
  template <int heads>
  static void add_values(const Code* values, Index stride, Index count, Index dim, const T* p,
                         T* sums) {
    constexpr Index kLane = kLanes<T>;
    Index d = 0;
    for (; d + 4 * kLane <= dim; d += 4 * kLane) {
      add_columns<heads, 4>(values + d, stride, count, kLane, dim, p, sums + d);
    }
    for (; d < dim; d += kLane) {
      add_columns<heads, 1>(values + d, stride, count, std::min(kLane, dim - d), dim, p, sums + d);
    }
  }

 private:
  template <int heads, int vectors>
  static void score_tile(const Code* keys, Index dim, const T* q, T* scores);

  /// For `blocks` blocks of kLanes columns, of which the last one has `lanes` columns.
  template <int heads, int blocks>
  static void add_columns(const Code* values, Index stride, Index count, Index lanes, Index dim,
                          const T* p, T* sums);

  /// Fetches what will be read some rows after the `count` codes at `from`. The hardware does not
  /// look beyond a page of memory.
  template <Index count>
  static void fetch_behind(const Code* from) {
    constexpr Index kLine = 64;
    constexpr Index kAhead = 6144;
    const char* const at = reinterpret_cast<const char*>(from) + kAhead;
#pragma GCC unroll 8
    for (Index i = 0; i < count * static_cast<Index>(sizeof(Code)); i += kLine) {
      __builtin_prefetch(at + i, 0, 2);
    }
  }
};

template <class T, class Code>
template <int heads, int vectors>
void CodeProducts<T, Code>::score_tile(const Code* keys, Index dim, const T* q, T* scores) {
  Lanes<T> sum[heads][vectors] = {};
  for (Index d = 0; d < dim; ++d, keys += kRows) {
    fetch_behind<vectors * kLanes<T>>(keys);
    Lanes<T> key[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) key[j] = load_codes<T>(keys + j * kLanes<T>);
#pragma GCC unroll 8
    for (int h = 0; h < heads; ++h) {
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) {
        kernels::add_product<T>(sum[h][j], q[h * dim + d], key[j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < heads; ++h) {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) store_lanes<T>(sum[h][j], scores + h * kRows + j * kLanes<T>);
  }
}

template <class T, class Code>
template <int heads, int blocks>
void CodeProducts<T, Code>::add_columns(const Code* values, Index stride, Index count, Index lanes,
                                        Index dim, const T* p, T* sums) {
  constexpr Index kLane = kLanes<T>;
  Lanes<T> sum[heads][blocks];
  for (int h = 0; h < heads; ++h) {
    for (int j = 0; j < blocks; ++j) {
      sum[h][j] = load_lanes<T>(sums + h * dim + j * kLane, lanes);
    }
  }
  for (Index r = 0; r < count; ++r, values += stride) {
    fetch_behind<blocks * kLane>(values);
    Lanes<T> value[blocks];
#pragma GCC unroll 4
    for (int j = 0; j < blocks; ++j) {
      if constexpr (std::is_same_v<Code, T>) {
        value[j] = load_lanes<T>(values + j * kLane, lanes);
      } else {
        value[j] = load_codes<T>(values + j * kLane);  // Rows of codes are filled up.
      }
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
      store_lanes<T>(sum[h][j], sums + h * dim + j * kLane, lanes);
    }
  }
}

}  // namespace weir
