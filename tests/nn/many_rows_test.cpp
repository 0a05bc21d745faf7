// SPDX-License-Identifier: MIT
#include <cstddef>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/nn/embedding.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/layer_norm.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/nn/rms_norm.hpp>

#include "support/catch.hpp"
#include "support/few_at_a_time.hpp"
#include "support/matrices.hpp"

namespace weir::many_rows_test {

constexpr Index kCols = 130;

TEST_CASE("Many rows give what a few at a time give", "[nn][many_rows]") {
  Rng rng(5);
  test::check_many_rows(RmsNorm<double>(kCols), kCols);
  test::check_many_rows(LayerNorm<double>(kCols), kCols);
  test::check_many_rows(Linear<double>(kCols, 40, rng, {.bias = true}), kCols);
  test::check_many_rows(Glu<double>(kCols, 40, rng), kCols);
  test::check_many_rows(Mlp<double>(kCols, 40, rng, {.bias = true}), kCols);
}

TEST_CASE("The gradient of an embedding is the sum over its tokens, however many",
          "[nn][embedding][many_rows]") {
  Rng rng(5);
  constexpr Index kWide = 300;  // Several ranges of columns.
  Embedding<double> layer(9, kWide, rng);
  constexpr Index kTokens = 700;
  std::vector<Index> ids(kTokens);
  for (Index& id : ids) id = rng.below(9);
  Embedding<double>::Cache cache;
  const Matrix<double> y = layer.forward(ids, kTraining, cache);
  const Matrix<double> dy = test::random_matrix(kTokens, kWide, 2);
  layer.backward(dy, cache);
  Matrix<double> expected = Matrix<double>::Zero(9, kWide);
  for (Index t = 0; t < kTokens; ++t) {
    const Index id = ids[static_cast<std::size_t>(t)];
    CHECK(y.row(t) == layer.weight().value.row(id));
    expected.row(id) += dy.row(t);
  }
  CHECK(test::relative_error(layer.weight().grad, expected) <= 1e-13);
}

}  // namespace weir::many_rows_test
