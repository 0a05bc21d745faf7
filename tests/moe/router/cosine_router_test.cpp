// SPDX-License-Identifier: MIT
#include <cmath>
#include <limits>

#include <weir/moe/concepts.hpp>
#include <weir/moe/router/cosine_router.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::cosine_router_test {

static_assert(Router<CosineRouter<float>>);

namespace {

CosineRouter<double> make_router(bool bias = true, double temperature = 0.5) {
  Rng rng(1);
  CosineRouter<double> router(5, 4, rng,
                              {.d_projection = 3, .bias = bias, .temperature = temperature});
  router.embedding().value = test::random_matrix(4, 3, 2);
  if (bias) router.projection().bias().value = test::random_matrix(1, 3, 3);
  return router;
}

}  // namespace

TEST_CASE("CosineRouter matches cosines worked out by hand", "[moe][router][cosine_router]") {
  // u = (3, 4); the embeddings are along, across and against (3, 4).
  Rng rng(4);
  CosineRouter<double> router(2, 4, rng, {.d_projection = 2, .bias = false, .temperature = 0.25});
  router.projection().weight().value << 3.0, 0.0, 0.0, 2.0;
  router.embedding().value << 6.0, 8.0, -4.0, 3.0, -0.3, -0.4, 1.0, 0.0;
  Matrix<double> x(1, 2);
  x << 1.0, 2.0;
  const Matrix<double> logits = infer(router, x);
  CHECK(logits(0, 0) == Approx(4.0));
  CHECK(logits(0, 1) == Approx(0.0).margin(1e-14));
  CHECK(logits(0, 2) == Approx(-4.0));
  CHECK(logits(0, 3) == Approx(4.0 * 0.6));
  CHECK(router.temperature() == Approx(0.25));
}

TEST_CASE("CosineRouter does not see how long a token is", "[moe][router][cosine_router]") {
  const auto router = make_router(false);
  const Matrix<double> x = test::random_matrix(6, 5, 5);
  CHECK(test::relative_error(infer(router, 10.0 * x), infer(router, x)) <= 1e-14);
  CHECK(infer(router, x).cwiseAbs().maxCoeff() <= 2.0 + 1e-12);
  CHECK(infer(router, Matrix<double>::Zero(2, 5)).isZero(0.0));
}

TEST_CASE("CosineRouter gradients agree with finite differences",
          "[moe][router][cosine_router][gradient]") {
  auto router = make_router(GENERATE(false, true));
  test::check_gradients(router, test::random_matrix(7, 5, 6));
}

TEST_CASE("CosineRouter bounds the temperature", "[moe][router][cosine_router][gradient]") {
  auto router = make_router();
  router.log_scale().value(0, 0) = 5.0;
  CHECK(router.temperature() == Approx(0.01));
  const Matrix<double> x = test::random_matrix(3, 5, 7);
  test::check_gradients(router, x);
  CHECK(router.log_scale().grad.isZero(0.0));
}

TEST_CASE("CosineRouter has no gradient where there is no direction",
          "[moe][router][cosine_router]") {
  auto router = make_router(false);
  router.embedding().value.row(1).setZero();
  CosineRouter<double>::Cache cache;
  Matrix<double> x = test::random_matrix(3, 5, 8);
  x.row(2).setZero();
  router.forward(x, kTraining, cache);
  const Matrix<double> dx = router.backward(Matrix<double>::Ones(3, 4), cache);
  CHECK(dx.row(2).isZero(0.0));
  CHECK(router.embedding().grad.row(1).isZero(0.0));
  CHECK(dx.allFinite());
}

TEST_CASE("CosineRouter takes no tokens, and gives the same bits on any number of threads",
          "[moe][router][cosine_router]") {
  Rng rng(9);
  CosineRouter<float> router(32, 8, rng, {.d_projection = 16});
  CosineRouter<float>::Cache cache;
  CHECK(router.forward(Matrix<float>(0, 32), kTraining, cache).cols() == 8);
  CHECK(router.backward(Matrix<float>(0, 8), cache).cols() == 32);
  const Matrix<float> x = test::random_matrix<float>(300, 32, 10);
  const Matrix<float> serial = infer(router, x);
  const auto step = [&] {
    router.forward(x, kTraining, cache);
    router.backward(serial, cache);
  };
  step();
  CHECK(test::count_allocations(step) == 0);
  const test::Threads threads(3);
  CHECK(infer(router, x) == serial);
}

TEST_CASE("CosineRouter says what does not fit", "[moe][router][cosine_router]") {
  const auto message = [](Index d_model, Index experts, const CosineRouterConfig& config) {
    return test::message_of<ConfigError>([&] {
      Rng rng;
      CosineRouter<float>(d_model, experts, rng, config);
    });
  };
  CHECK(message(0, 2, {}) == "CosineRouter: d_model = 0, expected >= 1");
  CHECK(message(2, 0, {}) == "CosineRouter: experts = 0, expected >= 1");
  CHECK(message(2, 2, {.d_projection = 0}) == "CosineRouter: d_projection = 0, expected >= 1");
  CHECK(message(2, 2, {.temperature = 0.001}) ==
        "CosineRouter: temperature = 0.001, expected a finite number >= 0.01");
  CHECK(message(2, 2, {.least_temperature = 0.0}) ==
        "CosineRouter: least_temperature = 0, expected a finite number > 0");
  auto router = make_router();
  CosineRouter<double>::Cache cache;
  CHECK(test::message_of<StateError>([&] { router.backward(Matrix<double>::Zero(1, 4), cache); }) ==
        "CosineRouter::backward: the cache is empty, expected a forward pass that succeeded");
  CHECK(test::message_of<ShapeError>([&] { infer(router, Matrix<double>::Zero(1, 4)); }) ==
        "CosineRouter::forward: x is [1, 4], expected [tokens, 5]");
  router.forward(Matrix<double>::Zero(1, 5), kTraining, cache);
  CHECK(test::message_of<ShapeError>([&] { router.backward(Matrix<double>::Zero(2, 4), cache); }) ==
        "CosineRouter::backward: dy is [2, 4], expected [1, 4]");
}

}  // namespace weir::cosine_router_test
