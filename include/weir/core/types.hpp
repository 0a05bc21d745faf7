// SPDX-License-Identifier: MIT
/// \file
/// The matrix types that every other header uses.
#pragma once

#include <Eigen/Core>

namespace weir {

using Index = Eigen::Index;

/// Row-major matrix. Activations are [tokens, features]: one token, one row.
template <class T>
using Matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// One row: a bias, a norm's weight, one value per expert.
template <class T>
using RowVector = Eigen::Matrix<T, 1, Eigen::Dynamic>;

/// Read-only argument. Binds to a matrix, a block or a map without a copy.
template <class T>
using MatrixIn = const Eigen::Ref<const Matrix<T>>&;

/// Writable argument, already of the right shape.
template <class T>
using MatrixOut = Eigen::Ref<Matrix<T>>;

}  // namespace weir
