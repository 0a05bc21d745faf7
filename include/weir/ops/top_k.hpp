// SPDX-License-Identifier: MIT
/// \file
/// The k largest of some numbers.
#pragma once

#include <algorithm>
#include <cassert>
#include <limits>
#include <span>

#include <weir/core/types.hpp>
#include <weir/ops/lanes.hpp>

namespace weir {

namespace detail {

/// Inserts one number after the other into a sorted list. For few numbers.
template <class T>
void top_k_by_insertion(const T* values, Index count, Index k, Index* chosen) {
  T least = values[0];  // The value of the last one chosen.
  for (Index i = 0; i < count; ++i) {
    const T value = values[i];
    if (i >= k && !(value > least)) continue;
    Index place = std::min(i, k - 1);
    for (; place > 0 && value > values[chosen[place - 1]]; --place) {
      chosen[place] = chosen[place - 1];
    }
    chosen[place] = i;
    least = values[chosen[std::min(i, k - 1)]];
  }
}

/// The place of the largest of `count` numbers; among equal ones, of the first. NaNs are skipped.
/// \param count    A multiple of kLanes<T>. At least one of the numbers is not NaN.
template <class T>
Index place_of_largest(const T* values, Index count) {
  using Integer = typename Register<T>::Integer;
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  Lanes<T> best = Lanes<T>{} + kLowest;
  LaneBits<T> place = LaneBits<T>{} + std::numeric_limits<Integer>::max();
  LaneBits<T> here = lane_numbers<T>();
  for (Index i = 0; i < count; i += kLanes<T>) {
    const Lanes<T> candidate = load_lanes<T>(values + i);
    place = candidate > best ? here : place;
    best = max_lanes<T>(best, candidate);
    here += static_cast<Integer>(kLanes<T>);
  }
  const T top = max_of<T>(best);
  if (top == kLowest) return std::find(values, values + count, kLowest) - values;
  place = best == top ? place : LaneBits<T>{} + std::numeric_limits<Integer>::max();
  const auto smaller = [](const LaneBits<T>& a, const LaneBits<T>& b) -> LaneBits<T> {
    return a < b ? a : b;
  };
  return fold_lanes<T>(place, smaller);
}

/// The most numbers that `top_k_by_search` has room for.
inline constexpr Index kSearched = 1024;

/// Searches for the largest of the remaining numbers, k times.
template <class T>
void top_k_by_search(const T* values, Index count, Index k, Index* chosen) {
  T left[kSearched];
  const Index padded = (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  std::copy_n(values, count, left);
  std::fill(left + count, left + padded, std::numeric_limits<T>::quiet_NaN());
  for (Index i = 0; i < k; ++i) {
    chosen[i] = place_of_largest(left, padded);
    left[chosen[i]] = std::numeric_limits<T>::quiet_NaN();
  }
}

/// Keeps a heap of the numbers chosen so far, the smallest of them on top.
template <class T>
void top_k_by_heap(const T* values, Index count, Index k, Index* chosen) {
  const auto before = [values](Index a, Index b) {
    return values[a] > values[b] || (values[a] == values[b] && a < b);
  };
  Index* const end = chosen + k;
  for (Index i = 0; i < k; ++i) chosen[i] = i;
  std::make_heap(chosen, end, before);
  for (Index i = k; i < count; ++i) {
    if (!(values[i] > values[chosen[0]])) continue;
    std::pop_heap(chosen, end, before);
    chosen[k - 1] = i;
    std::push_heap(chosen, end, before);
  }
  std::sort_heap(chosen, end, before);
}

}  // namespace detail

/// Writes the indices of the largest values to `chosen`, as many as it has room for, the largest
/// first. Among equal values, the one with the lowest index comes first. Allocates nothing.
///
/// \param values   Without NaN; -inf is a value like others.
/// \param chosen   [k], 0 <= k <= the number of values.
template <class T>
void top_k(std::span<const T> values, std::span<Index> chosen) {
  const auto count = static_cast<Index>(values.size());
  const auto k = static_cast<Index>(chosen.size());
  assert(k <= count);
  constexpr Index kFew = 8;
  if (k == 0) return;
  if (count <= kFew) {
    detail::top_k_by_insertion(values.data(), count, k, chosen.data());
  } else if (count <= detail::kSearched && k <= 128) {
    detail::top_k_by_search(values.data(), count, k, chosen.data());
  } else {
    detail::top_k_by_heap(values.data(), count, k, chosen.data());
  }
}

}  // namespace weir
