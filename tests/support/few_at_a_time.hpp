// SPDX-License-Identifier: MIT
/// \file
/// Whether a layer that looks at each row by itself does so however many there are.
#pragma once

#include <cstddef>
#include <vector>

#include <weir/core/layer.hpp>
#include <weir/core/verbs.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::test {

/// Gives a layer many rows in one pass, which are shared out in ranges, and a few at a time, and
/// compares outputs and gradients. Ranges are the same for any number of threads: what happens
/// where one ends and the next begins shows only so.
template <class L>
void check_many_rows(L layer, Index cols) {
  constexpr Index kRows = 700;
  constexpr Index kFew = 7;
  for (auto& [name, parameter] : parameters(layer)) {
    Matrix<double>& value = parameter->value;
    value += random_matrix(value.rows(), value.cols(), 3);
  }
  const Matrix<double> x = random_matrix(kRows, cols, 1);
  typename L::Cache cache;
  const Matrix<double> y = layer.forward(x, kTraining, cache);
  const Matrix<double> dy = random_matrix(kRows, y.cols(), 2);
  const Matrix<double> dx = layer.backward(dy, cache);
  std::vector<Matrix<double>> gradients;
  for (const auto& [name, parameter] : parameters(layer)) gradients.push_back(parameter->grad);

  zero_gradients(layer);
  for (Index t = 0; t < kRows; t += kFew) {
    INFO("row " << t);
    const Matrix<double> part = layer.forward(x.middleRows(t, kFew), kTraining, cache);
    CHECK(relative_error(y.middleRows(t, kFew), part) <= 1e-12);
    const Matrix<double> d_part = layer.backward(dy.middleRows(t, kFew), cache);
    CHECK(relative_error(dx.middleRows(t, kFew), d_part) <= 1e-12);
  }
  std::size_t i = 0;
  for (const auto& [name, parameter] : parameters(layer)) {
    INFO(name);
    CHECK(relative_error(gradients[i++], parameter->grad) <= 1e-11);
  }
}

}  // namespace weir::test
