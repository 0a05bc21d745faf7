// SPDX-License-Identifier: MIT
/// \file
/// Matrices that are kept in FP8.
#pragma once

#include <cstdint>
#include <type_traits>

#include <weir/core/parallel.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/core/workspace.hpp>
#include <weir/kernels/e4m3_lanes.hpp>

namespace weir::kernels {

/// What a layer keeps of a forward pass for `backward` where it is trained in Precision::kFp8: a
/// matrix of floats as E4M3 codes, 1 x 128 of them with a power of two as their scale, in a quarter
/// of the memory. Numbers rounded like that once stay as they are. (arXiv:2412.19437, section
/// 3.3.3.)
template <class T>
class E4M3Rows {
 public:
  /// Keeps x, or nothing unless `keeps`.
  void set(MatrixIn<T> x, bool keeps = true);

  /// Whether something is kept.
  bool any() const { return any_; }

  /// What is kept, in memory of `frame`.
  Eigen::Map<Matrix<T>> restored(Workspace::Frame& frame) const;

  /// What is kept, or `exact` if nothing is.
  Eigen::Ref<const Matrix<T>> or_else(const Matrix<T>& exact, Workspace::Frame& frame) const {
    if (!any_) return exact;
    return restored(frame);
  }

 private:
  Index tiles() const { return (codes_.cols() + kTile - 1) / kTile; }

  Scratch<std::uint8_t> codes_;
  Scratch<float> scales_;  // [rows, tiles]
  bool any_ = false;
};

template <class T>
void E4M3Rows<T>::set(MatrixIn<T> x, bool keeps) {
  any_ = keeps;
  if constexpr (std::is_same_v<T, float>) {
    if (!keeps) return;
    auto codes = codes_.reshape(x.rows(), x.cols());
    auto scales = scales_.reshape(x.rows(), tiles());
    parallel_rows(x.rows(), 4 * x.cols(), [&](Index first, Index last) {
      for (Index i = first; i < last; ++i) {
        encode_e4m3_row(x.cols(), x.data() + i * x.outerStride(), &codes(i, 0), &scales(i, 0));
      }
    });
  }
}

template <class T>
Eigen::Map<Matrix<T>> E4M3Rows<T>::restored(Workspace::Frame& frame) const {
  auto to = frame.matrix<T>(codes_.rows(), codes_.cols());
  if constexpr (std::is_same_v<T, float>) {
    parallel_rows(to.rows(), 2 * to.cols(), [&](Index first, Index last) {
      for (Index i = first; i < last; ++i) {
        decode_e4m3_row(to.cols(), codes_.data() + i * to.cols(), scales_.data() + i * tiles(),
                        &to(i, 0));
      }
    });
  }
  return to;
}

}  // namespace weir::kernels

#ifdef WEIR_COMPILED
extern template class weir::kernels::E4M3Rows<float>;
extern template class weir::kernels::E4M3Rows<double>;
#endif
