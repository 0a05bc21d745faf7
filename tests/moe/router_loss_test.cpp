// SPDX-License-Identifier: MIT
// Losses on the router's own parameters in a layer.
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
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
#include "support/same_draws.hpp"

namespace weir::router_loss_test {

namespace {

const Matrix<double> kWeight = test::random_matrix(4, 3, 1);
const OrthogonalityLoss<double> kLoss({.coefficient = 0.5});

GluBank<double> bank() {
  Rng rng(2);
  return {3, 4, 2, rng};
}

template <class R, class... L>
auto layer(R router, L... losses) {
  return MoELayer(std::move(router), SoftmaxTopK<double>({.k = 2}), Dropless(), bank(), losses...);
}

/// A loss of a user's own, on anything that has a weight.
struct WeightDecay : BalancerBase {
  double half = 0.5;

  template <class R>
  requires requires(const R& router) { router.weight(); }
  double forward(const R& router, Cache& /*cache*/) const {
    return half * router.weight().value.squaredNorm();
  }
  template <class R>
  requires requires(const R& router) { router.weight(); }
  void backward(R& router, double scale, Cache& /*cache*/) const {
    router.weight().gradient() += 2.0 * half * scale * router.weight().value;
  }
};

/// A term of both kinds.
struct Both : WeightDecay {
  static constexpr std::string_view kName = "both";

  using WeightDecay::backward;
  using WeightDecay::forward;
  double forward(const Routing<double>& routing, Cache& /*cache*/) const {
    return routing.logits.sum();
  }
  void backward(const Routing<double>& /*routing*/, double scale, RoutingGradient<double>& gradient,
                Cache& /*cache*/) const {
    gradient.logits.array() += scale;
  }
};

/// The sum of the losses of a pass, and their gradient for the router alone.
template <class L>
double pass_with_losses(L& moe, const Matrix<double>& x, Pass pass = {}) {
  PassRecord record;
  typename L::Cache cache;
  moe.forward(x, test::recorded(pass, record), cache);
  moe.backward(Matrix<double>::Zero(x.rows(), x.cols()), cache);
  return record.aux_loss();
}

/// kLoss of a router, whose gradient it is added to.
double loss_and_gradient(LinearRouter<double>& router) {
  OrthogonalityLoss<double>::Cache cache;
  const double loss = kLoss.forward(router, cache);
  kLoss.backward(router, 1.0, cache);
  return loss;
}

}  // namespace

TEST_CASE("A router loss is differentiated with the rest of the layer",
          "[moe][router_loss][gradient]") {
  const Matrix<double> x = test::random_matrix(5, 3, 3);
  const SwitchLoss<double> other({.coefficient = 0.3});
  const Pass pass{.aux_scale = 0.7};
  auto linear = layer(LinearRouter<double>(kWeight), kLoss, other, WeightDecay{});
  test::check_gradients(linear, x, pass);
  auto twice = layer(LinearRouter<double>(kWeight), Both{});
  test::check_gradients(twice, x, pass);
  test::SameDraws<decltype(layer(JitterRouter(LinearRouter<double>(kWeight)), kLoss))> jitter{
      layer(JitterRouter(LinearRouter<double>(kWeight)), kLoss)};
  test::check_gradients(jitter, x, pass);
  const TemperatureRouter temperature(NoisyRouter<double>(kWeight, kWeight));
  test::SameDraws<decltype(layer(temperature, kLoss))> warm{layer(temperature, kLoss)};
  test::check_gradients(warm, x, pass);
  Rng rng(5);
  auto cosine = layer(CosineRouter<double>(3, 4, rng, {.d_projection = 5}), kLoss);
  test::check_gradients(cosine, x, pass);
}

TEST_CASE("A router loss is recorded and reported in its place, scaled by the pass",
          "[moe][router_loss]") {
  const auto moe =
      layer(LinearRouter<double>(kWeight), kLoss, SwitchLoss<double>({.coefficient = 0.3}), Both{});
  LinearRouter<double> alone(kWeight);
  const double orthogonality = loss_and_gradient(alone);
  decltype(moe)::Cache cache;
  PassRecord record;
  moe.forward(test::random_matrix(5, 3, 3), {.aux_scale = 0.5, .record = &record}, cache);
  const LayerReport report = moe.report(cache);
  REQUIRE(report.losses.size() == 3);
  CHECK(report.losses[0] == std::pair(std::string("orthogonality"), 0.5 * orthogonality));
  CHECK(report.losses[1].first == "switch");
  CHECK(report.losses[2].first == "both");
  CHECK(report.losses[2].second ==
        Approx(0.5 * (cache.routing.logits.sum() + 0.5 * kWeight.squaredNorm())));
  CHECK(record.aux_loss() ==
        Approx(0.5 * orthogonality + report.losses[1].second + report.losses[2].second));
}

TEST_CASE("A router loss counts once in a batch, however it is cut", "[moe][router_loss]") {
  const Matrix<double> x = test::random_matrix(6, 3, 3);
  auto whole = layer(LinearRouter<double>(kWeight), kLoss);
  decltype(whole)::Cache cache;
  whole.forward(x, kTraining, cache);  // As for recomputation: a second forward pass changes
  whole.forward(x, kTraining, cache);  // nothing.
  whole.backward(Matrix<double>::Zero(6, 3), cache);
  LinearRouter<double> alone(kWeight);
  const double loss = loss_and_gradient(alone);

  auto parts = layer(LinearRouter<double>(kWeight), kLoss);
  double sum = 0.0;
  for (const Index tokens : {4, 2, 0}) {
    const double share = static_cast<double>(tokens) / 6.0;
    sum += pass_with_losses(parts, x.topRows(tokens), {.aux_scale = share});
  }
  CHECK(whole.router().weight().gradient().norm() > 0.01);
  CHECK(sum == Approx(loss));
  CHECK(test::relative_error(parts.router().weight().gradient(),
                             whole.router().weight().gradient()) < 1e-14);
}

TEST_CASE("A router loss is the same without tokens and with padding alone", "[moe][router_loss]") {
  const std::vector<std::uint8_t> mask = {0, 0};
  const Index tokens = GENERATE(0, 2);
  auto moe = layer(LinearRouter<double>(kWeight), kLoss, SwitchLoss<double>());
  const Pass pass{.mask = std::span(mask).first(static_cast<std::size_t>(tokens))};
  const double loss = pass_with_losses(moe, test::random_matrix(tokens, 3, 3), pass);
  LinearRouter<double> router(kWeight);
  CHECK(loss == loss_and_gradient(router));
  CHECK(moe.router().weight().gradient() == router.weight().gradient());
}

TEST_CASE("OrthogonalityLoss counts the vectors of experts that a pass switches off",
          "[moe][router_loss][allowed]") {
  auto moe = layer(LinearRouter<double>(kWeight), kLoss);
  const std::vector<std::uint8_t> allowed = {1, 0, 1, 1};
  const double loss = pass_with_losses(moe, test::random_matrix(5, 3, 3), {.allowed = allowed});
  LinearRouter<double> router(kWeight);
  CHECK(loss == loss_and_gradient(router));
  CHECK(moe.router().weight().gradient() == router.weight().gradient());
}

TEST_CASE("A frozen router's loss is counted, and its gradient kept as any other",
          "[moe][router_loss]") {
  auto moe = layer(LinearRouter<double>(kWeight), kLoss);
  moe.router().weight().frozen = true;
  LinearRouter<double> router(kWeight);
  CHECK(pass_with_losses(moe, test::random_matrix(5, 3, 3)) == loss_and_gradient(router));
  CHECK(moe.router().weight().value == kWeight);
  CHECK(moe.router().weight().gradient().norm() > 0.01);
}

TEST_CASE("A backward pass that is refused leaves the router's gradient alone",
          "[moe][router_loss]") {
  auto moe = layer(LinearRouter<double>(kWeight), kLoss);
  decltype(moe)::Cache cache;
  moe.forward(test::random_matrix(5, 3, 3), kTraining, cache);
  CHECK_THROWS_AS(moe.backward(Matrix<double>::Zero(4, 3), cache), ShapeError);
  CHECK(moe.router().weight().grad.size() == 0);
}

namespace {

/// Counts how often it is asked for anything.
struct Counted : Both {
  int* calls;

  explicit Counted(int* count) : calls(count) {}
  template <class From>
  requires requires(const Both& both, const From& from, Cache& cache) { both.forward(from, cache); }
  double forward(const From& from, Cache& cache) const {
    return ++*calls, Both::forward(from, cache);
  }
  template <class... Args>
  requires requires(const Both& both, Args&... args) { both.backward(args...); }
  void backward(Args&... args) const {
    ++*calls;
    Both::backward(args...);
  }
};

}  // namespace

TEST_CASE("No loss is computed where its scale is zero, or no one can ask for it",
          "[moe][router_loss]") {
  int calls = 0;
  auto moe = layer(LinearRouter<double>(kWeight), Counted(&calls));
  const Matrix<double> x = test::random_matrix(5, 3, 3);
  PassRecord record;
  decltype(moe)::Cache cache;
  const auto run = [&](double scale) {
    record.clear();
    moe.forward(x, {.training = true, .aux_scale = scale, .record = &record}, cache);
    moe.backward(Matrix<double>::Zero(5, 3), cache);
    return std::exchange(calls, 0);
  };
  CHECK(run(1.0) == 4);
  CHECK(record.aux_loss("both") != 0.0);
  zero_gradients(moe);
  CHECK(run(0.0) == 0);
  CHECK(record.losses().empty());
  CHECK(moe.router().weight().gradient().isZero(0.0));
  CHECK(moe.report(cache).losses.empty());
  infer(moe, x);
  CHECK(calls == 0);
}

TEST_CASE("A layer with a router loss allocates nothing in the steady state",
          "[moe][router_loss]") {
  if (!test::allocations_are_counted()) return;
  auto moe = layer(LinearRouter<double>(kWeight), kLoss);
  decltype(moe)::Cache cache;
  const Matrix<double> x = test::random_matrix(5, 3, 3);
  const Matrix<double> dy = Matrix<double>::Zero(5, 3);
  const auto pass = [&] {
    moe.forward(x, kTraining, cache);
    moe.backward(dy, cache);
  };
  pass();
  CHECK(test::count_allocations(pass) == 0);
}

TEST_CASE("A layer refuses a router loss that does not fit its router", "[moe][router_loss]") {
  CHECK(test::message_of<ConfigError>(
            [] { layer(HashRouter<double>(3, 4, modulo_hash_table(10, 4)), kLoss); }) ==
        "OrthogonalityLoss: the router has no vectors of its experts, expected one such as "
        "LinearRouter");
  CHECK(test::message_of<ConfigError>([] {
          layer(LinearRouter<double>(kWeight), OrthogonalityLoss<double>({.groups = 3}));
        }) == "OrthogonalityLoss: groups = 3, expected a divisor of experts = 4");
}

}  // namespace weir::router_loss_test
