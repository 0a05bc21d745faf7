// SPDX-License-Identifier: MIT
/// \file
/// Orthogonal matrices by matrix products alone.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// The workspace of `newton_schulz`, and its result. It grows with the largest matrix.
template <class T>
struct NewtonSchulzCache {
  Scratch<T> x;             ///< The result, shaped like the argument.
  Scratch<T> next;          ///< [rows, cols]
  Scratch<T> gram, square;  ///< [n, n], n the smaller of rows and columns.

  /// Makes room for a matrix.
  void reshape(Index rows, Index cols) {
    const Index n = std::min(rows, cols);
    x.reshape(rows, cols);
    next.reshape(rows, cols);
    gram.reshape(n, n);
    square.reshape(n, n);
  }
};

/// Approximately U V^T, where m = U S V^T is the singular value decomposition of m: the nearest
/// matrix with orthonormal rows or columns. From X = m / ||m||_F, each iteration computes
///
///     X <- a X + b (X X^T) X + c (X X^T)^2 X        a = 3.4445, b = -4.7750, c = 2.0315
///
/// which maps each singular value s to a s + b s^3 + c s^5 and leaves the singular vectors. The
/// coefficients lift small singular values fast instead of converging: after five iterations, those
/// that were above about 1e-3 of the norm are between 0.7 and 1.2. Does not depend on the scale of
/// m (there is no epsilon beside the norm); zero stays zero.
/// (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".)
///
/// \param m        [rows, cols]
/// \param iterations  How often the step is taken.
/// \return         [rows, cols], in the cache.
/// \throws ConfigError  if `iterations` is negative.
template <std::floating_point T>
Eigen::Map<const Matrix<T>> newton_schulz(MatrixIn<T> m, Index iterations,
                                          NewtonSchulzCache<T>& cache) {
  constexpr T kA = T(3.4445);
  constexpr T kB = T(-4.7750);
  constexpr T kC = T(2.0315);
  expect_at_least<Index>("newton_schulz", "iterations", iterations, 0);
  const bool wide = m.rows() <= m.cols();
  cache.reshape(m.rows(), m.cols());
  auto x = cache.x.view();
  auto next = cache.next.view();
  auto gram = cache.gram.view();
  auto square = cache.square.view();
  const T largest = m.size() == 0 ? T(0) : m.cwiseAbs().maxCoeff();
  if (largest == T(0)) {
    x.setZero();
    return std::as_const(cache.x).view();
  }
  x = m / largest;  // Squares of what is left neither overflow nor vanish.
  x /= static_cast<T>(std::sqrt(loops::sum_of_squares_as_double(x.size(), x.data())));
  const auto run = [](const Product<T>& product) { multiply<T>(std::array{product}); };
  for (Index i = 0; i < iterations; ++i) {
    run(wide ? product_nt<T>(x, x, gram) : product_tn<T>(x, x, gram));
    run(product_nn<T>(gram, gram, square));
    gram = kB * gram + kC * square;
    run(wide ? product_nn<T>(gram, x, next) : product_nn<T>(x, gram, next));
    x = kA * x + next;
  }
  return std::as_const(cache.x).view();
}

}  // namespace weir
