// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <vector>

#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/load_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/fixed_noise.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::noisy_router_test {

static_assert(Router<NoisyRouter<float>>);

namespace {

using test::FixedNoise;

NoisyRouter<double, FixedNoise> fixed(Index tokens, Index experts, Index d_model) {
  return {test::random_matrix(experts, d_model, 1), test::random_matrix(experts, d_model, 2),
          NoisyRouterConfig{}, FixedNoise{test::random_matrix(tokens, experts, 3)}};
}

double softplus(double z) {
  return std::log(1.0 + std::exp(z));
}

}  // namespace

TEST_CASE("NoisyRouter matches logits worked out by hand", "[moe][router][noisy_router]") {
  // x W_n = (0, log(e - 1)), whose softplus is (log 2, 1).
  Matrix<double> x(1, 2), gate(2, 2), noise_weight(2, 2), noise(1, 2);
  x << 1.0, 2.0;
  gate << 3.0, 1.0, -1.0, 0.5;
  noise_weight << 2.0, -1.0, std::log(std::exp(1.0) - 1.0), 0.0;
  noise << 0.5, -2.0;
  const NoisyRouter<double, FixedNoise> router(gate, noise_weight, {.min_std = 0.25}, {noise});
  NoisyRouter<double, FixedNoise>::Cache cache;
  const Matrix<double> logits = router.forward(x, {.training = true}, cache);
  CHECK(logits(0, 0) == Approx(5.0 + 0.5 * (std::log(2.0) + 0.25)));
  CHECK(logits(0, 1) == Approx(-2.0 * 1.25));
  CHECK(infer(router, x)(0, 0) == Approx(5.0));

  const auto noise_told = router.noise(cache);
  REQUIRE(noise_told.size() == 1);
  CHECK(noise_told[0].clean(0, 0) == Approx(5.0));
  CHECK(noise_told[0].deviation(0, 0) == Approx(std::log(2.0) + 0.25));
  CHECK(noise_told[0].deviation(0, 1) == Approx(1.25));
}

TEST_CASE("NoisyRouter draws from N(0, std^2)", "[moe][router][noisy_router]") {
  const double raw = GENERATE(-3.0, 0.0, 2.0);
  const NoisyRouter<double> router(Matrix<double>::Zero(4, 1), Matrix<double>::Constant(4, 1, raw));
  Rng rng(5);
  NoisyRouter<double>::Cache cache;
  const Matrix<double> z =
      router.forward(Matrix<double>::Ones(2000, 1), {.training = true, .rng = &rng}, cache);
  const double std = softplus(raw) + 0.01;
  CHECK(std::abs(z.mean()) < 0.05 * std);
  CHECK(z.squaredNorm() / 8000.0 == Approx(std * std).epsilon(0.05));
  const auto beyond = static_cast<double>((z.array() > 1.96 * std).count()) / 8000.0;
  CHECK(beyond == Approx(0.025).margin(0.006));
  CHECK(std::abs(z.col(0).dot(z.col(1))) / 2000.0 < 0.1 * std * std);
}

TEST_CASE("NoisyRouter is one projection outside of training", "[moe][router][noisy_router]") {
  const auto router = fixed(5, 4, 6);
  const Matrix<double> x = test::random_matrix(5, 6, 7);
  const Matrix<double> logits = infer(LinearRouter<double>(router.weight().value), x);
  NoisyRouter<double, FixedNoise>::Cache cache;
  CHECK(router.forward(x, {.training = true}, cache) != logits);
  CHECK(router.noise(cache).size() == 1);
  CHECK(router.forward(x, {}, cache) == logits);
  CHECK(router.noise(cache).empty());
}

TEST_CASE("A zero NoisyRouter ties all experts until noise tells them apart",
          "[moe][router][noisy_router]") {
  Rng rng(8);
  const MoELayer moe(NoisyRouter<double>(6, 4), TopKSoftmax<double>({.k = 1}), Dropless(),
                     GluBank<double>(6, 4, 8, rng));
  const Matrix<double> x = test::random_matrix(64, 6, 9);
  decltype(moe)::Cache cache;
  moe.forward(x, {}, cache);
  CHECK(moe.report(cache).load == std::vector<Index>{64, 0, 0, 0});
  moe.forward(x, {.training = true, .rng = &rng}, cache);
  for (const Index load : moe.report(cache).load) CHECK(load > 0);
}

TEST_CASE("NoisyRouter gives the same bits on any number of threads",
          "[moe][router][noisy_router]") {
  const NoisyRouter<float> router(test::random_matrix<float>(8, 32, 1),
                                  test::random_matrix<float>(8, 32, 2));
  const Matrix<float> x = test::random_matrix<float>(300, 32, 3);
  const auto run = [&] {
    Rng rng(4);
    NoisyRouter<float>::Cache cache;
    return Matrix<float>(router.forward(x, {.training = true, .rng = &rng}, cache));
  };
  const Matrix<float> serial = run();
  const test::Threads threads(3);
  CHECK(run() == serial);
}

TEST_CASE("NoisyRouter gradients agree with finite differences",
          "[moe][router][noisy_router][gradient]") {
  auto router = fixed(7, 4, 5);
  test::check_gradients(router, test::random_matrix(7, 5, 16));
}

TEST_CASE("A noisy layer with Shazeer's losses has the gradients of finite differences",
          "[moe][router][noisy_router][load_loss][gradient]") {
  Rng rng(17);
  MoELayer moe(fixed(9, 5, 4), TopKSoftmax<double>({.k = 2}), Dropless(),
               GluBank<double>(4, 5, 6, rng), ImportanceLoss<double>({.coefficient = 0.3}),
               LoadLoss<double>({.coefficient = 0.7, .variance = Variance::kSample}));
  const std::vector<std::uint8_t> mask = {1, 1, 1, 0, 1, 1, 1, 1, 1};
  Pass pass{.mask = mask};
  pass.aux_scale = GENERATE(1.0, 2.5);
  test::check_gradients(moe, test::random_matrix(9, 4, 18), pass);
}

TEST_CASE("NoisyRouter forgets the gradients of balancers of the pass before",
          "[moe][router][noisy_router]") {
  auto router = fixed(3, 4, 5);
  const Matrix<double> x = test::random_matrix(3, 5, 19);
  const Matrix<double> d = test::random_matrix(3, 4, 20);
  NoisyRouter<double, FixedNoise>::Cache cache;
  const std::vector<NoiseLevel<double>> d_noise = {
      {Matrix<double>::Ones(3, 4), Matrix<double>::Ones(3, 4)}};
  router.forward(x, kTraining, cache);
  const Matrix<double> plain = router.backward(d, cache);
  router.forward(x, kTraining, cache);
  router.add_noise_gradient(d_noise, cache);
  CHECK(router.backward(d, cache) != plain);
  router.forward(x, kTraining, cache);
  router.add_noise_gradient(d_noise, cache);
  router.forward(x, kTraining, cache);
  CHECK(router.backward(d, cache) == plain);
}

TEST_CASE("A noisy layer allocates nothing in the steady state", "[moe][router][noisy_router]") {
  Rng rng(21);
  MoELayer moe(NoisyRouter<float>(8, 4), TopKSoftmax<float>({.k = 2}), Dropless(),
               GluBank<float>(8, 4, 8, rng), LoadLoss<float>());
  const Matrix<float> x = test::random_matrix<float>(32, 8, 22);
  decltype(moe)::Cache cache;
  // The experts' loads change with the draws: the same ones again.
  const auto step = [&] {
    Rng same(23);
    moe.forward(x, {.training = true, .rng = &same}, cache);
    moe.backward(x, cache);
  };
  step();
  step();
  CHECK(test::count_allocations(step) == 0);
}

TEST_CASE("NoisyRouter takes no tokens, and one expert", "[moe][router][noisy_router]") {
  Rng rng(24);
  NoisyRouter<double> router(4, 1);
  NoisyRouter<double>::Cache cache;
  const Pass pass{.training = true, .rng = &rng};
  CHECK(router.forward(Matrix<double>(0, 4), pass, cache).rows() == 0);
  CHECK(router.backward(Matrix<double>(0, 1), cache).cols() == 4);
  CHECK(router.expert_vectors() == &router.weight());
  CHECK(router.forward(Matrix<double>::Ones(2, 4), pass, cache).cols() == 1);
  const auto named = parameters(router);
  REQUIRE(named.size() == 2);
  CHECK(named[0].name == "weight");
  CHECK(named[1].name == "noise_weight");
}

TEST_CASE("NoisyRouter says what does not fit", "[moe][router][noisy_router]") {
  CHECK(test::message_of<ConfigError>([] { NoisyRouter<float>(0, 4); }) ==
        "NoisyRouter: d_model = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([] { NoisyRouter<float>(4, 0); }) ==
        "NoisyRouter: experts = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([] { NoisyRouter<float>(4, 2, {.min_std = 0.0}); }) ==
        "NoisyRouter: min_std = 0, expected a finite number > 0");
  CHECK(test::message_of<ShapeError>([] {
          NoisyRouter<double>(Matrix<double>::Zero(4, 3), Matrix<double>::Zero(3, 4));
        }) == "NoisyRouter: noise_weight is [3, 4], expected [4, 3]");
  NoisyRouter<double> router(3, 2);
  NoisyRouter<double>::Cache cache;
  CHECK(test::message_of<StateError>([&] { router.backward(Matrix<double>::Zero(1, 2), cache); }) ==
        "NoisyRouter::backward: the cache is empty, expected a forward pass that succeeded");
  CHECK(test::message_of<ConfigError>([&] {
          router.forward(Matrix<double>::Zero(1, 3), {.training = true}, cache);
        }) == "NormalNoise: pass.rng = null, expected a generator in training");
  CHECK(test::message_of<ShapeError>([&] {
          router.forward(Matrix<double>::Zero(1, 2), {}, cache);
        }) == "NoisyRouter::forward: x is [1, 2], expected [tokens, 3]");
  router.forward(Matrix<double>::Zero(1, 3), {}, cache);
  CHECK(test::message_of<StateError>([&] { router.backward(Matrix<double>::Zero(1, 2), cache); }) ==
        "NoisyRouter::backward: the forward pass did not train, expected one with pass.training = "
        "true");
  Rng rng;
  router.forward(Matrix<double>::Zero(1, 3), {.training = true, .rng = &rng}, cache);
  CHECK(test::message_of<ShapeError>([&] { router.backward(Matrix<double>::Zero(2, 2), cache); }) ==
        "NoisyRouter::backward: dy is [2, 2], expected [1, 2]");
}

}  // namespace weir::noisy_router_test
