// SPDX-License-Identifier: MIT
/// \file
/// What a matrix product is of.
#pragma once

#include <cstdint>

#include <weir/core/parameter.hpp>
#include <weir/core/precision.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// What a and b of a product are, which decides about their scales in FP8, see Precision.
enum class Operands : std::uint8_t {
  kTokensAndWeight,    ///< y = x W^T
  kGradientAndWeight,  ///< dx = dy W
  kGradientAndTokens,  ///< dW = dy^T x
};

/// One matrix product. Strides describe the operands, so that a transposed one needs no copy:
///
///     out[i, j] = sum_p a[i, p] b[p, j]           (added to out[i, j] if `accumulate`)
///
/// with a[i, p] at `a + i * a_row + p * a_col`, b[p, j] at `b + p * b_row + j * b_col` and out[i,
/// j] at `out + i * out_row + j`. `out` must not overlap the operands. With less than full
/// precision the operands are rounded first, according to what they are; doubles never are.
template <class T>
struct Product {
  Index m = 0, n = 0, k = 0;
  const T* a = nullptr;
  Index a_row = 0, a_col = 0;
  const T* b = nullptr;
  Index b_row = 0, b_col = 0;
  T* out = nullptr;
  Index out_row = 0;
  bool accumulate = false;
  const RoundedProducts* rounded = nullptr;  ///< Null in full precision.
  Operands operands = Operands::kTokensAndWeight;
};

/// The product out (+)= a b^T, for example tokens [m, k] times a weight [n, k].
template <class T>
Product<T> product_nt(MatrixIn<T> a, MatrixIn<T> b, MatrixOut<T> out, bool accumulate = false) {
  return {a.rows(), b.rows(), a.cols(),        a.data(),   a.outerStride(),   1,
          b.data(), 1,        b.outerStride(), out.data(), out.outerStride(), accumulate};
}

/// The product out (+)= a b, for example a gradient [m, k] times a weight [k, n].
template <class T>
Product<T> product_nn(MatrixIn<T> a, MatrixIn<T> b, MatrixOut<T> out, bool accumulate = false) {
  return {a.rows(), b.cols(),        a.cols(), a.data(),   a.outerStride(),   1,
          b.data(), b.outerStride(), 1,        out.data(), out.outerStride(), accumulate};
}

/// The product out (+)= a^T b, for example a gradient [k, m] times tokens [k, n].
template <class T>
Product<T> product_tn(MatrixIn<T> a, MatrixIn<T> b, MatrixOut<T> out, bool accumulate = false) {
  return {a.cols(), b.cols(),        a.rows(),          a.data(),
          1,        a.outerStride(), b.data(),          b.outerStride(),
          1,        out.data(),      out.outerStride(), accumulate};
}

/// The value of a weight, a parameter's or one that is somewhere else, and the precision of its
/// products.
template <class T>
struct WeightValue {
  Eigen::Map<const Matrix<T>> value;
  const RoundedProducts* rounded = nullptr;

  static WeightValue of(const Parameter<T>& weight) {
    const Matrix<T>& value = weight.value;
    return {{value.data(), value.rows(), value.cols()}, weight.rounded};
  }
};

/// y = x W^T, in the precision of W, which is a Parameter or a WeightValue.
template <class T, class Weight>
Product<T> forward_product(MatrixIn<T> x, const Weight& weight, MatrixOut<T> y) {
  Product<T> product = product_nt<T>(x, weight.value, y);
  product.rounded = weight.rounded;
  return product;
}

/// dx = dy W, or is increased by it, in the precision of W, likewise.
template <class T, class Weight>
Product<T> input_gradient_product(MatrixIn<T> dy, const Weight& weight, MatrixOut<T> dx,
                                  bool accumulate = false) {
  Product<T> product = product_nn<T>(dy, weight.value, dx, accumulate);
  product.rounded = weight.rounded;
  product.operands = Operands::kGradientAndWeight;
  return product;
}

/// Adds dy^T x to the gradient of W, in the precision of W.
template <class T>
Product<T> weight_gradient_product(MatrixIn<T> dy, MatrixIn<T> x, Parameter<T>& weight) {
  Product<T> product = product_tn<T>(dy, x, weight.gradient(), true);
  product.rounded = weight.rounded;
  product.operands = Operands::kGradientAndTokens;
  return product;
}

}  // namespace weir
