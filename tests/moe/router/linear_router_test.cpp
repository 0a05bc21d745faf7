// SPDX-License-Identifier: MIT
#include <cmath>
#include <utility>

#include <weir/core/parallel.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/linear_router.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::linear_router_test {

static_assert(Router<LinearRouter<float>>);

TEST_CASE("LinearRouter matches logits worked out by hand", "[moe][linear_router]") {
  Matrix<double> weight(2, 3);
  weight << 1.0, 2.0, 3.0,  //
      0.0, -1.0, 0.5;
  Matrix<double> x(1, 3);
  x << 2.0, 1.0, -2.0;
  Matrix<double> expected(1, 2);

  expected << 2.0 + 2.0 - 6.0, -1.0 - 1.0;
  CHECK(infer(LinearRouter<double>(weight), x) == expected);

  Matrix<double> bias(1, 2);
  bias << 0.5, 4.0;
  expected += bias;
  LinearRouter<double> router(weight, bias);
  CHECK(infer(router, x) == expected);
  LinearRouter<double>::Cache cache;
  CHECK(router.forward(x, kTraining, cache) == expected);
  CHECK(router.d_model() == 3);
  CHECK(router.experts() == 2);
  CHECK(router.groups() == 0);
  CHECK(router.noise(cache).empty());
  CHECK(router.expert_vectors() == &router.weight());
  CHECK(std::as_const(router).weight().value == weight);
}

TEST_CASE("LinearRouter is initialised like Switch's", "[moe][linear_router]") {
  Rng rng(1);
  LinearRouter<double> router(100, 50, rng, {.bias = true});
  const Matrix<double>& weight = router.weight().value;
  REQUIRE(weight.rows() == 50);
  REQUIRE(weight.cols() == 100);
  // A normal of deviation sqrt(0.1 / 100), cut at two deviations, deviates by 0.8796 of that.
  const double deviation = std::sqrt(0.1 / 100.0);
  CHECK(weight.cwiseAbs().maxCoeff() <= 2.0 * deviation);
  CHECK(std::sqrt(weight.squaredNorm() / 5000.0) == Approx(0.8796 * deviation).epsilon(0.03));

  const auto named = parameters(router);
  REQUIRE(named.size() == 2);
  CHECK(named[0].name == "weight");
  CHECK(named[1].name == "bias");
  CHECK(named[1].parameter->value == Matrix<double>::Zero(1, 50));

  Rng same(1);
  LinearRouter<double> wider(100, 50, same, {.init_scale = 0.4});
  CHECK(test::relative_error(wider.weight().value, 2.0 * weight) <= 1e-14);
  CHECK(parameters(wider).size() == 1);
}

TEST_CASE("LinearRouter gradients agree with finite differences",
          "[moe][linear_router][gradient]") {
  const auto tokens = GENERATE(as<Index>{}, 1, 7);
  const bool bias = GENERATE(false, true);
  Rng rng(2);
  LinearRouter<double> router(5, 4, rng, {.bias = bias});
  test::check_gradients(router, test::random_matrix(tokens, 5, 3));
}

TEST_CASE("LinearRouter takes no tokens", "[moe][linear_router]") {
  Rng rng(4);
  LinearRouter<float> router(5, 4, rng);
  LinearRouter<float>::Cache cache;
  const Matrix<float> logits = router.forward(Matrix<float>(0, 5), kTraining, cache);
  CHECK(logits.rows() == 0);
  CHECK(logits.cols() == 4);
  const Matrix<float> dx = router.backward(logits, cache);
  CHECK(dx.rows() == 0);
  CHECK(dx.cols() == 5);
  CHECK(router.weight().gradient().isZero(0.0F));
}

TEST_CASE("LinearRouter gives the same bits on any number of threads", "[moe][linear_router]") {
  Rng rng(5);
  const LinearRouter<float> router(64, 16, rng, {.bias = true});
  const Matrix<float> x = test::random_matrix<float>(300, 64, 6);
  const Matrix<float> serial = infer(router, x);
  set_threads(2);
  const Matrix<float> parallel = infer(router, x);
  set_threads(1);
  CHECK(serial == parallel);
}

TEST_CASE("LinearRouter says what does not fit", "[moe][linear_router]") {
  const auto message = [](Index d_model, Index experts, LinearRouterConfig config) {
    return test::message_of<ConfigError>([&] {
      Rng rng;
      const LinearRouter<double> made(d_model, experts, rng, config);
    });
  };
  CHECK(message(0, 4, {}) == "LinearRouter: d_model = 0, expected >= 1");
  CHECK(message(4, -1, {.bias = true}) == "LinearRouter: experts = -1, expected >= 1");
  CHECK(message(4, 4, {.init_scale = 0.0}) ==
        "switch_init: scale = 0, expected a finite number > 0");

  Rng rng;
  LinearRouter<double> router(3, 2, rng);
  LinearRouter<double>::Cache cache;
  CHECK(test::message_of<ShapeError>([&] {
          router.forward(Matrix<double>::Zero(5, 4), {}, cache);
        }) == "LinearRouter::forward: x is [5, 4], expected [tokens, 3]");
  CHECK_THROWS_AS(router.backward(Matrix<double>::Zero(5, 2), cache), StateError);
  router.forward(Matrix<double>::Zero(5, 3), kTraining, cache);
  CHECK_THROWS_AS(router.backward(Matrix<double>::Zero(4, 2), cache), ShapeError);
}

}  // namespace weir::linear_router_test
