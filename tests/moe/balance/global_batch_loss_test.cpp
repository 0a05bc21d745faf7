// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/balance/global_batch_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/loss_gradient.hpp"
#include "support/routing.hpp"

namespace weir::global_batch_loss_test {
using test::logit_gradient;
using test::loss_of;
using test::route;

static_assert(RoutingLoss<GlobalBatchLoss<float>, float>);
static_assert(BalancingRule<GlobalBatchLoss<float>, SoftmaxTopK<float>>);

namespace {

/// One token, probabilities (3/4, 1/4).
Matrix<double> first() {
  Matrix<double> logits(1, 2);
  logits << std::log(3.0), 0.0;
  return logits;
}

/// Two tokens, probabilities (1/4, 3/4).
Matrix<double> second() {
  Matrix<double> logits(2, 2);
  logits << 0.0, std::log(3.0), 0.0, std::log(3.0);
  return logits;
}

/// The value of the only loss of a layer, as its report has it.
template <class Layer>
double reported_loss(const Layer& layer, const typename Layer::Cache& cache) {
  const LayerReport report = layer.report(cache);
  return report.losses.size() == 1 ? report.losses.front().second : NAN;
}

}  // namespace

TEST_CASE(
    "GlobalBatchLoss takes the fractions of the step and the probabilities of the micro-batch",
    "[moe][balance][global_batch_loss]") {
  // Alone: f = (1, 0), 2 * 3/4. After it: f = (1, 2)/3, P = (1, 3)/4, 2 * 7/12.
  const SoftmaxTopK<double> selector({.k = 1});
  GlobalBatchLoss<double> balancer({.coefficient = 0.5});
  CHECK(loss_of(balancer, route(selector, first())) == Approx(0.5 * 1.5));
  balancer.observe(route(selector, first()));
  CHECK(loss_of(balancer, route(selector, second())) == Approx(0.5 * 7.0 / 6.0));
  balancer.observe(route(selector, second()));
  CHECK(balancer.load() == RowVector<double>(Eigen::RowVector2d(1.0, 2.0)));

  SoftmaxTopK<double> any = selector;
  balancer.update(any);
  CHECK(balancer.load().isZero(0.0));
  CHECK(loss_of(balancer, route(selector, second())) == Approx(0.5 * 1.5));
}

TEST_CASE("GlobalBatchLoss counts other ranks as if they were earlier micro-batches",
          "[moe][balance][global_batch_loss]") {
  const SoftmaxTopK<double> selector({.k = 1});
  GlobalBatchLoss<double> balancer({.coefficient = 0.5});
  balancer.add_load(Eigen::RowVector2d(1.0, 0.0));
  CHECK(loss_of(balancer, route(selector, second())) == Approx(0.5 * 7.0 / 6.0));
  CHECK(test::message_of<ShapeError>([&] { balancer.add_load(RowVector<double>::Zero(3)); }) ==
        "GlobalBatchLoss::add_load: load is [1, 3], expected [1, 2]");
  CHECK(balancer.load().sum() == 1.0);
}

TEST_CASE("GlobalBatchLoss of the first micro-batch is the Switch loss",
          "[moe][balance][global_batch_loss]") {
  const auto seed = GENERATE(as<std::uint64_t>{}, 1, 2, 3);
  const auto k = GENERATE(as<Index>{}, 1, 2, 5);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 0, 1};
  const SoftmaxTopK<double> selector({.k = k});
  const Routing<double> routing = route(selector, test::random_matrix(7, 5, seed), {.mask = mask});
  const GlobalBatchLoss<double> balancer({.coefficient = 0.3});
  const SwitchLoss<double> expected({.coefficient = 0.3});
  CHECK(loss_of(balancer, routing) == Approx(loss_of(expected, routing)));
  CHECK(test::relative_error(
            logit_gradient(selector, balancer, test::random_matrix(7, 5, seed), {.mask = mask}),
            logit_gradient(selector, expected, test::random_matrix(7, 5, seed), {.mask = mask})) <
        1e-14);
}

TEST_CASE("GlobalBatchLoss is zero without real tokens", "[moe][balance][global_batch_loss]") {
  GlobalBatchLoss<double> balancer({.coefficient = 1.0});
  const SoftmaxTopK<double> selector({.k = 1});
  const std::vector<std::uint8_t> mask = {0, 0};
  const Routing<double> padding = route(selector, second(), {.mask = mask});
  for (int counted = 0; counted < 2; ++counted) {
    CHECK(loss_of(balancer, route(selector, Matrix<double>(0, 2))) == 0.0);
    CHECK(loss_of(balancer, padding) == 0.0);
    CHECK(logit_gradient(selector, balancer, second(), {.mask = mask}).isZero(0.0));
    balancer.observe(padding);
    CHECK(balancer.load().isZero(0.0));
  }
}

TEST_CASE("GlobalBatchLoss gradient agrees with finite differences",
          "[moe][balance][global_batch_loss][gradient]") {
  Matrix<double> logits = test::random_matrix(7, 5, 5);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1};
  const Pass pass{.mask = mask};
  GlobalBatchLoss<double> balancer({.coefficient = 0.5});
  balancer.observe(route(SoftmaxTopK<double>({.k = 2}), test::random_matrix(4, 5, 6)));
  const auto check = [&](const auto& selector) {
    test::check_logit_gradient(selector, balancer, logits, pass);
  };
  check(SoftmaxTopK<double>({.k = 2}));
  check(SigmoidTopK<double>(5, {.k = 2}));
}

TEST_CASE("GlobalBatchLoss counts a forward pass that is run again once",
          "[moe][balance][global_batch_loss]") {
  Rng rng(3);
  MoELayer moe(LinearRouter<double>(3, 4, rng, {.init_scale = 10.0}), SoftmaxTopK<double>({.k = 2}),
               Dropless(), GluBank<double>(3, 4, 2, rng),
               GlobalBatchLoss<double>({.coefficient = 0.5}));
  const Matrix<double> x = test::random_matrix(5, 3, 1);
  const Matrix<double> dy = Matrix<double>::Ones(5, 3);
  decltype(moe)::Cache cache;
  moe.forward(x, kTraining, cache);
  const double loss = reported_loss(moe, cache);
  moe.forward(x, kTraining, cache);
  CHECK(reported_loss(moe, cache) == loss);
  CHECK(moe.balancer<0>().load().size() == 0);
  moe.backward(dy, cache);
  CHECK(moe.balancer<0>().load().sum() == 10.0);
  update(moe);
  CHECK(moe.balancer<0>().load().isZero(0.0));
}

TEST_CASE("GlobalBatchLoss reports what its backward pass differentiates, whatever else is counted",
          "[moe][balance][global_batch_loss][gradient]") {
  const auto layer = [] {
    Rng rng(3);
    return MoELayer(LinearRouter<double>(3, 4, rng, {.init_scale = 10.0}),
                    SoftmaxTopK<double>({.k = 2}), Dropless(), GluBank<double>(3, 4, 2, rng),
                    GlobalBatchLoss<double>({.coefficient = 0.5}));
  };
  const Matrix<double> x = test::random_matrix(5, 3, 1);
  const Matrix<double> other = test::random_matrix(9, 3, 2);
  const Matrix<double> nothing = Matrix<double>::Zero(5, 3);
  auto alone = layer();
  decltype(alone)::Cache alone_cache;
  alone.forward(x, kTraining, alone_cache);
  const double loss = reported_loss(alone, alone_cache);
  alone.backward(nothing, alone_cache);
  CHECK(loss > 0.1);

  auto moe = layer();
  decltype(moe)::Cache cache, other_cache;
  moe.forward(x, kTraining, cache);
  moe.forward(other, kTraining, other_cache);
  moe.backward(Matrix<double>::Zero(9, 3), other_cache);
  zero_gradients(moe);
  CHECK(reported_loss(moe, cache) == loss);
  moe.backward(nothing, cache);
  CHECK(reported_loss(moe, cache) == loss);
  CHECK(moe.router().weight().gradient() == alone.router().weight().gradient());
  update(moe);
  CHECK(reported_loss(moe, cache) == loss);
  // Within the step, the other micro-batch would have been counted.
  moe.forward(other, kTraining, other_cache);
  moe.backward(Matrix<double>::Zero(9, 3), other_cache);
  moe.forward(x, kTraining, cache);
  CHECK(std::abs(reported_loss(moe, cache) - loss) > 1e-3);
}

TEST_CASE("GlobalBatchLoss refuses a negative coefficient", "[moe][balance][global_batch_loss]") {
  CHECK(test::message_of<ConfigError>([] { GlobalBatchLoss<float>({.coefficient = -1.0}); }) ==
        "GlobalBatchLoss: coefficient = -1, expected a finite number >= 0");
}

}  // namespace weir::global_batch_loss_test
