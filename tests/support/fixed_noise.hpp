// SPDX-License-Identifier: MIT
/// \file
/// Noise for routers that is the same in each pass.
#pragma once

#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>

namespace weir::test {

/// A NoiseSource that gives its first rows, whatever the pass.
struct FixedNoise {
  template <class T>
  void fill(const Pass& /*pass*/, MatrixOut<T> noise) const {
    noise = values.topRows(noise.rows()).template cast<T>();
  }

  Matrix<double> values;
};

}  // namespace weir::test
