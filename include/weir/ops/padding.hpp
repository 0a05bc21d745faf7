// SPDX-License-Identifier: MIT
/// \file
/// Rows of padding, which may hold anything and reach nothing.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// Makes the rows of padding zero.
/// \param mask  One byte per row, 0 for padding; or empty.
template <class T>
void clear_padding(std::span<const std::uint8_t> mask, MatrixOut<T> rows) {
  if (mask.empty()) return;
  for (Index t = 0; t < rows.rows(); ++t) {
    if (element(mask, t) == 0) rows.row(t).setZero();
  }
}

/// `rows`, or a copy of them in `space` in which padding is zero: 0 * NaN would spoil sums over
/// rows, such as gradients of weights.
template <class T>
Eigen::Ref<const Matrix<T>> without_padding(MatrixIn<T> rows, std::span<const std::uint8_t> mask,
                                            Matrix<T>& space) {
  if (mask.empty()) return rows;
  copy_rows<T>(rows, space);
  clear_padding<T>(mask, space);
  return space;
}

/// Which rows of a pass are padding, kept in a layer's cache for the backward pass.
///
/// All layers have one rule: what stands in a row of padding is not read, neither in x nor in dy,
/// the result has zeros there, and so has the gradient of x. Residual connections, of a Block and
/// of MixtureOfDepths, are the exception: they hand rows of padding on as they are.
class PaddingRows {
 public:
  /// Copies the mask of `pass`.
  /// \throws ShapeError   unless it covers `rows` rows.
  void set(std::string_view where, const Pass& pass, Index rows) {
    Pass{.mask = pass.mask}.check(where, rows);
    mask_.assign(pass.mask.begin(), pass.mask.end());
  }

  /// As in Pass: one byte per row, 0 for padding; empty if there is none.
  std::span<const std::uint8_t> mask() const { return mask_; }
  bool contains(Index row) const { return !mask_.empty() && mask_[row] == 0; }

  /// Makes the rows of padding zero.
  template <class T>
  void clear(Matrix<T>& rows) const {
    clear_padding<T>(mask(), rows);
  }

  /// `rows`, or a copy of them in `space` in which padding is zero.
  template <class T>
  Eigen::Ref<const Matrix<T>> cleared(MatrixIn<T> rows, Matrix<T>& space) const {
    return without_padding<T>(rows, mask(), space);
  }

 private:
  List<std::uint8_t> mask_;
};

}  // namespace weir
