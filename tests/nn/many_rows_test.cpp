// SPDX-License-Identifier: MIT
// Many rows are shared out in ranges, which are the same for any number of threads: what happens
// where one ends and the next begins shows only against the rows one by one.
#include <cstddef>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/core/verbs.hpp>
#include <weir/nn/embedding.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/layer_norm.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/nn/rms_norm.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::many_rows_test {
namespace {

constexpr Index kRows = 700;
constexpr Index kCols = 130;

/// All rows in one pass, against passes of a few rows each.
template <class L>
void check(L layer) {
  for (auto& [name, parameter] : parameters(layer)) {
    Matrix<double>& value = parameter->value;
    value += test::random_matrix(value.rows(), value.cols(), 3);
  }
  const Matrix<double> x = test::random_matrix(kRows, kCols, 1);
  typename L::Cache cache;
  const Matrix<double> y = layer.forward(x, kTraining, cache);
  const Matrix<double> dy = test::random_matrix(kRows, y.cols(), 2);
  const Matrix<double> dx = layer.backward(dy, cache);
  std::vector<Matrix<double>> gradients;
  for (const auto& [name, parameter] : parameters(layer)) gradients.push_back(parameter->grad);

  zero_gradients(layer);
  constexpr Index kFew = 7;
  for (Index t = 0; t < kRows; t += kFew) {
    INFO("row " << t);
    const Matrix<double> part = layer.forward(x.middleRows(t, kFew), kTraining, cache);
    CHECK(test::relative_error(y.middleRows(t, kFew), part) <= 1e-12);
    const Matrix<double> d_part = layer.backward(dy.middleRows(t, kFew), cache);
    CHECK(test::relative_error(dx.middleRows(t, kFew), d_part) <= 1e-12);
  }
  std::size_t i = 0;
  for (const auto& [name, parameter] : parameters(layer)) {
    INFO(name);
    CHECK(test::relative_error(gradients[i++], parameter->grad) <= 1e-11);
  }
}

}  // namespace

TEST_CASE("Many rows give what a few at a time give", "[nn][many_rows]") {
  Rng rng(5);
  check(RmsNorm<double>(kCols));
  check(LayerNorm<double>(kCols));
  check(Linear<double>(kCols, 40, rng, {.bias = true}));
  check(Glu<double>(kCols, 40, rng));
  check(Mlp<double>(kCols, 40, rng, {.bias = true}));
}

TEST_CASE("The gradient of an embedding is the sum over its tokens, however many",
          "[nn][embedding][many_rows]") {
  Rng rng(5);
  constexpr Index kWide = 300;  // Several ranges of columns.
  Embedding<double> layer(9, kWide, rng);
  std::vector<Index> ids(kRows);
  for (Index& id : ids) id = rng.below(9);
  Embedding<double>::Cache cache;
  const Matrix<double> y = layer.forward(ids, kTraining, cache);
  const Matrix<double> dy = test::random_matrix(kRows, kWide, 2);
  layer.backward(dy, cache);
  Matrix<double> expected = Matrix<double>::Zero(9, kWide);
  for (Index t = 0; t < kRows; ++t) {
    const Index id = ids[static_cast<std::size_t>(t)];
    CHECK(y.row(t) == layer.weight().value.row(id));
    expected.row(id) += dy.row(t);
  }
  CHECK(test::relative_error(layer.weight().grad, expected) <= 1e-13);
}

}  // namespace weir::many_rows_test
