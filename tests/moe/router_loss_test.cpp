// SPDX-License-Identifier: MIT
// Losses on the router's own parameters in a layer.
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include <weir/moe/balance/orthogonality_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/cosine_router.hpp>
#include <weir/moe/router/hash_router.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/router/temperature_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"

using namespace weir;

namespace {

const Matrix<double> kWeight = test::random_matrix(4, 3, 1);
const OrthogonalityLoss<double> kLoss{.coefficient = 0.5};

GluBank<double> bank() {
  Rng rng(2);
  return {4, 3, 2, rng, 1.0};
}

template <class R, class... L>
auto layer(R router, L... losses) {
  return MoELayer(std::move(router), SoftmaxTopK<double>{2}, Dropless{}, bank(), losses...);
}

/// A loss of a user's own, on anything that has a weight.
struct WeightDecay {
  double half = 0.5;

  template <class R>
  double router_loss(const R& router) const {
    return half * router.weight().value.squaredNorm();
  }
  template <class R>
  void add_router_gradient(R& router, double scale) const {
    router.weight().gradient() += 2.0 * half * scale * router.weight().value;
  }
};

/// A term of both kinds.
struct Both : WeightDecay {
  static constexpr std::string_view kName = "both";

  double loss(const Routing<double>& routing) const { return routing.logits.sum(); }
  void add_gradient(const Routing<double>&, RoutingGradient<double>& gradient) const {
    gradient.logits.array() += 1.0;
  }
};

}  // namespace

TEST_CASE("A router loss is differentiated with the rest of the layer",
          "[moe][router_loss][gradient]") {
  const Matrix<double> x = test::random_matrix(5, 3, 3);
  const SwitchLoss<double> other{0.3};
  const Pass pass{.aux_scale = 0.7};
  auto linear = layer(LinearRouter<double>(kWeight), kLoss, other, WeightDecay{});
  test::check_gradients(linear, x, pass);
  auto twice = layer(LinearRouter<double>(kWeight), Both{});
  test::check_gradients(twice, x, pass);
  auto jitter = layer(JitterRouter(LinearRouter<double>(kWeight)), kLoss);
  test::check_gradients(jitter, x, pass);
  auto warm = layer(TemperatureRouter(NoisyRouter<double>(kWeight, kWeight)), kLoss);
  test::check_gradients(warm, x, pass);
  Rng rng(5);
  auto cosine = layer(CosineRouter<double>(3, 4, rng, {.d_projection = 5}), kLoss);
  test::check_gradients(cosine, x, pass);
}

TEST_CASE("A router loss is in the sum of losses and in the report, in its place",
          "[moe][router_loss]") {
  const auto moe = layer(LinearRouter<double>(kWeight), kLoss, SwitchLoss<double>{0.3}, Both{});
  const double orthogonality = kLoss.router_loss(moe.router());
  decltype(moe)::Cache cache;
  moe.forward(test::random_matrix(5, 3, 3), {.aux_scale = 0.5}, cache);
  const MoEReport report = moe.report(cache);
  REQUIRE(report.losses.size() == 3);
  CHECK(report.losses[0] == std::pair(std::string("orthogonality"), orthogonality));
  CHECK(report.losses[1].first == "switch");
  CHECK(report.losses[2].first == "both");
  CHECK(report.losses[2].second ==
        Approx(cache.routing.logits.sum() + 0.5 * kWeight.squaredNorm()));
  CHECK(cache.aux_loss ==
        Approx(0.5 * (orthogonality + report.losses[1].second + report.losses[2].second)));
}

TEST_CASE("A router loss counts once in a batch, however it is cut", "[moe][router_loss]") {
  const Matrix<double> x = test::random_matrix(6, 3, 3);
  auto whole = layer(LinearRouter<double>(kWeight), kLoss);
  decltype(whole)::Cache cache;
  whole.forward(x, cache);
  whole.forward(x, cache);  // As for recomputation: a second forward pass changes nothing.
  whole.backward(Matrix<double>::Zero(6, 3), cache);
  const double loss = cache.aux_loss;

  auto parts = layer(LinearRouter<double>(kWeight), kLoss);
  double sum = 0.0;
  for (const Index tokens : {4, 2, 0}) {
    const double share = static_cast<double>(tokens) / 6.0;
    parts.forward(x.topRows(tokens), {.aux_scale = share}, cache);
    parts.backward(Matrix<double>::Zero(tokens, 3), cache);
    sum += cache.aux_loss;
  }
  CHECK(whole.router().weight().gradient().norm() > 0.01);
  CHECK(sum == Approx(loss));
  CHECK(test::relative_error(parts.router().weight().gradient(),
                             whole.router().weight().gradient()) < 1e-14);
}

TEST_CASE("A router loss is the same without tokens and with padding alone", "[moe][router_loss]") {
  const std::vector<std::uint8_t> mask = {0, 0};
  const Index tokens = GENERATE(0, 2);
  auto moe = layer(LinearRouter<double>(kWeight), kLoss, SwitchLoss<double>{});
  decltype(moe)::Cache cache;
  const Pass pass{.mask = std::span(mask).first(static_cast<std::size_t>(tokens))};
  moe.forward(test::random_matrix(tokens, 3, 3), pass, cache);
  moe.backward(Matrix<double>::Zero(tokens, 3), cache);
  LinearRouter<double> router(kWeight);
  kLoss.add_router_gradient(router, 1.0);
  CHECK(cache.aux_loss == kLoss.router_loss(router));
  CHECK(moe.router().weight().gradient() == router.weight().gradient());
}

TEST_CASE("A frozen router's loss is counted, and its gradient kept as any other",
          "[moe][router_loss]") {
  auto moe = layer(LinearRouter<double>(kWeight), kLoss);
  moe.router().weight().frozen = true;
  decltype(moe)::Cache cache;
  moe.forward(test::random_matrix(5, 3, 3), cache);
  moe.backward(Matrix<double>::Zero(5, 3), cache);
  CHECK(cache.aux_loss == kLoss.router_loss(moe.router()));
  CHECK(moe.router().weight().value == kWeight);
  CHECK(moe.router().weight().gradient().norm() > 0.01);
}

TEST_CASE("A backward pass that is refused leaves the router's gradient alone",
          "[moe][router_loss]") {
  auto moe = layer(LinearRouter<double>(kWeight), kLoss);
  decltype(moe)::Cache cache;
  moe.forward(test::random_matrix(5, 3, 3), cache);
  CHECK_THROWS_AS(moe.backward(Matrix<double>::Zero(4, 3), cache), ShapeError);
  CHECK(moe.router().weight().grad.size() == 0);
}

namespace {

/// Counts how often it is asked for anything.
struct Counted : Both {
  int* calls;

  explicit Counted(int* count) : calls(count) {}
  double loss(const Routing<double>& routing) const { return ++*calls, Both::loss(routing); }
  void add_gradient(const Routing<double>& routing, RoutingGradient<double>& gradient) const {
    ++*calls;
    Both::add_gradient(routing, gradient);
  }
  template <class R>
  double router_loss(const R& router) const {
    return ++*calls, Both::router_loss(router);
  }
  template <class R>
  void add_router_gradient(R& router, double scale) const {
    ++*calls;
    Both::add_router_gradient(router, scale);
  }
};

}  // namespace

TEST_CASE("No loss is computed where its scale is zero", "[moe][router_loss]") {
  int calls = 0;
  auto moe = layer(LinearRouter<double>(kWeight), Counted(&calls));
  decltype(moe)::Cache cache;
  const Matrix<double> x = test::random_matrix(5, 3, 3);
  const auto run = [&](double scale) {
    moe.forward(x, {.aux_scale = scale}, cache);
    moe.backward(Matrix<double>::Zero(5, 3), cache);
    return std::exchange(calls, 0);
  };
  CHECK(run(1.0) == 4);
  zero_gradients(moe);
  CHECK(run(0.0) == 0);
  CHECK(cache.aux_loss == 0.0);
  CHECK(moe.router().weight().gradient().isZero(0.0));
  CHECK(moe.report(cache).losses.size() == 1);  // Which reckons it anew.
}

TEST_CASE("A layer with a router loss allocates nothing in the steady state",
          "[moe][router_loss]") {
  if (!test::allocations_are_counted()) return;
  auto moe = layer(LinearRouter<double>(kWeight), kLoss);
  decltype(moe)::Cache cache;
  const Matrix<double> x = test::random_matrix(5, 3, 3);
  const Matrix<double> dy = Matrix<double>::Zero(5, 3);
  const auto pass = [&] {
    moe.forward(x, cache);
    moe.backward(dy, cache);
  };
  pass();
  CHECK(test::count_allocations(pass) == 0);
}

TEST_CASE("A layer refuses a router loss that does not fit its router", "[moe][router_loss]") {
  CHECK(test::message_of<ConfigError>(
            [] { layer(HashRouter<double>(3, 4, modulo_hash_table(10, 4)), kLoss); }) ==
        "OrthogonalityLoss: the router has no vectors of its experts, expected a parameter "
        "'weight' or 'embedding' of 4 rows");
  CHECK(test::message_of<ConfigError>([] {
          layer(LinearRouter<double>(kWeight), OrthogonalityLoss<double>{.groups = 3});
        }) == "OrthogonalityLoss: groups = 3, expected a divisor of experts = 4");
}
