// SPDX-License-Identifier: MIT
/// \file
/// The k largest of some numbers.
#pragma once

#include <algorithm>
#include <cassert>

#include <weir/core/types.hpp>

namespace weir {

/// Writes the indices of the k largest values to `chosen`, the largest first; of equal values the
/// one with the lowest index comes first. Allocates nothing.
///
/// \param values   Without NaN; -inf is a value like others.
/// \param k        0 <= k <= count.
template <class T>
void top_k(const T* values, Index count, Index k, Index* chosen) {
  assert(0 <= k && k <= count);
  constexpr Index kInsertionPays = 16;
  if (k == 0) return;
  if (k <= kInsertionPays) {
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
    return;
  }
  // A heap of those chosen so far with the last of them on top.
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

}  // namespace weir
