// SPDX-License-Identifier: MIT
/// \file
/// The matrix types that every other header uses.
#pragma once

#include <Eigen/Core>

#include <weir/core/aligned.hpp>

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "weir does not compile with -ffast-math or -ffinite-math-only: its checks for NaN would go"
#endif

namespace weir {

using Index = Eigen::Index;

/// Row-major matrix. Activations are [tokens, features]: one token, one row.
template <class T>
using Matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// One row: a bias, a norm's weight, one value per expert.
template <class T>
using RowVector = Eigen::Matrix<T, 1, Eigen::Dynamic>;

/// Makes `m` [rows, cols], contents unspecified, in huge pages where it is large. If memory runs
/// out, `m` is empty, and the exception goes on. (Eigen's own `resize` then leaves a matrix that
/// points to memory it has freed.)
template <class M>
void set_shape(Eigen::PlainObjectBase<M>& m, Index rows, Index cols) {
  const bool renewed = rows * cols != m.size();
  if (renewed) M().swap(m.derived());
  m.resize(rows, cols);
  if (renewed) {
    prefer_huge_pages(m.data(), static_cast<std::size_t>(m.size()) * sizeof(*m.data()));
  }
}

/// Gives the vector `v` the length `size`, as above.
template <class V>
void set_shape(Eigen::PlainObjectBase<V>& v, Index size) {
  if (size != v.size()) V().swap(v.derived());
  v.resize(size);
}

/// Makes `m` zeros, [rows, cols]. If memory runs out, `m` is empty.
template <class M>
void set_zero(Eigen::PlainObjectBase<M>& m, Index rows, Index cols) {
  set_shape(m, rows, cols);
  m.setZero();
}

/// Makes `v` a vector of `size` zeros, as above.
template <class V>
void set_zero(Eigen::PlainObjectBase<V>& v, Index size) {
  set_shape(v, size);
  v.setZero();
}

/// m = values. If memory runs out, `m` is empty.
template <class M, class Values>
void assign(Eigen::PlainObjectBase<M>& m, const Eigen::MatrixBase<Values>& values) {
  set_shape(m, values.rows(), values.cols());
  m.derived() = values;
}

/// Read-only argument. Binds to a matrix, a block or a map without a copy.
template <class T>
using MatrixIn = const Eigen::Ref<const Matrix<T>>&;

/// Writable argument, already of the right shape.
template <class T>
using MatrixOut = Eigen::Ref<Matrix<T>>;

}  // namespace weir
