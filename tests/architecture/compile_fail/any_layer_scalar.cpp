// SPDX-License-Identifier: MIT
// expects: a layer has a type Scalar
#include <weir/model/any_layer.hpp>

struct NoLayer {
#ifdef WEIR_CORRECTED
  using Scalar = float;
#endif
  struct Cache {};
  const weir::Matrix<float>& forward(weir::MatrixIn<float>, const weir::Pass&, Cache&) const {
    return m;
  }
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
