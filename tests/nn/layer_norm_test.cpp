// SPDX-License-Identifier: MIT
#include <vector>

#include <weir/core/layer.hpp>
#include <weir/nn/layer_norm.hpp>

#include "support/caches.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::layer_norm_test {

static_assert(Layer<LayerNorm<float>> && Layer<LayerNorm<double>>);

TEST_CASE("LayerNorm rows have zero mean and unit variance", "[nn][layer_norm]") {
  const auto d_model = GENERATE(as<Index>{}, 2, 8, 17, 100);
  const LayerNorm<double> layer(d_model, {.epsilon = 1e-12});
  const Matrix<double> x = test::random_matrix(4, d_model, 1);
  const Matrix<double> y = infer(layer, x);
  for (Index t = 0; t < 4; ++t) {
    CHECK(y.row(t).mean() == Approx(0.0).margin(1e-12));
    CHECK(y.row(t).squaredNorm() / static_cast<double>(d_model) == Approx(1.0));
  }
  const Matrix<double> moved = 7.0 * x.array() + 3.0;
  CHECK(test::relative_error(infer(layer, moved), y) <= 1e-9);
}

TEST_CASE("LayerNorm matches a row worked out by hand", "[nn][layer_norm]") {
  // Mean 2, deviations -1 and 1, variance 1; with epsilon 3 the root is 2.
  LayerNorm<double> layer(2, {.epsilon = 3.0});
  layer.weight().value << 1, 10;
  layer.bias().value << 100, 200;
  Matrix<double> x(1, 2);
  x << 1, 3;
  const Matrix<double> y = infer(layer, x);
  CHECK(y(0, 0) == Approx(99.5));
  CHECK(y(0, 1) == Approx(205.0));
}

TEST_CASE("LayerNorm gradients agree with finite differences", "[nn][layer_norm][gradient]") {
  const auto d_model = GENERATE(as<Index>{}, 2, 5, 19);
  const auto bias = GENERATE(false, true);
  LayerNorm<double> layer(d_model, {.epsilon = 0.1, .bias = bias});
  layer.weight().value = test::random_matrix(1, d_model, 3);
  if (bias) layer.bias().value = test::random_matrix(1, d_model, 4);
  test::check_gradients(layer, test::random_matrix(4, d_model, 2));
}

TEST_CASE("LayerNorm of a constant row is its bias, and its gradient finite", "[nn][layer_norm]") {
  LayerNorm<float> layer(6);
  LayerNorm<float>::Cache cache;
  CHECK(layer.forward(Matrix<float>::Constant(2, 6, 3.F), kTraining, cache).isZero());
  CHECK(layer.backward(Matrix<float>::Ones(2, 6), cache).allFinite());
}

TEST_CASE("LayerNorm forward is the same in training and in inference, and for no tokens",
          "[nn][layer_norm]") {
  const auto bias = GENERATE(false, true);
  LayerNorm<float> layer(33, {.bias = bias});
  LayerNorm<float>::Cache cache;
  for (const Index tokens : {5, 1, 0}) {
    const Matrix<float> x = test::random_matrix<float>(tokens, 33, 2);
    CHECK(layer.forward(x, kTraining, cache) == infer(layer, x));
    CHECK(layer.backward(x, cache).rows() == tokens);
  }
}

TEST_CASE("LayerNorm keeps nothing for backward in a pass that does not train",
          "[nn][layer_norm]") {
  const LayerNorm<float> layer(8);
  LayerNorm<float>::Cache cache;
  layer.forward(test::random_matrix<float>(5, 8, 2), Pass{}, cache);
  CHECK(cache.normal.size() == 0);
  CHECK(cache.inverse_std.size() == 0);
}

TEST_CASE("LayerNorm gives the same bits on one thread and on two", "[nn][layer_norm]") {
  if (hardware_threads() < 2) return;
  const auto run = [](int threads) {
    set_threads(threads);
    LayerNorm<float> layer(130);
    LayerNorm<float>::Cache cache;
    layer.forward(test::random_matrix<float>(500, 130, 2), kTraining, cache);
    layer.backward(test::random_matrix<float>(500, 130, 3), cache);
    set_threads(1);
    return std::vector<Matrix<float>>{cache.y, cache.dx, layer.weight().grad, layer.bias().grad};
  };
  CHECK(run(1) == run(2));
}

TEST_CASE("LayerNorm starts as ones and zeros", "[nn][layer_norm]") {
  LayerNorm<float> layer(5);
  const auto named = parameters(layer);
  REQUIRE(named.size() == 2);
  CHECK(named[0].name == "weight");
  CHECK(named[0].parameter->value == Matrix<float>::Ones(1, 5));
  CHECK(named[1].name == "bias");
  CHECK(named[1].parameter->value == Matrix<float>::Zero(1, 5));
  LayerNorm<float> plain(5, {.bias = false});
  CHECK(parameters(plain).size() == 1);
  CHECK(layer.config().epsilon == 1e-5);
  CHECK_FALSE(plain.has_bias());
}

TEST_CASE("LayerNorm says what is wrong", "[nn][layer_norm]") {
  LayerNorm<double> layer(4);
  CHECK(test::message_of<ShapeError>([&] { infer(layer, Matrix<double>(3, 5)); }) ==
        "LayerNorm::forward: x is [3, 5], expected [tokens, 4]");
  test::check_refused_caches(layer, test::random_matrix(2, 4, 1), "LayerNorm::backward");
  CHECK(test::message_of<ConfigError>([] { LayerNorm<double>(0); }) ==
        "LayerNorm: d_model = 0, expected > 0");
  CHECK(test::message_of<ConfigError>([] { LayerNorm<double>(4, {.epsilon = -1.0}); }) ==
        "LayerNorm: epsilon = -1, expected a finite number > 0");
}

}  // namespace weir::layer_norm_test
