// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <limits>

#include <weir/core/parallel.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/same_draws.hpp"

namespace weir::jitter_router_test {

static_assert(Router<JitterRouter<LinearRouter<float>>>);
static_assert(Router<JitterRouter<NoisyRouter<float>>>);

namespace {

Pass training_pass(Rng& rng) {
  Pass pass;
  pass.training = true;
  pass.rng = &rng;
  return pass;
}

/// A router whose logits are the token it sees.
JitterRouter<LinearRouter<double>> transparent(Index d_model, double epsilon) {
  return JitterRouter(LinearRouter<double>(Matrix<double>::Identity(d_model, d_model)),
                      {.epsilon = epsilon});
}

/// The logits of one training pass with a fresh generator.
template <class R>
Matrix<typename R::Scalar> jittered(const R& router, MatrixIn<typename R::Scalar> x,
                                    std::uint64_t seed) {
  Rng rng(seed);
  typename R::Cache cache;
  return router.forward(x, training_pass(rng), cache);
}

}  // namespace

TEST_CASE("JitterRouter multiplies by U[1 - epsilon, 1 + epsilon]", "[moe][jitter_router]") {
  const double epsilon = GENERATE(0.01, 0.5);
  const Matrix<double> x = test::random_matrix(200, 10, 1);
  const Matrix<double> u = jittered(transparent(10, epsilon), x, 2).cwiseQuotient(x);

  const Matrix<double> deviation = (u.array() - 1.0) / epsilon;  // U[-1, 1]
  CHECK(deviation.maxCoeff() <= 1.0 + 1e-12);
  CHECK(deviation.minCoeff() >= -1.0 - 1e-12);
  CHECK(deviation.maxCoeff() > 0.99);
  CHECK(deviation.minCoeff() < -0.99);
  CHECK(std::abs(deviation.mean()) < 0.05);
  CHECK(deviation.squaredNorm() / 2000.0 == Approx(1.0 / 3.0).epsilon(0.05));
  // One draw per element: neither rows nor columns share theirs.
  CHECK(deviation.rowwise().mean().cwiseAbs().maxCoeff() < 0.9);
  CHECK(deviation.colwise().mean().cwiseAbs().maxCoeff() < 0.3);
}

TEST_CASE("JitterRouter draws the same from the same seed", "[moe][jitter_router]") {
  const auto router = transparent(6, 0.1);
  const Matrix<double> x = test::random_matrix(5, 6, 3);
  CHECK(jittered(router, x, 4) == jittered(router, x, 4));
  CHECK(jittered(router, x, 4) != jittered(router, x, 5));

  Rng rng(4);
  JitterRouter<LinearRouter<double>>::Cache cache;
  const Matrix<double> first = router.forward(x, training_pass(rng), cache);
  const Matrix<double> second = router.forward(x, training_pass(rng), cache);
  CHECK(first != second);
}

TEST_CASE("JitterRouter gives the same bits on any number of threads", "[moe][jitter_router]") {
  Rng init(6);
  const JitterRouter router(LinearRouter<float>(64, 8, init));
  const Matrix<float> x = test::random_matrix<float>(300, 64, 7);
  const Matrix<float> serial = jittered(router, x, 8);
  set_threads(2);
  const Matrix<float> parallel = jittered(router, x, 8);
  set_threads(1);
  CHECK(serial == parallel);
}

TEST_CASE("JitterRouter is its inner router outside of training", "[moe][jitter_router]") {
  Rng init(9);
  const LinearRouter<double> inner(6, 4, init);
  const JitterRouter router(inner, {.epsilon = 0.2});
  const Matrix<double> x = test::random_matrix(5, 6, 10);
  const Matrix<double> logits = infer(inner, x);

  Rng rng(11);
  Pass evaluation;
  evaluation.rng = &rng;
  JitterRouter<LinearRouter<double>>::Cache cache;
  CHECK(infer(router, x) == logits);
  CHECK(router.forward(x, evaluation, cache) == logits);
  CHECK(rng.position() == 0);
  CHECK(router.forward(x, training_pass(rng), cache) != logits);
  CHECK(router.d_model() == 6);
  CHECK(router.experts() == 4);

  Pass without_rng;
  without_rng.training = true;
  CHECK(JitterRouter(inner, {.epsilon = 0.0}).forward(x, without_rng, cache) == logits);
}

TEST_CASE("JitterRouter leaves what the experts see alone", "[moe][jitter_router]") {
  // With a single expert the weight is 1 whatever the router says.
  Rng init(12);
  const MoELayer moe(JitterRouter(LinearRouter<double>(6, 1, init), {.epsilon = 0.5}),
                     TopKSoftmax<double>({.k = 1}), Dropless(), GluBank<double>(6, 1, 8, init));
  const Matrix<double> x = test::random_matrix(5, 6, 13);
  Rng rng(14);
  decltype(moe)::Cache cache;
  const Matrix<double> y = moe.forward(x, training_pass(rng), cache);
  CHECK(y == infer(moe, x));
  CHECK(cache.routing.logits != infer(moe.router(), x));
}

TEST_CASE("JitterRouter gradients agree with finite differences",
          "[moe][jitter_router][gradient]") {
  Rng init(15);
  test::SameDraws<JitterRouter<LinearRouter<double>>> router{
      JitterRouter(LinearRouter<double>(5, 4, init, {.bias = true}), {.epsilon = 0.4})};
  test::check_gradients(router, test::random_matrix(7, 5, 16));
}

TEST_CASE("JitterRouter differentiates the jitter of its own pass alone", "[moe][jitter_router]") {
  auto router = transparent(4, 0.5);
  const Matrix<double> x = test::random_matrix(3, 4, 17);
  const Matrix<double> dy = test::random_matrix(3, 4, 18);
  Rng rng(19);
  JitterRouter<LinearRouter<double>>::Cache cache;
  router.forward(x, training_pass(rng), cache);
  CHECK(router.backward(dy, cache) != dy);
  CHECK(test::message_of<StateError>([&] { router.backward(dy, cache); }) ==
        "JitterRouter::backward: the cache was used by a backward pass already, expected a forward "
        "pass between the two");
  router.forward(x, {}, cache);
  CHECK(test::message_of<StateError>([&] { router.backward(dy, cache); }) ==
        "JitterRouter::backward: the forward pass did not train, expected one with pass.training = "
        "true");
  auto still = transparent(4, 0.0);
  still.forward(x, kTraining, cache);
  CHECK(still.backward(dy, cache) == dy);
}

TEST_CASE("JitterRouter takes no tokens", "[moe][jitter_router]") {
  auto router = transparent(4, 0.5);
  Rng rng(20);
  JitterRouter<LinearRouter<double>>::Cache cache;
  const Matrix<double> logits = router.forward(Matrix<double>(0, 4), training_pass(rng), cache);
  CHECK(logits.rows() == 0);
  CHECK(logits.cols() == 4);
  CHECK(router.backward(logits, cache).cols() == 4);
}

TEST_CASE("JitterRouter has its inner router's parameters", "[moe][jitter_router]") {
  auto router = transparent(4, 0.5);
  const auto named = parameters(router);
  REQUIRE(named.size() == 1);
  CHECK(named[0].name == "weight");
}

TEST_CASE("JitterRouter says what does not fit", "[moe][jitter_router]") {
  const auto message = [](double epsilon) {
    return test::message_of<ConfigError>([&] { transparent(2, epsilon); });
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(message(-0.1) == "JitterRouter: epsilon = -0.1, expected 0 <= epsilon < 1");
  CHECK(message(1.0) == "JitterRouter: epsilon = 1, expected 0 <= epsilon < 1");
  CHECK(message(nan) == "JitterRouter: epsilon = nan, expected 0 <= epsilon < 1");
  CHECK(message(0.0) == "no exception");

  auto router = transparent(3, 0.1);
  JitterRouter<LinearRouter<double>>::Cache cache;
  CHECK_THROWS_AS(router.backward(Matrix<double>::Zero(2, 3), cache), StateError);
  Pass pass;
  pass.training = true;
  CHECK(test::message_of<ConfigError>([&] {
          router.forward(Matrix<double>::Zero(2, 3), pass, cache);
        }) == "JitterRouter::forward: pass.rng = null, expected a generator in training");
  Rng rng;
  CHECK(test::message_of<ShapeError>([&] {
          router.forward(Matrix<double>::Zero(2, 4), training_pass(rng), cache);
        }) == "JitterRouter::forward: x is [2, 4], expected [tokens, 3]");
  CHECK(rng.position() == 0);
}

}  // namespace weir::jitter_router_test
