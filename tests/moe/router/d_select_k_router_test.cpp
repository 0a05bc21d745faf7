// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/d_select_k_router.hpp>
#include <weir/moe/selector/relu_routing.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

using namespace weir;

static_assert(Router<DSelectKRouter<float>>);

namespace {

using Gate = DSelectKRouter<double>;

/// A router for 2^bits experts whose logits vary by about `scale`.
Gate random_router(Index d_model, Index bits, Index k, double scale, std::uint64_t seed) {
  return {Index(1) << bits,
          Linear<double>(scale * test::random_matrix(k * bits, d_model, seed),
                         0.3 * test::random_matrix(1, k * bits, seed + 1)),
          Linear<double>(test::random_matrix(k, d_model, seed + 2),
                         test::random_matrix(1, k, seed + 3)),
          {.k = k}};
}

/// The weights of a router that does not look at its token.
Matrix<double> weights_of(const std::vector<double>& z, const std::vector<double>& mixture,
                          double gamma = 1.0) {
  const auto constant = [](const std::vector<double>& values) {
    const auto n = static_cast<Index>(values.size());
    return Linear<double>(Matrix<double>::Zero(n, 1),
                          Eigen::Map<const Matrix<double>>(values.data(), 1, n));
  };
  const auto k = static_cast<Index>(mixture.size());
  const auto bits = static_cast<Index>(z.size()) / k;
  const Gate router(Index(1) << bits, constant(z), constant(mixture), {k, gamma});
  return router.forward(Matrix<double>::Ones(1, 1));
}

Matrix<double> row(const std::vector<double>& values) {
  return Eigen::Map<const Matrix<double>>(values.data(), 1, static_cast<Index>(values.size()));
}

}  // namespace

TEST_CASE("The smooth step is a cubic between flat ends", "[moe][router][d_select_k]") {
  CHECK(smooth_step(-0.5, 1.0) == 0.0);
  CHECK(smooth_step(-9.0, 1.0) == 0.0);
  CHECK(smooth_step(0.5, 1.0) == 1.0);
  CHECK(smooth_step(0.0, 3.0) == 0.5);
  CHECK(smooth_step(0.5, 2.0) == Approx(0.84375));  // 3/8 - 1/32 + 1/2
  for (double z = -1.3; z < 1.3; z += 0.07) {
    const double numeric = (smooth_step(z + 1e-6, 2.0) - smooth_step(z - 1e-6, 2.0)) / 2e-6;
    CHECK(smooth_step_slope(z, 2.0) == Approx(numeric).margin(1e-6));
    CHECK(smooth_step(z, 2.0) + smooth_step(-z, 2.0) == Approx(1.0));
  }
}

TEST_CASE("DSelectKRouter matches weights worked out by hand", "[moe][router][d_select_k]") {
  // One selector, its high bit set, its low bit undecided: experts 2 and 3.
  CHECK(weights_of({0.5, 0.0}, {0.0}) == row({0.0, 0.0, 0.5, 0.5}));
  // Two that have decided, for experts 1 and 2, with shares 1/4 and 3/4.
  CHECK(test::relative_error(weights_of({-1.0, 1.0, 1.0, -1.0}, {0.0, std::log(3.0)}),
                             row({0.0, 0.25, 0.75, 0.0})) <= 1e-15);
  // Both for expert 3.
  CHECK(weights_of({1.0, 1.0, 1.0, 1.0}, {0.3, -0.2}) == row({0.0, 0.0, 0.0, 1.0}));
  // gamma = 2: S(0.5) = 27/32, S(-0.5) = 5/32.
  CHECK(test::relative_error(weights_of({0.5, -0.5}, {0.0}, 2.0),
                             row({5 * 27.0, 5 * 5.0, 27 * 27.0, 27 * 5.0}) / 1024.0) <= 1e-15);
}

TEST_CASE("DSelectKRouter gives weights that sum to one, of k experts once it has decided",
          "[moe][router][d_select_k]") {
  Rng rng(1);
  for (std::uint64_t draw = 0; draw < 60; ++draw) {
    const Index bits = 1 + rng.below(4);
    const Index k = 1 + rng.below(3);
    const double scale = draw % 2 == 0 ? 0.4 : 1e4;
    const Gate router = random_router(3, bits, k, scale, 10 * draw);
    const Matrix<double> q = router.forward(test::random_matrix(7, 3, draw));
    CHECK(q.minCoeff() >= 0.0);
    for (Index t = 0; t < 7; ++t) {
      CHECK(q.row(t).sum() == Approx(1.0));
      if (scale > 1.0) CHECK((q.row(t).array() > 0.0).count() <= k);
    }
  }
}

TEST_CASE("DSelectKRouter begins with nearly equal weights", "[moe][router][d_select_k]") {
  Rng rng(2);
  const Gate router(4, 8, rng);
  const Matrix<double> q = router.forward(test::random_matrix(10, 4, 3));
  CHECK((q.array() - 0.125).abs().maxCoeff() < 0.05);
  CHECK((q.array() - 0.125).abs().maxCoeff() > 1e-4);
}

TEST_CASE("DSelectKRouter gradients agree with finite differences",
          "[moe][router][d_select_k][gradient]") {
  for (const double scale : {0.1, 0.4}) {
    Gate one = random_router(3, 2, 1, scale, 4);
    Gate three = random_router(3, 3, 3, scale, 5);
    test::check_gradients(one, test::random_matrix(6, 3, 6));
    test::check_gradients(three, test::random_matrix(6, 3, 7));
    REQUIRE(parameters(three).size() == 4);
    CHECK(parameters(three)[0].name == "selectors.weight");
    CHECK(parameters(three)[3].name == "mixture.bias");
  }
}

TEST_CASE("A layer of DSelectKRouter and ReLU routing runs few experts and has its exact gradient",
          "[moe][router][d_select_k][gradient]") {
  Rng rng(8);
  const Gate router = random_router(4, 3, 2, 0.4, 9);
  MoELayer layer(router, ReluRouting<double>{}, Dropless{}, GluBank<double>(8, 4, 3, rng, 1.0),
                 SwitchLoss<double>{0.1});
  const Matrix<double> x = test::random_matrix(6, 4, 10);
  decltype(layer)::Cache cache;
  layer.forward(x, cache);
  CHECK(cache.routing.assignments() > 6);
  CHECK(cache.routing.assignments() < 48);
  const Matrix<double> q = router.forward(x);
  for (Index t = 0; t < 6; ++t) {
    for (Index a = cache.routing.first(t); a < cache.routing.last(t); ++a) {
      const auto i = static_cast<std::size_t>(a);
      CHECK(cache.routing.weight[i] == q(t, cache.routing.expert[i]));
    }
  }
  test::check_gradients(layer, x);
}

TEST_CASE("DSelectKRouter gives the same bits for any number of threads and allocates nothing",
          "[moe][router][d_select_k]") {
  Gate router = random_router(8, 4, 2, 0.3, 11);
  const Matrix<double> x = test::random_matrix(500, 8, 12);
  const Matrix<double> dq = test::random_matrix(500, 16, 13);
  Gate::Cache cache;
  const auto step = [&] {
    router.forward(x, cache);
    router.backward(dq, cache);
  };
  step();
  CHECK(test::count_allocations(step) == 0);
  const Matrix<double> q = cache.weights;
  const Matrix<double> dx = cache.dx;
  const test::Threads threads(3);
  step();
  CHECK(cache.weights == q);
  CHECK(cache.dx == dx);
  CHECK(router.forward(Matrix<double>(0, 8)).rows() == 0);
}

TEST_CASE("DSelectKRouter says what does not fit", "[moe][router][d_select_k]") {
  Rng rng(14);
  const auto message = [&](Index d_model, Index experts, const DSelectKConfig& config) {
    return test::message_of<ConfigError>([&] { Gate(d_model, experts, rng, config); });
  };
  CHECK(message(4, 6, {}) == "DSelectKRouter: experts = 6, expected a power of two above 1");
  CHECK(message(4, 1, {}) == "DSelectKRouter: experts = 1, expected a power of two above 1");
  CHECK(message(4, 8, {.k = 0}) == "DSelectKRouter: k = 0, expected >= 1");
  CHECK(message(4, 8, {.gamma = 0.0}) == "DSelectKRouter: gamma = 0, expected > 0");
  CHECK(message(0, 8, {}) == "DSelectKRouter: d_model = 0, expected >= 1");
  CHECK(test::message_of<ShapeError>([&] {
          Gate(8, Linear<double>(4, 5, rng), Linear<double>(4, 2, rng));
        }) == "DSelectKRouter: selectors is [5, 4], expected [6, 4]");
  CHECK(test::message_of<ShapeError>([&] {
          Gate(8, Linear<double>(4, 6, rng), Linear<double>(3, 2, rng));
        }) == "DSelectKRouter: mixture is [2, 3], expected [2, 4]");
  Gate router(4, 8, rng);
  Gate::Cache cache;
  CHECK(test::message_of<ShapeError>([&] { router.forward(Matrix<double>::Zero(1, 3), cache); }) ==
        "DSelectKRouter::forward: x is [1, 3], expected [tokens, 4]");
  router.forward(Matrix<double>::Zero(2, 4), cache);
  CHECK(test::message_of<ShapeError>([&] { router.backward(Matrix<double>::Zero(2, 4), cache); }) ==
        "DSelectKRouter::backward: dq is [2, 4], expected [2, 8]");
}

TEST_CASE("DSelectKRouter in single precision is that in double", "[moe][router][d_select_k]") {
  Rng rng(15);
  Rng same(15);
  DSelectKRouter<double> exact(4, 8, rng, {.gamma = 0.05});
  DSelectKRouter<float> router(4, 8, same, {.gamma = 0.05});
  const Matrix<double> x = test::random_matrix(9, 4, 16);
  const Matrix<double> dq = test::random_matrix(9, 8, 17);
  DSelectKRouter<double>::Cache cache;
  DSelectKRouter<float>::Cache other;
  const Matrix<double> q = exact.forward(x, cache);
  CHECK(test::relative_error(router.forward(x.cast<float>(), other).cast<double>(), q) <= 1e-5);
  const Matrix<double> dx = exact.backward(dq, cache);
  CHECK(test::relative_error(router.backward(dq.cast<float>(), other).cast<double>(), dx) <= 1e-5);
}
