// SPDX-License-Identifier: MIT
/// \file
/// Scaling rows to length one, and the derivative.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// The Euclidean norm of `count` numbers, computed from their ratios to the largest magnitude: it
/// does not overflow or vanish where the norm itself would not. Beyond the largest number it is
/// that number.
template <class T>
T safe_norm(Index count, const T* numbers) {
  constexpr T kMost = std::numeric_limits<T>::max();
  const T squares = loops::sum_of_squares(count, numbers);
  // Nothing is lost between the two.
  if (squares > std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon() &&
      squares <= kMost) {
    return std::sqrt(squares);
  }
  T largest = T(0);
  for (Index i = 0; i < count; ++i) largest = std::max(largest, std::abs(numbers[i]));
  if (largest == T(0) || !(largest <= kMost)) return largest;
  T sum = T(0);
  for (Index i = 0; i < count; ++i) sum += (numbers[i] / largest) * (numbers[i] / largest);
  return std::min(largest * std::sqrt(sum), kMost);
}

/// unit[i] = rows[i] / |rows[i]|, norm[i] = |rows[i]|. A row whose norm is below the least normal
/// number of T counts as zero: its unit vector and its norm are zero.
/// \param unit     Of the shape of `rows`, which it must not overlap.
/// \param norm     One number for each row.
/// \throws ShapeError   if the shapes differ.
template <class T>
void unit_rows(MatrixIn<T> rows, MatrixOut<T> unit, T* norm) {
  expect_shape("unit_rows", "unit", unit, rows.rows(), rows.cols());
  constexpr T kLeast = std::numeric_limits<T>::min();
  parallel_rows(rows.rows(), 4 * rows.cols(), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      const T* row = &rows.coeffRef(i, 0);
      norm[i] = safe_norm<T>(rows.cols(), row);
      if (norm[i] < kLeast) norm[i] = T(0);
      const T factor = norm[i] == T(0) ? T(0) : T(1) / norm[i];
      loops::scale(rows.cols(), factor, row, &unit(i, 0));
    }
  });
}

/// The derivative of `unit_rows`, in place: d <- (d - (d . unit) unit) / norm for each row; zero
/// for a row that counts as zero.
/// \param d        The gradient with respect to `unit`, which becomes that of the rows; of the same
///                 shape.
/// \throws ShapeError   if the shapes differ.
template <class T>
void unit_rows_backward(MatrixIn<T> unit, const T* norm, MatrixOut<T> d) {
  expect_shape("unit_rows_backward", "d", d, unit.rows(), unit.cols());
  parallel_rows(d.rows(), 4 * d.cols(), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      const T along = loops::dot<T>(d.cols(), &d(i, 0), &unit.coeffRef(i, 0));
      const T factor = norm[i] == T(0) ? T(0) : T(1) / norm[i];
      const auto f = [=](const Lanes<T>& a, const Lanes<T>& b) -> Lanes<T> {
        return factor * (a - along * b);
      };
      map_lanes<T>(d.cols(), f, &d(i, 0), &d(i, 0), &unit.coeffRef(i, 0));
    }
  });
}

}  // namespace weir
