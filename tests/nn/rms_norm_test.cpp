// SPDX-License-Identifier: MIT
#include <vector>

#include <weir/core/layer.hpp>
#include <weir/nn/rms_norm.hpp>

#include "support/caches.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::rms_norm_test {

static_assert(Layer<RmsNorm<float>> && Layer<RmsNorm<double>>);

TEST_CASE("RmsNorm rows have unit root mean square, whatever their scale", "[nn][rms_norm]") {
  const auto d_model = GENERATE(as<Index>{}, 1, 8, 17, 100);
  const RmsNorm<double> layer(d_model, {.epsilon = 1e-12});
  const Matrix<double> x = test::random_matrix(4, d_model, 1);
  const Matrix<double> y = infer(layer, x);
  for (Index t = 0; t < 4; ++t) {
    CHECK(y.row(t).squaredNorm() / static_cast<double>(d_model) == Approx(1.0));
  }
  CHECK(test::relative_error(infer(layer, 7.0 * x), y) <= 1e-9);
}

TEST_CASE("RmsNorm matches a row worked out by hand", "[nn][rms_norm]") {
  // mean(x^2) = (9 + 16) / 2 = 12.5; with epsilon 3.5 the root is 4.
  RmsNorm<double> layer(2, {.epsilon = 3.5});
  layer.weight().value << 1, 10;
  Matrix<double> x(1, 2);
  x << 3, -4;
  const Matrix<double> y = infer(layer, x);
  CHECK(y(0, 0) == Approx(0.75));
  CHECK(y(0, 1) == Approx(-10.0));
}

TEST_CASE("RmsNorm gradients agree with finite differences", "[nn][rms_norm][gradient]") {
  const auto d_model = GENERATE(as<Index>{}, 1, 5, 19);
  RmsNorm<double> layer(d_model, {.epsilon = 0.1});
  layer.weight().value = test::random_matrix(1, d_model, 3);
  test::check_gradients(layer, test::random_matrix(4, d_model, 2));
}

TEST_CASE("RmsNorm of a row of zeros is zeros, and so is its gradient finite", "[nn][rms_norm]") {
  RmsNorm<float> layer(6);
  RmsNorm<float>::Cache cache;
  CHECK(layer.forward(Matrix<float>::Zero(2, 6), kTraining, cache).isZero());
  CHECK(layer.backward(Matrix<float>::Ones(2, 6), cache).allFinite());
}

TEST_CASE("RmsNorm forward is the same in training and in inference, and for no tokens",
          "[nn][rms_norm]") {
  RmsNorm<float> layer(33);
  RmsNorm<float>::Cache cache;
  for (const Index tokens : {5, 1, 0}) {
    const Matrix<float> x = test::random_matrix<float>(tokens, 33, 2);
    CHECK(layer.forward(x, kTraining, cache) == infer(layer, x));
    CHECK(layer.backward(x, cache).rows() == tokens);
  }
}

TEST_CASE("RmsNorm keeps nothing for backward in a pass that does not train", "[nn][rms_norm]") {
  const RmsNorm<float> layer(8);
  RmsNorm<float>::Cache cache;
  layer.forward(test::random_matrix<float>(5, 8, 2), Pass{}, cache);
  CHECK(cache.x.size() == 0);
  CHECK(cache.inverse_rms.size() == 0);
}

TEST_CASE("RmsNorm gives the same bits on one thread and on two", "[nn][rms_norm]") {
  if (hardware_threads() < 2) return;
  const auto run = [](int threads) {
    set_threads(threads);
    RmsNorm<float> layer(130);
    RmsNorm<float>::Cache cache;
    layer.forward(test::random_matrix<float>(500, 130, 2), kTraining, cache);
    layer.backward(test::random_matrix<float>(500, 130, 3), cache);
    set_threads(1);
    return std::vector<Matrix<float>>{cache.y, cache.dx, layer.weight().grad};
  };
  CHECK(run(1) == run(2));
}

TEST_CASE("RmsNorm starts as ones under one name", "[nn][rms_norm]") {
  RmsNorm<float> layer(5);
  const auto named = parameters(layer);
  REQUIRE(named.size() == 1);
  CHECK(named[0].name == "weight");
  CHECK(named[0].parameter->value == Matrix<float>::Ones(1, 5));
  CHECK(layer.config().epsilon == 1e-5);
}

TEST_CASE("RmsNorm says what is wrong", "[nn][rms_norm]") {
  RmsNorm<double> layer(4);
  CHECK(test::message_of<ShapeError>([&] { infer(layer, Matrix<double>(3, 5)); }) ==
        "RmsNorm::forward: x is [3, 5], expected [tokens, 4]");
  test::check_refused_caches(layer, test::random_matrix(2, 4, 1), "RmsNorm::backward");
  CHECK(test::message_of<ConfigError>([] { RmsNorm<double>(0); }) ==
        "RmsNorm: d_model = 0, expected > 0");
  CHECK(test::message_of<ConfigError>([] { RmsNorm<double>(4, {.epsilon = 0.0}); }) ==
        "RmsNorm: epsilon = 0, expected a finite number > 0");
}

}  // namespace weir::rms_norm_test
