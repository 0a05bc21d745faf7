// SPDX-License-Identifier: MIT
/// \file
/// Keeping numbers within bounds, with the derivative.
#pragma once

#include <cstdint>

#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// x <- min(max(x, -bound), bound), in place; a NaN stays a NaN. (DBRX's released code clamps
/// queries, keys and values.)
/// \param outside  Becomes one byte for each number of x, 1 where it was outside. May be null if no
///                 `clamp_backward` follows.
template <class T>
void clamp_forward(double bound, Matrix<T>& x, List<std::uint8_t>* outside) {
  const T most = static_cast<T>(bound);
  if (outside != nullptr) outside->resize(x.size());
  parallel_pieces(1, x.size(), 2, [&](Index, Index begin, Index count) {
    for (Index i = begin; i < begin + count; ++i) {
      T& number = x.data()[i];
      const bool above = number > most;
      const bool below = number < -most;
      if (outside != nullptr) (*outside)[i] = above || below ? 1 : 0;
      number = above ? most : (below ? -most : number);
    }
  });
}

/// The gradient is zero where x was outside.
/// \param d  The gradient of what `clamp_forward` wrote, which becomes that of what it read.
template <class Rows>
void clamp_backward(const List<std::uint8_t>& outside, Rows& d) {
  parallel_pieces(1, d.size(), 1, [&](Index, Index begin, Index count) {
    for (Index i = begin; i < begin + count; ++i) {
      if (outside[i] != 0) d.data()[i] = 0;
    }
  });
}

}  // namespace weir
