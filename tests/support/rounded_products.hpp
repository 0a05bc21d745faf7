// SPDX-License-Identifier: MIT
/// \file
/// Products with rounded operands, computed in double from what the schemes say and from nothing of
/// the library: bfloat16, and FP8 as DeepSeek-V3 trains with it (arXiv:2412.19437, section 3.3).
#pragma once

#include <algorithm>
#include <cmath>

#include <weir/core/precision.hpp>
#include <weir/core/types.hpp>

namespace weir::test {

using Real = Matrix<double>;

/// The nearest number with `bits` bits of significand whose last bit is worth at least 2^`least`.
inline double nearest(double x, int bits, int least) {
  if (x == 0.0) return x;
  const double step = std::exp2(std::max(std::ilogb(x) - bits + 1, least));
  return std::nearbyint(x / step) * step;  // Ties to even.
}

inline double nearest_bfloat16(double x) {
  return nearest(x, 8, -133);
}

inline double nearest_e4m3(double x) {
  return std::clamp(nearest(x, 4, -9), -448.0, 448.0);
}

/// x rounded to FP8 and back, with a scale for each tile [height, width].
inline Real in_fp8(const Real& x, Index height, Index width, bool power_of_two) {
  Real rounded(x.rows(), x.cols());
  for (Index i = 0; i < x.rows(); i += height) {
    for (Index j = 0; j < x.cols(); j += width) {
      const Index rows = std::min(height, x.rows() - i);
      const Index cols = std::min(width, x.cols() - j);
      const auto tile = x.block(i, j, rows, cols);
      const auto most = static_cast<float>(tile.cwiseAbs().maxCoeff());
      float scale = most == 0.0F ? 1.0F : std::max(most / 448.0F, 0x1p-126F);
      if (power_of_two) scale = std::exp2(std::ceil(std::log2(scale)));
      rounded.block(i, j, rows, cols) = tile.unaryExpr([&](double number) {
        return nearest_e4m3(static_cast<float>(number) / scale) * static_cast<double>(scale);
      });
    }
  }
  return rounded;
}

inline Real in_bfloat16(const Real& x) {
  return x.unaryExpr([](double number) { return nearest_bfloat16(number); });
}

/// A matrix as one of the three products takes it.
inline Real of_tokens(Precision precision, const Real& x) {
  if (precision == Precision::kFull) return x;
  return precision == Precision::kFp8 ? in_fp8(x, 1, 128, true) : in_bfloat16(x);
}
inline Real of_gradient(Precision precision, const Real& dy) {
  if (precision == Precision::kFull) return dy;
  return precision == Precision::kFp8 ? in_fp8(dy, 1, 128, false) : in_bfloat16(dy);
}
inline Real of_weight(Precision precision, const Real& w) {
  if (precision == Precision::kFull) return w;
  return precision == Precision::kFp8 ? in_fp8(w, 128, 128, false) : in_bfloat16(w);
}

/// y = x W^T
inline Real forward(Precision precision, const Real& x, const Real& w) {
  return of_tokens(precision, x) * of_weight(precision, w).transpose();
}
/// dx = dy W
inline Real input_gradient(Precision precision, const Real& dy, const Real& w) {
  return of_gradient(precision, dy) * of_weight(precision, w);
}
/// dW = dy^T x, tiles along the tokens.
inline Real weight_gradient(Precision precision, const Real& dy, const Real& x) {
  if (precision != Precision::kFp8) {
    return of_gradient(precision, dy).transpose() * of_tokens(precision, x);
  }
  return in_fp8(dy, 128, 1, false).transpose() * in_fp8(x, 128, 1, true);
}
/// What a layer keeps of x for `weight_gradient`.
inline Real kept(Precision precision, const Real& x) {
  return precision == Precision::kFp8 ? in_fp8(x, 1, 128, true) : x;
}

}  // namespace weir::test
