// SPDX-License-Identifier: MIT
// expects: a layer has template <class Self, class Visit> static void visit(Self&, Visit&)
#include <weir/model/any_layer.hpp>

struct NoLayer {
  using Scalar = float;
  struct Cache {};
  const weir::Matrix<float>& forward(weir::MatrixIn<float>, const weir::Pass&, Cache&) const {
    return m;
  }
  const weir::Matrix<float>& backward(weir::MatrixIn<float>, Cache&) { return m; }
#ifdef WEIR_CORRECTED
  template <class Self, class Visit>
  static void visit(Self&, Visit&) {}
#endif
  weir::Matrix<float> m;
};

weir::AnyLayer<float> wrap() {
  return NoLayer();
}
