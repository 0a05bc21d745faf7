// SPDX-License-Identifier: MIT
/// \file
/// Numbers kept within bounds, with the derivative.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <weir/core/types.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// x <- min(max(x, -bound), bound), in place; a NaN stays a NaN. The gradient is zero where x was
/// outside. (DBRX's released code clamps queries, keys and values.)
template <class T>
struct Clamp {
  T bound = T(0);

  /// \param outside  Becomes one byte for each number of x, 1 where it was outside.
  void forward(Matrix<T>& x, std::vector<std::uint8_t>& outside) const {
    outside.resize(static_cast<std::size_t>(x.size()));
    parallel_pieces(1, x.size(), 2, [&](Index, Index begin, Index count) {
      for (Index i = begin; i < begin + count; ++i) {
        T& number = x.data()[i];
        const bool above = number > bound;
        const bool below = number < -bound;
        outside[static_cast<std::size_t>(i)] = above || below ? 1 : 0;
        number = above ? bound : (below ? -bound : number);
      }
    });
  }

  /// \param d  The gradient of what `forward` wrote, which becomes that of what it read.
  static void backward(Matrix<T>& d, const std::vector<std::uint8_t>& outside) {
    parallel_pieces(1, d.size(), 1, [&](Index, Index begin, Index count) {
      for (Index i = begin; i < begin + count; ++i) {
        if (outside[static_cast<std::size_t>(i)] != 0) d.data()[i] = T(0);
      }
    });
  }
};

}  // namespace weir
