// SPDX-License-Identifier: MIT
/// \file
/// Least squares for quantities that cannot be negative, such as times.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include <Eigen/QR>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// The x >= 0 that minimises the relative errors of a linear model:
///
///     sum_i ((a_i x - y_i) / y_i)^2
///
/// a_i being row i of `features`. Relative errors, since a time of microseconds is as good a
/// measurement as one of seconds. The solution is that of least squares over the columns that it
/// does not leave at 0, which are found by trying all sets of columns: exact, and quick for a few.
/// Columns of zeros get 0.
///
/// \param features  [n, p], p <= 12.
/// \param y         [n], above 0.
/// \return          [p]
/// \throws ConfigError     if there are no rows, not as many as in `y`, too many columns, or a
///                         target is not positive.
/// \throws NonFiniteError  if a feature is not finite.
inline std::vector<double> fit_nonnegative(MatrixIn<double> features,
                                           const std::vector<double>& y) {
  constexpr Index kMostColumns = 12;
  const Index n = features.rows(), p = features.cols();
  expect_at_least<Index>("fit_nonnegative", "rows", n, 1);
  expect_in<Index>("fit_nonnegative", "columns", p, 1, kMostColumns);
  if (static_cast<Index>(y.size()) != n) {
    throw_error<ConfigError>("fit_nonnegative: there are ", y.size(), " targets, expected ", n,
                             ", one for each row");
  }
  for (const double target : y) expect_positive("fit_nonnegative", "target", target);
  if (!features.allFinite()) {
    throw_error<NonFiniteError>("fit_nonnegative: a feature is not finite");
  }

  // Columns of the same length, so that the rank does not depend on the units.
  Matrix<double> scaled = features;
  for (Index i = 0; i < n; ++i) scaled.row(i) /= y[static_cast<std::size_t>(i)];
  std::vector<double> length;
  for (Index j = 0; j < p; ++j) {
    length.push_back(scaled.col(j).norm());
    if (length.back() > 0.0) scaled.col(j) /= length.back();
  }
  const Eigen::VectorXd ones = Eigen::VectorXd::Ones(n);
  std::vector<double> best(static_cast<std::size_t>(p), 0.0);
  double least = ones.squaredNorm();
  for (unsigned set = 1; set < (1U << static_cast<unsigned>(p)); ++set) {
    std::vector<Index> columns;
    bool empty = false;
    for (Index j = 0; j < p; ++j) {
      if ((set >> static_cast<unsigned>(j) & 1U) == 0) continue;
      columns.push_back(j);
      empty = empty || length[static_cast<std::size_t>(j)] == 0.0;
    }
    if (empty || static_cast<Index>(columns.size()) > n) continue;
    Eigen::MatrixXd part(n, static_cast<Index>(columns.size()));
    for (std::size_t j = 0; j < columns.size(); ++j) {
      part.col(static_cast<Index>(j)) = scaled.col(columns[j]);
    }
    const Eigen::ColPivHouseholderQR<Eigen::MatrixXd> qr(part);
    if (qr.rank() < part.cols()) continue;  // One of the columns does without the others.
    const Eigen::VectorXd x = qr.solve(ones);
    if (x.minCoeff() < 0.0) continue;
    const double error = (part * x - ones).squaredNorm();
    if (error >= least - 1e-12) continue;  // Fewer columns are better, all else being equal.
    least = error;
    best.assign(static_cast<std::size_t>(p), 0.0);
    for (std::size_t j = 0; j < columns.size(); ++j) {
      const auto column = static_cast<std::size_t>(columns[j]);
      best[column] = x[static_cast<Index>(j)] / length[column];
    }
  }
  return best;
}

}  // namespace weir
