// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/balance/load_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/router/temperature_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/fixed_noise.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::temperature_router_test {

static_assert(Router<TemperatureRouter<LinearRouter<float>>>);
static_assert(Router<TemperatureRouter<NoisyRouter<float>>>);

namespace {

using test::FixedNoise;

}  // namespace

TEST_CASE("A temperature goes from start to end in equal ratios",
          "[moe][router][temperature_router]") {
  const TemperatureRouterConfig schedule{8.0, 0.5, 4};
  CHECK(schedule.temperature(-1) == Approx(8.0));
  CHECK(schedule.temperature(0) == Approx(8.0));
  CHECK(schedule.temperature(1) == Approx(4.0));
  CHECK(schedule.temperature(3) == Approx(1.0));
  CHECK(schedule.temperature(4) == 0.5);
  CHECK(schedule.temperature(1000) == 0.5);
}

TEST_CASE("TemperatureRouter divides the logits", "[moe][router][temperature_router]") {
  Rng rng(1);
  const LinearRouter<double> inner(5, 4, rng);
  TemperatureRouter router(inner, {.start = 4.0, .end = 1.0, .steps = 10});
  const Matrix<double> x = test::random_matrix(6, 5, 2);
  CHECK(test::relative_error(infer(router, x), 0.25 * infer(inner, x)) <= 1e-15);
  router.set_step(10);
  CHECK(router.temperature() == 1.0);
  CHECK(infer(router, x) == infer(inner, x));
}

TEST_CASE("TemperatureRouter moves on with each update, and its step is saved",
          "[moe][router][temperature_router]") {
  Rng rng(1);
  const TemperatureRouterConfig config{.start = 8.0, .end = 0.5, .steps = 4};
  MoELayer moe(JitterRouter(TemperatureRouter(LinearRouter<float>(6, 4, rng), config)),
               SoftmaxTopK<float>({.k = 1}), Dropless(), GluBank<float>(6, 4, 8, rng));
  const auto tau = [&] { return moe.router().inner().temperature(); };
  CHECK(tau() == Approx(8.0));
  for (const double expected : {4.0, 2.0, 1.0, 0.5, 0.5}) {
    update(moe);
    CHECK(tau() == Approx(expected));
  }
  const auto saved = buffers(moe);
  REQUIRE(saved.size() == 1);
  CHECK(saved[0].name == "router.temperature_step");
  saved[0].buffer->value(0, 0) = 2.0F;
  CHECK(tau() == Approx(2.0));
  moe.router().inner().set_step(1);
  CHECK(tau() == Approx(4.0));
  REQUIRE(parameters(moe.router()).size() == 1);
  CHECK(parameters(moe.router())[0].name == "weight");
}

TEST_CASE("Zero weights tie every token whatever the temperature and the jitter; noise does not",
          "[moe][router][temperature_router]") {
  Rng rng(3);
  const Matrix<double> x = test::random_matrix(64, 6, 4);
  const auto load = [&](auto router) {
    const MoELayer moe(std::move(router), SoftmaxTopK<double>({.k = 1}), Dropless(),
                       GluBank<double>(6, 4, 8, rng));
    typename decltype(moe)::Cache cache;
    moe.forward(x, {.training = true, .rng = &rng}, cache);
    return moe.report(cache).load;
  };
  const LinearRouter<double> zero(Matrix<double>::Zero(4, 6));
  const std::vector<Index> tied = {64, 0, 0, 0};
  CHECK(load(zero) == tied);
  CHECK(load(JitterRouter(zero, {.epsilon = 0.5})) == tied);
  CHECK(load(TemperatureRouter(zero, {0.01, 1.0, 5})) == tied);
  for (const Index count : load(TemperatureRouter(NoisyRouter<double>(6, 4), {2.0, 1.0, 5}))) {
    CHECK(count > 0);
  }
}

TEST_CASE("TemperatureRouter gradients agree with finite differences",
          "[moe][router][temperature_router][gradient]") {
  Rng rng(5);
  const TemperatureRouterConfig schedule{0.5, 1.0, 9};
  TemperatureRouter router(LinearRouter<double>(5, 4, rng, {.bias = true}), schedule);
  test::check_gradients(router, test::random_matrix(6, 5, 6));

  using Noisy = NoisyRouter<double, FixedNoise>;
  MoELayer moe(TemperatureRouter(Noisy(test::random_matrix(4, 5, 7), test::random_matrix(4, 5, 8),
                                       {}, {test::random_matrix(6, 4, 9)}),
                                 schedule),
               SoftmaxTopK<double>({.k = 2}), Dropless(), GluBank<double>(5, 4, 6, rng),
               LoadLoss<double>({.coefficient = 0.7}));
  test::check_gradients(moe, test::random_matrix(6, 5, 10));
}

TEST_CASE("TemperatureRouter allocates nothing in the steady state, and takes no tokens",
          "[moe][router][temperature_router]") {
  Rng rng(11);
  TemperatureRouter router(LinearRouter<float>(5, 4, rng));
  const Matrix<float> x = test::random_matrix<float>(6, 5, 12);
  const Matrix<float> d = test::random_matrix<float>(6, 4, 13);
  decltype(router)::Cache cache;
  const auto step = [&] {
    router.forward(x, kTraining, cache);
    router.backward(d, cache);
  };
  step();
  CHECK(test::count_allocations(step) == 0);
  CHECK(router.forward(Matrix<float>(0, 5), kTraining, cache).cols() == 4);
  CHECK(router.backward(Matrix<float>(0, 4), cache).cols() == 5);
}

TEST_CASE("TemperatureRouter says what does not fit", "[moe][router][temperature_router]") {
  const auto message = [](const TemperatureRouterConfig& schedule) {
    return test::message_of<ConfigError>(
        [&] { TemperatureRouter(LinearRouter<double>(Matrix<double>::Zero(2, 2)), schedule); });
  };
  CHECK(message({0.0, 1.0, 1}) == "TemperatureRouter: start = 0, expected a finite number > 0");
  CHECK(message({1.0, -1.0, 1}) == "TemperatureRouter: end = -1, expected a finite number > 0");
  CHECK(message({1.0, 1.0, 0}) == "TemperatureRouter: steps = 0, expected > 0");
  TemperatureRouter router(LinearRouter<double>(Matrix<double>::Zero(2, 2)));
  decltype(router)::Cache cache;
  CHECK(test::message_of<StateError>([&] { router.backward(Matrix<double>::Zero(1, 2), cache); }) ==
        "TemperatureRouter::backward: the cache is empty, expected a forward pass that succeeded");
}

}  // namespace weir::temperature_router_test
