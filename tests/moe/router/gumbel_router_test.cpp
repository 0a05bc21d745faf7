// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>

#include <weir/moe/concepts.hpp>
#include <weir/moe/router/gumbel_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/ops/softmax.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/fixed_noise.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::gumbel_router_test {

static_assert(Router<GumbelRouter<LinearRouter<float>>>);

namespace {

using test::FixedNoise;

/// A router whose logits are the token it sees.
auto transparent(double scale = 1.0) {
  return GumbelRouter(LinearRouter<double>(Matrix<double>::Identity(4, 4)), {.scale = scale});
}

using Cache = decltype(transparent())::Cache;

}  // namespace

TEST_CASE("GumbelRouter draws experts without replacement", "[moe][router][gumbel_router]") {
  constexpr Index kTokens = 4000;
  Matrix<double> z(1, 4);
  z << 1.0, 0.0, -1.0, 0.5;
  const Matrix<double> p = softmax<double>(z);
  Rng rng(1);
  Cache cache;
  const Routing<double> routing = test::route(
      TopKSoftmax<double>({.k = 2}),
      transparent().forward(z.replicate(kTokens, 1), {.training = true, .rng = &rng}, cache));
  Matrix<double> first = Matrix<double>::Zero(1, 4);
  Matrix<double> pair = Matrix<double>::Zero(4, 4);
  for (Index t = 0; t < kTokens; ++t) {
    const Index a = routing.first(t);
    first(0, routing.expert[a]) += 1.0 / kTokens;
    pair(routing.expert[a], routing.expert[a + 1]) += 1.0 / kTokens;
  }
  CHECK((first - p).cwiseAbs().maxCoeff() < 0.03);
  for (Index i = 0; i < 4; ++i) {
    for (Index j = 0; j < 4; ++j) {
      const double expected = i == j ? 0.0 : p(0, i) * p(0, j) / (1.0 - p(0, i));
      CHECK(pair(i, j) == Approx(expected).margin(0.03));
    }
  }
}

TEST_CASE("GumbelRouter adds its noise times the scale", "[moe][router][gumbel_router]") {
  const FixedNoise noise{test::random_matrix(3, 4, 2)};
  const LinearRouter<double> inner(Matrix<double>::Identity(4, 4));
  const GumbelRouter<LinearRouter<double>, FixedNoise> router(inner, {.scale = 0.5}, noise);
  const Matrix<double> x = test::random_matrix(3, 4, 3);
  GumbelRouter<LinearRouter<double>, FixedNoise>::Cache cache;
  const Matrix<double> logits = router.forward(x, {.training = true}, cache);
  CHECK(test::relative_error(logits, x + 0.5 * noise.values) <= 1e-15);
}

TEST_CASE("GumbelRouter is its inner router outside of training", "[moe][router][gumbel_router]") {
  const Matrix<double> x = test::random_matrix(3, 4, 4);
  Rng rng(5);
  Cache cache;
  CHECK(infer(transparent(), x) == x);
  CHECK(transparent().forward(x, {.training = true, .rng = &rng}, cache) != x);
  CHECK(transparent().forward(x, {.rng = &rng}, cache) == x);
  CHECK(transparent(0.0).forward(x, {.training = true}, cache) == x);
  CHECK(
      transparent().forward(Matrix<double>(0, 4), {.training = true, .rng = &rng}, cache).rows() ==
      0);
}

TEST_CASE("GumbelRouter gradients agree with finite differences",
          "[moe][router][gumbel_router][gradient]") {
  Rng init(6);
  GumbelRouter<LinearRouter<double>, FixedNoise> router(
      LinearRouter<double>(5, 4, init, {.bias = true}), {.scale = 0.7},
      {test::random_matrix(6, 4, 7)});
  test::check_gradients(router, test::random_matrix(6, 5, 8));
}

TEST_CASE("GumbelRouter gives the same bits on any number of threads, and allocates nothing",
          "[moe][router][gumbel_router]") {
  const auto router = transparent();
  const Matrix<double> x = test::random_matrix(600, 4, 9);
  Cache cache;
  const auto run = [&] {
    Rng rng(10);
    return &router.forward(x, {.training = true, .rng = &rng}, cache);
  };
  const Matrix<double> serial = *run();
  CHECK(test::count_allocations(run) == 0);
  const test::Threads threads(3);
  CHECK(*run() == serial);
}

TEST_CASE("GumbelRouter says what does not fit", "[moe][router][gumbel_router]") {
  CHECK(test::message_of<ConfigError>([] { transparent(-1.0); }) ==
        "GumbelRouter: scale = -1, expected a finite number >= 0");
  Cache cache;
  CHECK(test::message_of<ConfigError>([&] {
          transparent().forward(Matrix<double>::Zero(1, 4), {.training = true}, cache);
        }) == "GumbelNoise: pass.rng = null, expected a generator in training");
  Rng rng;
  CHECK(test::message_of<ShapeError>([&] {
          transparent().forward(Matrix<double>::Zero(1, 3), {.training = true, .rng = &rng}, cache);
        }) == "GumbelRouter::forward: x is [1, 3], expected [tokens, 4]");
  CHECK(rng.position() == 0);
  auto router = transparent();
  const Matrix<double> one = Matrix<double>::Zero(1, 4);
  router.forward(one, {.training = true, .rng = &rng}, cache);
  CHECK_THROWS_AS(router.forward(one, {.training = true}, cache), ConfigError);
  CHECK(test::message_of<StateError>([&] { router.backward(one, cache); }) ==
        "GumbelRouter::backward: the cache is empty, expected a forward pass that succeeded");
}

}  // namespace weir::gumbel_router_test
