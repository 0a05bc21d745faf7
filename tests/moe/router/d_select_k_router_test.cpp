// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <vector>

#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/d_select_k_router.hpp>
#include <weir/moe/router/hierarchical_router.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/relu_routing.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"
#include "support/same_draws.hpp"
#include "support/threads.hpp"

namespace weir::d_select_k_router_test {

static_assert(Router<DSelectKRouter<float>>);

namespace {

using Gate = DSelectKRouter<double>;

/// A router for 2^bits experts whose logits vary by about `scale`.
Gate random_router(Index d_model, Index bits, Index k, double scale, std::uint64_t seed,
                   DSelectKRouterConfig config = {}) {
  config.k = k;
  return {Index(1) << bits,
          Linear<double>(scale * test::random_matrix(k * bits, d_model, seed),
                         0.3 * test::random_matrix(1, k * bits, seed + 1)),
          Linear<double>(test::random_matrix(k, d_model, seed + 2),
                         test::random_matrix(1, k, seed + 3)),
          config};
}

/// A router that does not look at its token.
Gate constant_router(Index experts, const std::vector<double>& z,
                     const std::vector<double>& mixture, DSelectKRouterConfig config = {}) {
  const auto constant = [](const std::vector<double>& values) {
    const auto n = static_cast<Index>(values.size());
    return Linear<double>(Matrix<double>::Zero(n, 1),
                          Eigen::Map<const Matrix<double>>(values.data(), 1, n));
  };
  config.k = static_cast<Index>(mixture.size());
  return {experts, constant(z), constant(mixture), config};
}

/// Its weights, for as many experts as there are codes.
Matrix<double> weights_of(const std::vector<double>& z, const std::vector<double>& mixture,
                          double gamma = 1.0) {
  const auto experts = Index(1) << (z.size() / mixture.size());
  return infer(constant_router(experts, z, mixture, {.gamma = gamma}), Matrix<double>::Ones(1, 1));
}

/// The router's own loss for the tokens x.
double loss_of(const Gate& router, const Matrix<double>& x, Pass pass = {}) {
  PassRecord record;
  pass.record = &record;
  Gate::Cache cache;
  router.forward(x, pass, cache);
  return record.aux_loss("d_select_k");
}

/// That for one token of a router that does not look at it.
double loss_of(const Gate& router) {
  return loss_of(router, Matrix<double>::Ones(1, 1));
}

Matrix<double> row(const std::vector<double>& values) {
  return Eigen::Map<const Matrix<double>>(values.data(), 1, static_cast<Index>(values.size()));
}

}  // namespace

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
    const Matrix<double> q = infer(router, test::random_matrix(7, 3, draw));
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
  const Matrix<double> q = infer(router, test::random_matrix(10, 4, 3));
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
  MoELayer layer(router, ReluRouting<double>(), Dropless(), GluBank<double>(4, 8, 3, rng),
                 SwitchLoss<double>({.coefficient = 0.1}));
  const Matrix<double> x = test::random_matrix(6, 4, 10);
  decltype(layer)::Cache cache;
  layer.forward(x, {}, cache);
  CHECK(cache.routing.assignments() > 6);
  CHECK(cache.routing.assignments() < 48);
  const Matrix<double> q = infer(router, x);
  for (Index t = 0; t < 6; ++t) {
    for (Index a = cache.routing.first(t); a < cache.routing.last(t); ++a) {
      CHECK(cache.routing.weight[a] == q(t, cache.routing.expert[a]));
    }
  }
  test::check_gradients(layer, x);
}

TEST_CASE("The entropy of a DSelectKRouter is that of its selectors", "[moe][router][d_select_k]") {
  const DSelectKRouterConfig config{.entropy = 0.5};
  // Undecided in two bits, in one, in none, whatever the mixture.
  CHECK(loss_of(constant_router(4, {0.0, 0.0}, {0.0}, config)) ==
        Approx(0.5 * std::log(4.0)).epsilon(1e-14));
  CHECK(loss_of(constant_router(4, {0.5, 0.0, 1.0, 1.0}, {3.0, -1.0}, config)) ==
        Approx(0.5 * std::log(2.0)).epsilon(1e-14));
  CHECK(loss_of(constant_router(4, {-1.0, 1.0}, {0.0}, config)) == 0.0);
  // S = 27/32.
  CHECK(loss_of(constant_router(2, {0.5}, {0.0}, {.gamma = 2.0, .entropy = 1.0})) ==
        Approx(-27.0 / 32.0 * std::log(27.0 / 32.0) - 5.0 / 32.0 * std::log(5.0 / 32.0))
            .epsilon(1e-14));
  CHECK(loss_of(constant_router(4, {0.0, 0.0}, {0.0})) == 0.0);
  // With the epsilon of the source: r = (0, 1).
  CHECK(loss_of(constant_router(2, {1.0}, {0.0}, {.entropy = 1.0, .epsilon = 1e-6})) ==
        Approx(-std::log1p(1e-6)).epsilon(1e-9));
  CHECK(loss_of(constant_router(2, {0.0}, {0.0}, {.entropy = 1.0, .epsilon = 0.5})) ==
        Approx(0.0).margin(1e-15));
}

TEST_CASE("The entropy of a DSelectKRouter has a finite gradient however sure it is",
          "[moe][router][d_select_k][gradient]") {
  for (const double epsilon : {0.0, 1e-6}) {
    const DSelectKRouterConfig config{.entropy = 1.0, .epsilon = epsilon};
    const Matrix<double> one = Matrix<double>::Ones(1, 1);
    for (const double z : {-0.7, -0.49, 0.49, 0.7}) {
      INFO("z " << z);
      Gate router = constant_router(4, {z, 0.1}, {0.0}, config);
      test::check_gradients(router, one);
    }
    for (const double z : {-0.5, std::nextafter(-0.5, 0.0), std::nextafter(0.5, 0.0), 0.5}) {
      Gate router = constant_router(4, {z, 0.1}, {0.0}, config);
      Gate::Cache cache;
      router.forward(one, kTraining, cache);
      router.backward(Matrix<double>::Zero(1, 4), cache);
      const Matrix<double>& d_bias = parameters(router)[1].parameter->grad;
      CHECK(std::abs(d_bias(0, 0)) <= 1e-7);  // As good as decided.
      CHECK(std::abs(d_bias(0, 1)) > 0.1);
    }
  }
}

TEST_CASE("DSelectKRouter draws selectors back from codes that no expert has",
          "[moe][router][d_select_k]") {
  // Three experts, the code 3 is of none.
  const Matrix<double> one = Matrix<double>::Ones(1, 1);
  const Gate level = constant_router(3, {0.0, 0.0}, {0.0}, {.reach = 2.0});
  CHECK(infer(level, one) == row({0.25, 0.25, 0.25}));
  CHECK(loss_of(level) == Approx(2.0 / 0.75));
  // One that names an expert, one that is between expert 2 and none.
  const Gate two = constant_router(3, {-1.0, 1.0, 1.0, 0.0}, {0.0, 0.0});
  CHECK(infer(two, one) == row({0.0, 0.5, 0.25}));
  CHECK(loss_of(two) == Approx(1.0 + 2.0));
  CHECK(loss_of(constant_router(3, {1.0, 1.0}, {0.0})) == Approx(1e6));  // Only on that code.
  CHECK(loss_of(constant_router(3, {1.0, 1.0}, {0.0}, {.reach = 2.0, .least_reach = 0.25})) ==
        Approx(8.0));
  CHECK(loss_of(constant_router(4, {1.0, 1.0}, {0.0})) == 0.0);  // A power of two.
  CHECK(loss_of(constant_router(3, {1.0, 0.0}, {0.0}, {.reach = 0.0})) == 0.0);
}

TEST_CASE("The losses of a DSelectKRouter are the mean over real tokens, scaled by the pass",
          "[moe][router][d_select_k]") {
  const Gate router = random_router(3, 2, 2, 0.4, 20, {.entropy = 0.7});
  Matrix<double> x = test::random_matrix(3, 3, 21);
  const double first = loss_of(router, x.topRows(1));
  const double last = loss_of(router, x.bottomRows(1));
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  x.row(1).setConstant(NAN);
  CHECK(loss_of(router, x, {.mask = mask}) == Approx((first + last) / 2.0));
  CHECK(loss_of(router, x, {.mask = mask, .aux_scale = 0.25}) == Approx((first + last) / 8.0));
  CHECK(loss_of(router, x, {.aux_scale = 0.0}) == 0.0);
  CHECK(loss_of(router, Matrix<double>(0, 3)) == 0.0);
}

TEST_CASE("DSelectKRouter gradients agree with finite differences, its losses included",
          "[moe][router][d_select_k][gradient]") {
  const Matrix<double> x = test::random_matrix(5, 3, 22);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1};
  for (const Index experts : {4, 5, 3}) {
    INFO("experts " << experts);
    const Index bits = experts == 5 ? 3 : 2;
    const Linear<double> selectors(0.2 * test::random_matrix(2 * bits, 3, 23),
                                   0.1 * test::random_matrix(1, 2 * bits, 24));
    const Linear<double> mixture(test::random_matrix(2, 3, 25), test::random_matrix(1, 2, 26));
    Gate router(experts, selectors, mixture, {.entropy = 0.7, .reach = 0.9});
    test::check_gradients(router, x);
    test::check_gradients(router, x, {.mask = mask, .aux_scale = 0.3});
    test::check_gradients(router, x, {.aux_scale = 0.0});
    // Through a layer, and a router around it.
    Rng rng(27);
    test::SameDraws<JitterRouter<Gate>> jitter{JitterRouter<Gate>(router, {.epsilon = 0.1})};
    test::check_gradients(jitter, x, {.aux_scale = 0.3});
    const SwitchLoss<double> balance({.coefficient = 0.1});
    MoELayer layer(JitterRouter<Gate>(router, {.epsilon = 0.0}), ReluRouting<double>(), Dropless(),
                   GluBank<double>(3, experts, 1, rng), balance);
    test::check_gradients(layer, x, {.aux_scale = 0.3});
    decltype(layer)::Cache cache;
    PassRecord record;
    layer.forward(x, {.aux_scale = 0.3, .record = &record}, cache);
    const double own = loss_of(router, x);
    CHECK(record.aux_loss() == Approx(0.3 * (own + test::loss_of(balance, cache.routing))));
    CHECK(own > 0.1);
    const LayerReport report = layer.report(cache);
    REQUIRE(report.losses.size() == 2);
    CHECK(report.losses[0].first == "router.d_select_k");
    CHECK(report.losses[0].second == Approx(0.3 * own));
    CHECK(report.losses[1].first == "switch");
  }
}

TEST_CASE("The losses of DSelectKRouters at both levels of a HierarchicalRouter are recorded",
          "[moe][router][d_select_k][hierarchical_router][gradient]") {
  const Matrix<double> x = test::random_matrix(5, 3, 40);
  const Gate groups = random_router(3, 1, 2, 0.2, 41, {.entropy = 0.7});
  const Gate experts = random_router(3, 2, 2, 0.2, 45, {.entropy = 0.4});
  HierarchicalRouter both(groups, experts);
  test::check_gradients(both, x, {.aux_scale = 0.3});
  HierarchicalRouter inner(LinearRouter<double>(test::random_matrix(2, 3, 49)), experts);
  test::check_gradients(inner, x);

  Rng rng(50);
  MoELayer layer(both, SoftmaxTopK<double>({.k = 2}), Dropless(), GluBank<double>(3, 4, 2, rng));
  test::check_gradients(layer, x, {.aux_scale = 0.3});
  PassRecord record;
  decltype(layer)::Cache cache;
  layer.forward(x, {.record = &record}, cache);
  REQUIRE(record.losses().size() == 2);
  CHECK(record.losses()[0].name == "router.groups.d_select_k");
  CHECK(record.losses()[0].value == Approx(loss_of(groups, x)));
  CHECK(record.losses()[1].name == "router.d_select_k");
  CHECK(record.losses()[1].value == Approx(loss_of(experts, x)));
  CHECK(layer.report(cache).losses.size() == 2);
}

TEST_CASE("The losses of a DSelectKRouter count experts that the pass forbids",
          "[moe][router][d_select_k][allowed]") {
  const Gate router = random_router(3, 2, 2, 0.4, 30, {.entropy = 0.7});
  const Gate three(3,
                   Linear<double>(0.4 * test::random_matrix(4, 3, 30), Matrix<double>::Zero(1, 4)),
                   Linear<double>(test::random_matrix(2, 3, 31), Matrix<double>::Zero(1, 2)));
  const Matrix<double> x = test::random_matrix(4, 3, 32);
  const std::vector<std::uint8_t> four_allowed = {1, 0, 1, 1};
  const std::vector<std::uint8_t> three_allowed = {1, 0, 1};
  CHECK(loss_of(router, x, {.allowed = four_allowed}) == loss_of(router, x));
  CHECK(loss_of(three, x, {.allowed = three_allowed}) == loss_of(three, x));

  // Tokens go where they may, with the weights they have there.
  Rng rng(33);
  MoELayer layer(router, ReluRouting<double>(), Dropless(), GluBank<double>(3, 4, 3, rng));
  test::check_gradients(layer, x, {.allowed = four_allowed});
  decltype(layer)::Cache cache;
  layer.forward(x, {.allowed = four_allowed}, cache);
  const Matrix<double> q = infer(router, x);
  for (Index t = 0; t < 4; ++t) {
    for (Index a = cache.routing.first(t); a < cache.routing.last(t); ++a) {
      CHECK(cache.routing.expert[a] != 1);
      CHECK(cache.routing.weight[a] == q(t, cache.routing.expert[a]));
    }
  }
}

TEST_CASE("The losses of three levels of routers are recorded under their own names",
          "[moe][router][d_select_k][hierarchical_router]") {
  const Matrix<double> x = test::random_matrix(5, 3, 60);
  const Gate outer = random_router(3, 1, 2, 0.2, 61, {.entropy = 0.7});
  const Gate middle = random_router(3, 2, 2, 0.2, 65, {.entropy = 0.4});
  const Gate inner = random_router(3, 3, 2, 0.2, 69, {.entropy = 0.1});
  const HierarchicalRouter router(outer, HierarchicalRouter(middle, inner));
  PassRecord record;
  decltype(router)::Cache cache;
  router.forward(x, {.record = &record}, cache);
  REQUIRE(record.losses().size() == 3);
  CHECK(record.losses()[0].name == "groups.d_select_k");
  CHECK(record.losses()[0].value == loss_of(outer, x));
  CHECK(record.losses()[1].name == "experts.groups.d_select_k");
  CHECK(record.losses()[1].value == loss_of(middle, x));
  CHECK(record.losses()[2].name == "experts.d_select_k");
  CHECK(record.losses()[2].value == loss_of(inner, x));
  // The path is left behind.
  record.add_loss("after", 1.0);
  CHECK(record.losses()[3].name == "after");
}

TEST_CASE("The entropy loss makes up the minds of the selectors of a DSelectKRouter",
          "[moe][router][d_select_k]") {
  Rng rng(28);
  Gate router(3, 6, rng, {.k = 2, .entropy = 1.0});
  const Matrix<double> x = test::random_matrix(8, 3, 29);
  Gate::Cache cache;
  for (int step = 0; step < 400; ++step) {
    router.forward(x, kTraining, cache);
    zero_gradients(router);
    router.backward(Matrix<double>::Zero(8, 6), cache);
    for (auto& [name, parameter] : parameters(router)) {
      parameter->value -= 0.05 * parameter->gradient();
    }
  }
  const Matrix<double> q = infer(router, x);
  CHECK((q.array() > 1e-3).count() < 8 * 3);
  CHECK(q.rowwise().sum().minCoeff() > 0.9);
}

TEST_CASE("DSelectKRouter gives the same bits for any number of threads and allocates nothing",
          "[moe][router][d_select_k]") {
  Gate router = random_router(8, 4, 2, 0.3, 11, {.entropy = GENERATE(0.0, 0.1)});
  const Matrix<double> x = test::random_matrix(500, 8, 12);
  const Matrix<double> dq = test::random_matrix(500, 16, 13);
  Gate::Cache cache;
  const auto step = [&] {
    router.forward(x, kTraining, cache);
    router.backward(dq, cache);
  };
  step();
  CHECK(test::count_allocations(step) == 0);
  const Matrix<double> q = cache.weights;
  const Matrix<double> dx = cache.dx;
  const double loss = loss_of(router, x);
  const test::Threads threads(3);
  step();
  CHECK(loss_of(router, x) == loss);
  CHECK(cache.weights == q);
  CHECK(cache.dx == dx);
  CHECK(infer(router, Matrix<double>(0, 8)).rows() == 0);
}

TEST_CASE("DSelectKRouter says what does not fit", "[moe][router][d_select_k]") {
  Rng rng(14);
  const auto message = [&](Index d_model, Index experts, const DSelectKRouterConfig& config) {
    return test::message_of<ConfigError>([&] { Gate(d_model, experts, rng, config); });
  };
  CHECK(message(4, 1, {}) == "DSelectKRouter: experts = 1, expected >= 2");
  CHECK(message(4, 8, {.entropy = -1.0}) ==
        "DSelectKRouter: entropy = -1, expected a finite number >= 0");
  CHECK(message(4, 6, {.reach = -1.0}) ==
        "DSelectKRouter: reach = -1, expected a finite number >= 0");
  CHECK(message(4, 8, {.epsilon = -1.0}) ==
        "DSelectKRouter: epsilon = -1, expected a finite number >= 0");
  CHECK(message(4, 6, {.least_reach = 0.0}) ==
        "DSelectKRouter: least_reach = 0, expected a finite number > 0");
  CHECK(message(4, 8, {.k = 0}) == "DSelectKRouter: k = 0, expected >= 1");
  CHECK(message(4, 8, {.gamma = 0.0}) == "DSelectKRouter: gamma = 0, expected a finite number > 0");
  CHECK(message(0, 8, {}) == "DSelectKRouter: d_model = 0, expected >= 1");
  CHECK(test::message_of<ShapeError>([&] {
          Gate(8, Linear<double>(4, 5, rng), Linear<double>(4, 2, rng));
        }) == "DSelectKRouter: selectors is [5, 4], expected [6, 4]");
  CHECK(test::message_of<ShapeError>([&] {
          Gate(8, Linear<double>(4, 6, rng), Linear<double>(3, 2, rng));
        }) == "DSelectKRouter: mixture is [2, 3], expected [2, 4]");
  Gate router(4, 8, rng);
  Gate::Cache cache;
  CHECK(test::message_of<ShapeError>([&] {
          router.forward(Matrix<double>::Zero(1, 3), {}, cache);
        }) == "DSelectKRouter::forward: x is [1, 3], expected [tokens, 4]");
  CHECK(test::message_of<StateError>([&] { router.backward(Matrix<double>::Zero(1, 8), cache); }) ==
        "DSelectKRouter::backward: the cache is empty, expected a forward pass that succeeded");
  router.forward(Matrix<double>::Zero(2, 4), kTraining, cache);
  CHECK(test::message_of<ShapeError>([&] { router.backward(Matrix<double>::Zero(2, 4), cache); }) ==
        "DSelectKRouter::backward: dy is [2, 4], expected [2, 8]");
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
  const Matrix<double> q = exact.forward(x, kTraining, cache);
  CHECK(test::relative_error(router.forward(x.cast<float>(), kTraining, other).cast<double>(), q) <=
        1e-5);
  const Matrix<double> dx = exact.backward(dq, cache);
  CHECK(test::relative_error(router.backward(dq.cast<float>(), other).cast<double>(), dx) <= 1e-5);
}

}  // namespace weir::d_select_k_router_test
