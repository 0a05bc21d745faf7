// SPDX-License-Identifier: MIT
/// \file
/// A layer that draws, for finite differences.
#pragma once

#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>

namespace weir::test {

/// A layer with the same random draws in each pass, so that passes can be compared.
template <class L>
struct SameDraws {
  using Scalar = double;
  using Cache = typename L::Cache;

  const Matrix<double>& forward(MatrixIn<double> x, const Pass& pass, Cache& cache) const {
    Rng rng(99);
    Pass with_rng = pass;
    with_rng.rng = &rng;
    return layer.forward(x, with_rng, cache);
  }
  const Matrix<double>& backward(MatrixIn<double> dy, Cache& cache) {
    return layer.backward(dy, cache);
  }
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.layer);
  }

  L layer;
};

}  // namespace weir::test
