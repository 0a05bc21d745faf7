// SPDX-License-Identifier: MIT
// expects: the layer's Scalar is not that of AnyLayer
#include <weir/model/any_layer.hpp>
#include <weir/nn/rms_norm.hpp>

#ifdef WEIR_CORRECTED
using Norm = weir::RmsNorm<float>;
#else
using Norm = weir::RmsNorm<double>;
#endif

weir::AnyLayer<float> wrap() {
  return Norm(4);
}
