// SPDX-License-Identifier: MIT
/// \file
/// Which neurons of one feed-forward network correspond to which of another.
#pragma once

#include <cstddef>
#include <limits>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// The assignment of rows to columns, one to one, of the largest sum of values:
///
///     max over permutations p of sum_i value(i, p_i)
///
/// by shortest augmenting paths in O(n^3). Of several best assignments it is always the same one.
/// (Kuhn 1955, doi:10.1002/nav.3800020109; Jonker and Volgenant 1987, doi:10.1007/BF02278710.)
/// \param value    [n, n], finite.
/// \return         p, n numbers.
/// \throws ShapeError      unless it is square.
/// \throws NonFiniteError  if a value is not finite.
inline std::vector<Index> best_assignment(const Matrix<double>& value) {
  const Index n = value.rows();
  expect_shape("best_assignment", "value", value, n, n);
  if (!value.allFinite()) {
    throw_error<NonFiniteError>("best_assignment: value is not finite, expected finite numbers");
  }
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto count = static_cast<std::size_t>(n) + 1;
  // Number 0 is none: rows and columns count from 1.
  std::vector<double> of_row(count), of_column(count);  // The dual variables.
  std::vector<Index> row_of(count, 0), before(count, 0);
  const auto at = [](Index i) { return static_cast<std::size_t>(i); };
  for (Index row = 1; row <= n; ++row) {
    std::vector<double> slack(count, kInfinity);
    std::vector<bool> done(count, false);
    Index column = 0;
    row_of[0] = row;
    do {
      done[at(column)] = true;
      const Index i = row_of[at(column)];
      double least = kInfinity;
      Index next = 0;
      for (Index j = 1; j <= n; ++j) {
        if (done[at(j)]) continue;
        const double cost = -value(i - 1, j - 1) - of_row[at(i)] - of_column[at(j)];
        if (cost < slack[at(j)]) {
          slack[at(j)] = cost;
          before[at(j)] = column;
        }
        if (slack[at(j)] < least) {
          least = slack[at(j)];
          next = j;
        }
      }
      for (Index j = 0; j <= n; ++j) {
        if (done[at(j)]) {
          of_row[at(row_of[at(j)])] += least;
          of_column[at(j)] -= least;
        } else {
          slack[at(j)] -= least;
        }
      }
      column = next;
    } while (row_of[at(column)] != 0);
    while (column != 0) {
      row_of[at(column)] = row_of[at(before[at(column)])];
      column = before[at(column)];
    }
  }
  std::vector<Index> assignment(static_cast<std::size_t>(n));
  for (Index j = 1; j <= n; ++j) assignment[at(row_of[at(j)] - 1)] = j - 1;
  return assignment;
}

}  // namespace weir
