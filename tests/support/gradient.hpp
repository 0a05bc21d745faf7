// SPDX-License-Identifier: MIT
/// \file
/// Finite differences, the referee of every hand-written derivative.
#pragma once

#include <weir/core/layer.hpp>
#include <weir/core/types.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::test {

/// Central differences of the scalar `f()` with respect to each entry of `x`.
template <class F>
Matrix<double> numeric_gradient(Matrix<double>& x, F&& f, double step = 1e-5) {
  Matrix<double> g(x.rows(), x.cols());
  for (Index i = 0; i < x.size(); ++i) {
    const double saved = x.data()[i];
    x.data()[i] = saved + step;
    const double above = f();
    x.data()[i] = saved - step;
    const double below = f();
    x.data()[i] = saved;
    g.data()[i] = (above - below) / (2 * step);
  }
  return g;
}

/// `pass` as one that trains and tells `record`.
inline Pass recorded(Pass pass, PassRecord& record) {
  pass.training = true;
  pass.record = &record;
  return pass;
}

/// The auxiliary losses of a pass.
template <class L>
double aux_loss(const L& layer, const Matrix<typename L::Scalar>& x, Pass pass) {
  PassRecord record;
  pass.record = &record;
  typename L::Cache cache;
  layer.forward(x, pass, cache);
  return record.aux_loss();
}

/// Compares every gradient `layer` computes, of its input and of each parameter by name, with
/// finite differences of
///
///     sum(forward(x) * weight) + the auxiliary losses that the pass records
///
/// for a fixed random `weight`. The pass trains. `tolerance` is relative to the norm of each
/// gradient.
template <class L>
void check_gradients(L& layer, Matrix<double> x, const Pass& pass = {}, double tolerance = 1e-6) {
  PassRecord record;
  const Pass training = recorded(pass, record);
  typename L::Cache cache;
  const Matrix<double> weight = [&] {
    const Matrix<double>& y = layer.forward(x, training, cache);
    return random_matrix(y.rows(), y.cols(), 12345);
  }();
  const auto objective = [&] {
    typename L::Cache fresh;
    record.clear();
    const Matrix<double>& y = layer.forward(x, training, fresh);
    return y.cwiseProduct(weight).sum() + record.aux_loss();
  };

  zero_gradients(layer);
  layer.forward(x, training, cache);
  const Matrix<double> dx = layer.backward(weight, cache);
  {
    INFO("input");
    const Matrix<double> numeric = numeric_gradient(x, objective);
    CHECK(relative_error(dx, numeric) <= tolerance);
  }
  for (auto& [name, parameter] : parameters(layer)) {
    INFO("parameter " << name);
    const Matrix<double> analytic = parameter->gradient();
    const Matrix<double> numeric = numeric_gradient(parameter->value, objective);
    CHECK(relative_error(analytic, numeric) <= tolerance);
  }
}

}  // namespace weir::test
