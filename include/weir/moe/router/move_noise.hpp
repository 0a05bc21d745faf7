// SPDX-License-Identifier: MIT
/// \file
/// The noise of logits that are made of other noisy logits.
#pragma once

#include <limits>
#include <span>

#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Logits x' are made of logits x, in such a way that the noise of x arrives in x' times `scale`:
///
///     x' - clean' = scale (x - clean),    deviation' = scale deviation
///
/// Where x' is -infinity, so is clean'.
/// \param from     The noise of x; the last level counts. Without one, clean' is x', and deviation'
///                 zero.
/// \param to       The noise of x'.
template <class T>
void move_noise(std::span<const NoiseLevel<T>> from, MatrixIn<T> x, T scale, MatrixIn<T> moved,
                NoiseLevel<T>& to) {
  if (from.empty()) {
    copy_rows<T>(moved, to.clean);
    set_zero(to.deviation, moved.rows(), moved.cols());
    return;
  }
  const Matrix<T>& clean = from.back().clean;
  const auto f = [scale](const Lanes<T>& y, const Lanes<T>& noisy,
                         const Lanes<T>& without) -> Lanes<T> {
    constexpr T kLowest = -std::numeric_limits<T>::infinity();
    return y == kLowest ? y : y - scale * (noisy - without);
  };
  set_shape(to.clean, moved.rows(), moved.cols());
  parallel_pieces(moved.rows(), moved.cols(), 2, [&](Index t, Index col, Index count) {
    map_lanes<T>(count, f, &to.clean(t, col), &moved.coeffRef(t, col), &x.coeffRef(t, col),
                 &clean(t, col));
  });
  scale_rows<T>(scale, from.back().deviation, to.deviation);
}

}  // namespace weir
