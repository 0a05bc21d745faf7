// SPDX-License-Identifier: MIT
#include <vector>

#include <weir/core/layer.hpp>
#include <weir/nn/linear.hpp>

#include "support/caches.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::linear_test {

static_assert(Layer<Linear<float>> && Layer<Linear<double>>);

TEST_CASE("Linear matches a product worked out by hand", "[nn][linear]") {
  Matrix<double> weight(2, 3);
  weight << 1, 2, 3, 4, 5, 6;
  Matrix<double> bias(1, 2);
  bias << 10, 20;
  Matrix<double> x(1, 3);
  x << 1, 0, -1;  // Row 1: 1 - 3 = -2, row 2: 4 - 6 = -2.
  Matrix<double> y(1, 2);
  y << -2, -2;

  CHECK(infer(Linear<double>(weight), x) == y);
  y << 8, 18;
  CHECK(infer(Linear<double>(weight, bias), x) == y);
}

TEST_CASE("Linear gradients agree with finite differences", "[nn][linear][gradient]") {
  const auto tokens = GENERATE(as<Index>{}, 1, 5);
  const auto bias = GENERATE(false, true);
  Rng rng(1);
  Linear<double> layer(7, 19, rng, {.bias = bias});
  test::check_gradients(layer, test::random_matrix(tokens, 7, 2));
}

TEST_CASE("Linear adds to the gradients that are there", "[nn][linear]") {
  Rng rng(1);
  Linear<double> layer(4, 3, rng, {.bias = true});
  const Matrix<double> x = test::random_matrix(6, 4, 2);
  const Matrix<double> dy = test::random_matrix(6, 3, 3);
  Linear<double>::Cache cache;
  layer.forward(x, kTraining, cache);
  layer.backward(dy, cache);
  const Matrix<double> once = layer.weight().grad;
  const Matrix<double> bias_once = layer.bias().grad;
  layer.forward(x, kTraining, cache);
  layer.backward(dy, cache);
  CHECK(test::relative_error(layer.weight().grad, 2.0 * once) <= 1e-14);
  CHECK(test::relative_error(layer.bias().grad, 2.0 * bias_once) <= 1e-14);
}

TEST_CASE("Linear forward is the same in training and in inference, at any size", "[nn][linear]") {
  Rng rng(1);
  const Linear<float> layer(33, 20, rng, {.bias = true});
  Linear<float>::Cache cache;
  for (const Index tokens : {5, 0, 1, 9}) {
    const Matrix<float> x = test::random_matrix<float>(tokens, 33, 2);
    CHECK(layer.forward(x, kTraining, cache) == infer(layer, x));
    CHECK(cache.y.rows() == tokens);
  }
}

TEST_CASE("Linear keeps its memory from pass to pass", "[nn][linear]") {
  Rng rng(1);
  Linear<float> layer(8, 8, rng);
  const Matrix<float> x = test::random_matrix<float>(5, 8, 2);
  Linear<float>::Cache cache;
  const float* const y = layer.forward(x, kTraining, cache).data();
  const float* const dx = layer.backward(x, cache).data();
  CHECK(layer.forward(x, kTraining, cache).data() == y);
  CHECK(layer.backward(x, cache).data() == dx);
}

TEST_CASE("Linear keeps nothing for backward in a pass that does not train", "[nn][linear]") {
  Rng rng(1);
  const Linear<float> layer(8, 8, rng);
  Linear<float>::Cache cache;
  layer.forward(test::random_matrix<float>(5, 8, 2), Pass{}, cache);
  CHECK(cache.x.size() == 0);
}

TEST_CASE("Linear takes no tokens", "[nn][linear]") {
  Rng rng(1);
  Linear<double> layer(4, 3, rng, {.bias = true});
  Linear<double>::Cache cache;
  CHECK(layer.forward(Matrix<double>(0, 4), kTraining, cache).cols() == 3);
  const Matrix<double>& dx = layer.backward(Matrix<double>(0, 3), cache);
  CHECK(dx.rows() == 0);
  CHECK(dx.cols() == 4);
  CHECK(layer.weight().gradient().isZero());
}

TEST_CASE("Linear gives the same bits on one thread and on two", "[nn][linear]") {
  if (hardware_threads() < 2) return;
  const auto run = [](int threads) {
    set_threads(threads);
    Rng rng(1);
    Linear<float> layer(130, 200, rng, {.bias = true});
    Linear<float>::Cache cache;
    layer.forward(test::random_matrix<float>(300, 130, 2), kTraining, cache);
    layer.backward(test::random_matrix<float>(300, 200, 3), cache);
    set_threads(1);
    return std::vector<Matrix<float>>{cache.y, cache.dx, layer.weight().grad, layer.bias().grad};
  };
  CHECK(run(1) == run(2));
}

TEST_CASE("Linear names its parameters", "[nn][linear]") {
  Rng rng(1);
  Linear<float> plain(4, 3, rng);
  CHECK(parameters(plain).size() == 1);
  CHECK_FALSE(plain.has_bias());
  Linear<float> affine(4, 3, rng, {.bias = true});
  const auto named = parameters(affine);
  REQUIRE(named.size() == 2);
  CHECK(named[0].name == "weight");
  CHECK(named[1].name == "bias");
  CHECK(named[1].parameter->value.isZero());
  CHECK(parameter_count(affine) == 15);
}

TEST_CASE("Linear says what is wrong", "[nn][linear]") {
  Rng rng(1);
  Linear<double> layer(4, 3, rng);
  CHECK(test::message_of<ShapeError>([&] { infer(layer, Matrix<double>(3, 5)); }) ==
        "Linear::forward: x is [3, 5], expected [tokens, 4]");
  test::check_refused_caches(layer, test::random_matrix(2, 4, 1), "Linear::backward");
  CHECK(test::message_of<ConfigError>([&] { Linear<double>(0, 3, rng); }) ==
        "Linear: d_in = 0, expected > 0");
  CHECK(test::message_of<ConfigError>([&] { Linear<double>(3, -1, rng); }) ==
        "Linear: d_out = -1, expected > 0");
  CHECK(test::message_of<ShapeError>([&] {
          Linear<double>(Matrix<double>::Ones(3, 4), Matrix<double>::Ones(1, 4));
        }) == "Linear: bias is [1, 4], expected [1, 3]");
}

}  // namespace weir::linear_test
