// SPDX-License-Identifier: MIT
/// \file
/// Transposing squares of numbers that are as wide as a register.
#pragma once

#include <utility>

#include <weir/core/types.hpp>
#include <weir/ops/lanes.hpp>

namespace weir::kernels {

namespace detail {

template <Index half, class T, int... lane>
void exchange(Lanes<T>& upper, Lanes<T>& lower, std::integer_sequence<int, lane...>) {
  constexpr int kHalf = static_cast<int>(half);
  constexpr int kSecond = static_cast<int>(kLanes<T>);
  const Lanes<T> a = upper;
  const Lanes<T> b = lower;
  upper = __builtin_shufflevector(a, b, ((lane & kHalf) == 0 ? lane : kSecond + lane - kHalf)...);
  lower = __builtin_shufflevector(a, b, ((lane & kHalf) == 0 ? lane + kHalf : kSecond + lane)...);
}

/// Swaps the off-diagonal quarters of all squares of 2 * `half` rows and columns, then those of the
/// larger ones.
template <Index half, class T>
void exchange_quarters(Lanes<T> (&rows)[kLanes<T>]) {
  if constexpr (half < kLanes<T>) {
    constexpr std::make_integer_sequence<int, static_cast<int>(kLanes<T>)> kEach;
#pragma GCC unroll 16
    for (Index i = 0; i < kLanes<T>; ++i) {
      if ((i & half) == 0) exchange<half, T>(rows[i], rows[i + half], kEach);
    }
    exchange_quarters<2 * half, T>(rows);
  }
}

}  // namespace detail

/// Transposes a square of numbers, one row in each element.
template <class T>
[[gnu::always_inline]] inline void transpose(Lanes<T> (&rows)[kLanes<T>]) {
  detail::exchange_quarters<1, T>(rows);
}

/// to[j * to_row + i] = from[i * from_row + j] for a square of `kLanes<T>` rows and columns.
template <class T>
void transpose(const T* from, Index from_row, T* to, Index to_row) {
  Lanes<T> rows[kLanes<T>];
  for (Index i = 0; i < kLanes<T>; ++i) rows[i] = load_lanes<T>(from + i * from_row);
  transpose<T>(rows);
  for (Index i = 0; i < kLanes<T>; ++i) store_lanes<T>(rows[i], to + i * to_row);
}

}  // namespace weir::kernels
