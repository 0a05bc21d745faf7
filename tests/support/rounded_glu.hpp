// SPDX-License-Identifier: MIT
/// \file
/// A SwiGLU network in training with rounded products, computed in double from what the schemes say
/// and from nothing of the library.
#pragma once

#include <cmath>

#include <weir/core/precision.hpp>

#include "support/rounded_products.hpp"

namespace weir::test {

struct RoundedGlu {
  struct Gradients {
    Real x, gate, up, down;
  };

  RoundedGlu(Precision how, const Real& input, const Real& wg, const Real& wu, const Real& wd)
      : precision(how), x(input), w_gate(wg), w_up(wu), w_down(wd) {
    gate = forward(precision, x, w_gate);
    up = forward(precision, x, w_up);
    y = forward(precision, hidden(gate, up), w_down);
  }

  /// With what FP8 keeps of x, gate and up.
  Gradients backward(const Real& dy) const {
    const Real g = kept(precision, gate);
    const Real u = kept(precision, up);
    const Real dh = input_gradient(precision, dy, w_down);
    const Real slope = g.unaryExpr([](double z) {
      const double s = 1.0 / (1.0 + std::exp(-z));
      return s * (1.0 + z * (1.0 - s));
    });
    const Real d_gate = dh.cwiseProduct(u).cwiseProduct(slope);
    const Real d_up = dh.cwiseProduct(silu(g));
    const Real kept_x = kept(precision, x);
    return {input_gradient(precision, d_gate, w_gate) + input_gradient(precision, d_up, w_up),
            weight_gradient(precision, d_gate, kept_x), weight_gradient(precision, d_up, kept_x),
            weight_gradient(precision, dy, hidden(g, u))};
  }

  static Real silu(const Real& z) {
    return z.unaryExpr([](double v) { return v / (1.0 + std::exp(-v)); });
  }
  static Real hidden(const Real& gate, const Real& up) { return silu(gate).cwiseProduct(up); }

  Precision precision;
  Real x, w_gate, w_up, w_down;
  Real gate, up, y;
};

}  // namespace weir::test
