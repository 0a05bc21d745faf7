// SPDX-License-Identifier: MIT
// expects: a layer has const Matrix<T>& forward(MatrixIn<T> x, const Pass&, Cache&) const
#include <weir/model/any_layer.hpp>

struct NoLayer {
  using Scalar = float;
  struct Cache {};
#ifdef WEIR_CORRECTED
  const weir::Matrix<float>& forward(weir::MatrixIn<float>, const weir::Pass&, Cache&) const {
    return m;
  }
#endif
  const weir::Matrix<float>& backward(weir::MatrixIn<float>, Cache&) {
    return m;
  }
  template <class Self, class Visit>
  static void visit(Self&, Visit&) {}
  weir::Matrix<float> m;
};

weir::AnyLayer<float> wrap() {
  return NoLayer();
}
