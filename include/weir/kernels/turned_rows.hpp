// SPDX-License-Identifier: MIT
/// \file
/// Products of a few rows with columns that are contiguous along their depth.
#pragma once

#include <algorithm>

#include <weir/core/types.hpp>
#include <weir/kernels/register_block.hpp>
#include <weir/kernels/transpose.hpp>
#include <weir/ops/lanes.hpp>

namespace weir::kernels {

/// sum += a * b as the innermost loop of all products does it. GCC otherwise keeps multiplication
/// and addition apart in a loop that has a single sum, on processors where that is faster, and the
/// rounding would differ.
template <class T>
[[gnu::always_inline]] inline void add_product(Lanes<T>& sum, const T& a, const Lanes<T>& b) {
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
  asm("" : "+v"(sum));
#endif
  Native<T>::multiply_add(sum, a, b);
}

/// sums[i] += a_i b^T for `rows` rows of a and `count` <= kLanes rows of b, step by step along
/// their depth: in the order of `multiply_block`, so that a row has the same bits alone and among
/// others. Each element of b is read once, and turned on its way. Lanes from `count` on are
/// unspecified.
template <class T, int rows>
void multiply_turned(const T* a, Index a_row, const T* b, Index b_row, Index count, Index depth,
                     Lanes<T>* sums) {
  constexpr Index kSide = kLanes<T>;
  constexpr Index kAhead = 8 * kSide;
  Lanes<T> sum[rows];
  for (int i = 0; i < rows; ++i) sum[i] = sums[i];
  for (Index step = 0; step < depth; step += kSide) {
    const Index steps = std::min(kSide, depth - step);
    Lanes<T> columns[kSide];
    for (Index j = 0; j < kSide; ++j) {
      const T* const from = b + std::min(j, count - 1) * b_row + step;
      __builtin_prefetch(from + kAhead, 0, 2);
      columns[j] = steps == kSide ? load_lanes<T>(from) : load_lanes<T>(from, steps);
    }
    transpose<T>(columns);
    for (Index s = 0; s < steps; ++s) {
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) add_product<T>(sum[i], a[i * a_row + step + s], columns[s]);
    }
  }
  for (int i = 0; i < rows; ++i) sums[i] = sum[i];
}

}  // namespace weir::kernels
