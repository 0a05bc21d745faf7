// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>

#include <weir/moe/concepts.hpp>
#include <weir/moe/router/input_dropout_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::input_dropout_router_test {

static_assert(Router<InputDropoutRouter<LinearRouter<float>>>);
static_assert(Router<InputDropoutRouter<NoisyRouter<float>>>);

namespace {

using Plain = InputDropoutRouter<LinearRouter<double>>;

/// A router whose logits are the token it sees.
Plain transparent(Index d_model, double rate) {
  return Plain(LinearRouter<double>(Matrix<double>::Identity(d_model, d_model)), {.rate = rate});
}

Matrix<double> seen(const Plain& router, const Matrix<double>& x, std::uint64_t seed) {
  Rng rng(seed);
  Plain::Cache cache;
  return router.forward(x, {.training = true, .rng = &rng}, cache);
}

}  // namespace

TEST_CASE("InputDropoutRouter drops features and scales up the others",
          "[moe][router][input_dropout_router]") {
  const double rate = GENERATE(0.1, 0.75);
  const Matrix<double> m = seen(transparent(10, rate), Matrix<double>::Ones(500, 10), 1);
  CHECK(((m.array() == 0.0) || ((m.array() - 1.0 / (1.0 - rate)).abs() < 1e-12)).all());
  CHECK(static_cast<double>((m.array() == 0.0).count()) / 5000.0 == Approx(rate).margin(0.03));
  CHECK(m.mean() == Approx(1.0).margin(0.1));
  CHECK(seen(transparent(10, rate), Matrix<double>::Ones(500, 10), 1) == m);
  CHECK(seen(transparent(10, rate), Matrix<double>::Ones(500, 10), 2) != m);
  const test::Threads threads(3);
  CHECK(seen(transparent(10, rate), Matrix<double>::Ones(500, 10), 1) == m);
}

TEST_CASE("InputDropoutRouter is its inner router outside of training",
          "[moe][router][input_dropout_router]") {
  auto router = transparent(4, 0.5);
  const Matrix<double> x = test::random_matrix(3, 4, 3);
  Rng rng(4);
  Plain::Cache cache;
  CHECK(infer(router, x) == x);
  CHECK(router.forward(x, {.training = true, .rng = &rng}, cache) != x);
  CHECK(router.forward(x, {.rng = &rng}, cache) == x);
  CHECK_THROWS_AS(router.backward(x, cache), StateError);
  CHECK(rng.position() == 1);
  auto whole = transparent(4, 0.0);
  CHECK(whole.forward(x, kTraining, cache) == x);
  CHECK(whole.backward(x, cache) == x);
  CHECK(router.forward(Matrix<double>(0, 4), {.training = true, .rng = &rng}, cache).rows() == 0);
}

TEST_CASE("InputDropoutRouter gradient agrees with finite differences",
          "[moe][router][input_dropout_router][gradient]") {
  Rng init(5);
  Plain router(LinearRouter<double>(5, 4, init, {.bias = true}), {.rate = 0.4});
  Matrix<double> x = test::random_matrix(6, 5, 6);
  const Matrix<double> d = test::random_matrix(6, 4, 7);
  const auto objective = [&] { return seen(router, x, 8).cwiseProduct(d).sum(); };
  Rng rng(8);
  Plain::Cache cache;
  router.forward(x, {.training = true, .rng = &rng}, cache);
  const Matrix<double> dx = router.backward(d, cache);
  CHECK(test::relative_error(dx, test::numeric_gradient(x, objective)) <= 1e-8);
  for (auto& [name, parameter] : parameters(router)) {
    const Matrix<double> numeric = test::numeric_gradient(parameter->value, objective);
    CHECK(test::relative_error(parameter->grad, numeric) <= 1e-8);
  }
  const auto step = [&] {
    router.forward(x, {.training = true, .rng = &rng}, cache);
    router.backward(d, cache);
  };
  step();
  CHECK(test::count_allocations(step) == 0);
}

TEST_CASE("InputDropoutRouter says what does not fit", "[moe][router][input_dropout_router]") {
  const auto config = [](const auto& action) { return test::message_of<ConfigError>(action); };
  CHECK(config([] { transparent(2, -0.1); }) ==
        "InputDropoutRouter: rate = -0.1, expected 0 <= rate < 1");
  CHECK(config([] { transparent(2, 1.0); }) ==
        "InputDropoutRouter: rate = 1, expected 0 <= rate < 1");
  const auto router = transparent(3, 0.1);
  Plain::Cache cache;
  CHECK(config([&] { router.forward(Matrix<double>::Zero(1, 3), {.training = true}, cache); }) ==
        "InputDropoutRouter::forward: pass.rng = null, expected a generator in training");
  Rng rng;
  CHECK(test::message_of<ShapeError>([&] {
          router.forward(Matrix<double>::Zero(1, 2), {.training = true, .rng = &rng}, cache);
        }) == "InputDropoutRouter::forward: x is [1, 2], expected [tokens, 3]");
  CHECK(rng.position() == 0);
}

}  // namespace weir::input_dropout_router_test
