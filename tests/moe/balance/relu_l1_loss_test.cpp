// SPDX-License-Identifier: MIT
#include <cmath>
#include <type_traits>
#include <vector>

#include <weir/moe/balance/relu_l1_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/relu_routing.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/loss_gradient.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::relu_l1_loss_test {
using test::loss_of;

static_assert(RoutingLoss<ReluL1Loss<float>, float>);
static_assert(BalancingRule<ReluL1Loss<float>, ReluRouting<float>>);

namespace {

const ReluRouting<double> kSelector;

/// Weights (1, 0, 2) and (3, 0, 0), and a token of padding.
Routing<double> routing_by_hand() {
  Matrix<double> logits(3, 3);
  logits << 1.0, -1.0, 2.0, 3.0, -1.0, -2.0, 7.0, 7.0, 7.0;
  const std::vector<std::uint8_t> mask = {1, 1, 0};
  Pass pass;
  pass.mask = mask;
  return test::route(kSelector, logits, pass);
}

/// Tokens with `chosen` of four experts each.
Routing<double> routing_with(Index tokens, Index chosen) {
  Matrix<double> logits = Matrix<double>::Constant(tokens, 4, -1.0);
  logits.leftCols(chosen).setConstant(1.0);
  return test::route(kSelector, logits);
}

}  // namespace

TEST_CASE("ReluL1Loss matches values worked out by hand", "[moe][balance][relu_l1_loss]") {
  const Routing<double> routing = routing_by_hand();
  // Without loads: 0.5 / 2 * (1 + 2 + 3).
  const ReluL1Loss<double> plain({.k = 1, .initial = 0.5, .load_balance = false});
  CHECK(loss_of(plain, routing) == Approx(1.5));
  // c = (2, 0, 1), f = 3 / (1 * 2) * c = (3, 0, 1.5): 0.5 / 2 * (3 * 1 + 1.5 * 2 + 3 * 3).
  const ReluL1Loss<double> balanced({.k = 1, .initial = 0.5});
  CHECK(loss_of(balanced, routing) == Approx(3.75));
  const RoutingGradient<double> gradient = test::gradient_of(balanced, routing);
  RowVector<double> expected(3);  // Token 0 has the experts 2 and 0, token 1 expert 0.
  expected << 0.375, 0.75, 0.75;
  CHECK(test::relative_error(gradient.weights, expected) <= 1e-14);
}

TEST_CASE("ReluL1Loss weighs all weights alike at uniform load", "[moe][balance][relu_l1_loss]") {
  const Routing<double> routing = test::route(kSelector, Matrix<double>::Constant(6, 4, 0.3));
  const double balanced = loss_of(ReluL1Loss<double>({.k = 4, .initial = 2.0}), routing);
  CHECK(balanced == Approx(2.0 * 4.0 * 0.3));
  CHECK(balanced ==
        Approx(
            loss_of(ReluL1Loss<double>({.k = 4, .initial = 2.0, .load_balance = false}), routing)));
}

TEST_CASE("ReluL1Loss has gradients that agree with finite differences",
          "[moe][balance][relu_l1_loss][gradient]") {
  const Matrix<double> logits = test::random_matrix(7, 5, 1);
  const bool load_balance = GENERATE(false, true);
  const ReluL1Loss<double> loss({.k = 2, .initial = 0.3, .load_balance = load_balance});
  test::check_logit_gradient(kSelector, loss, logits, {}, 1e-7);
}

TEST_CASE("ReluL1Loss moves lambda towards k experts per token", "[moe][balance][relu_l1_loss]") {
  ReluRouting<double> selector;
  ReluL1Loss<double> loss({.k = 2, .initial = 1e-3, .multiplier = 1.5});
  const auto after = [&](Index chosen) {
    loss.observe(routing_with(5, chosen));
    loss.update(selector);
    return loss.coefficient();
  };
  CHECK(after(3) == Approx(1.5e-3));
  CHECK(after(4) == Approx(2.25e-3));
  CHECK(after(2) == Approx(2.25e-3));
  CHECK(after(1) == Approx(1.5e-3));
  CHECK(after(0) == Approx(1e-3));
  loss.update(selector);  // Nothing counted.
  CHECK(loss.coefficient() == Approx(1e-3));
  // Micro-batches add up: 5 * 3 + 10 * 1 assignments of 15 tokens are less than two each.
  loss.observe(routing_with(5, 3));
  loss.observe(routing_with(10, 1));
  loss.update(selector);
  CHECK(loss.coefficient() == Approx(1e-3 / 1.5));
  // Padding is no token: (2 + 1) assignments of 2 real tokens.
  loss.observe(routing_by_hand());
  loss.update(selector);
  CHECK(loss.coefficient() == Approx(1e-3 / 2.25));
  loss.set_coefficient(0.25);
  CHECK(loss.coefficient() == 0.25);
}

TEST_CASE("ReluL1Loss does not let lambda shrink to zero", "[moe][balance][relu_l1_loss]") {
  ReluRouting<float> selector;
  ReluL1Loss<float> loss({.k = 2, .multiplier = 1e6});
  Routing<float> routing;
  ReluRouting<float>::Cache cache;
  selector.forward(Matrix<float>::Constant(3, 4, -1.0F), {}, routing, cache);
  for (int step = 0; step < 9; ++step) {
    loss.observe(routing);
    loss.update(selector);
  }
  CHECK(loss.coefficient() > 0.0);
  loss.check();
}

TEST_CASE("ReluL1Loss goes on with its lambda in a layer that was given all parameters and buffers",
          "[moe][balance][relu_l1_loss]") {
  const auto fresh = [] {
    Rng rng(5);
    return MoELayer(LinearRouter<double>(3, 4, rng, {.init_scale = 3.0}), ReluRouting<double>(),
                    Dropless(), GluBank<double>(3, 4, 2, rng),
                    ReluL1Loss<double>({.k = 1, .initial = 0.1}));
  };
  const Matrix<double> x = test::random_matrix(7, 3, 6);
  const auto step = [&](auto& layer) {
    PassRecord record;
    typename std::remove_cvref_t<decltype(layer)>::Cache cache;
    layer.forward(x, test::recorded({}, record), cache);
    layer.backward(Matrix<double>::Ones(7, 3), cache);
    for (auto& [name, parameter] : parameters(layer)) {
      parameter->value -= 0.01 * parameter->gradient();
    }
    zero_gradients(layer);
    update(layer);
    return record.aux_loss("relu_l1");
  };
  auto trained = fresh();
  for (int i = 0; i < 5; ++i) step(trained);
  REQUIRE(buffers(trained).size() == 1);
  CHECK(buffers(trained)[0].name == "balancers.0.coefficient");

  auto resumed = fresh();
  for (const auto& [name, parameter] : parameters(trained)) {
    for (auto& [other, copy] : parameters(resumed)) {
      if (other == name) copy->value = parameter->value;
    }
  }
  for (const auto& [name, buffer] : buffers(trained)) {
    for (auto& [other, copy] : buffers(resumed)) {
      if (other == name) copy->value = buffer->value;
    }
  }
  CHECK(resumed.balancer<0>().coefficient() == trained.balancer<0>().coefficient());
  CHECK(resumed.balancer<0>().coefficient() != 0.1);
  const double expected = step(trained);
  CHECK(expected > 0.0);
  CHECK(step(resumed) == expected);
}

TEST_CASE("ReluL1Loss is zero without tokens or experts", "[moe][balance][relu_l1_loss]") {
  const ReluL1Loss<double> loss;
  for (const Index tokens : {0, 3}) {
    const Routing<double> routing = routing_with(tokens, 0);
    CHECK(loss_of(loss, routing) == 0.0);
    CHECK(test::gradient_of(loss, routing).weights.size() == 0);
  }
}

TEST_CASE("A layer with ReLU routing and its loss has the right gradients",
          "[moe][balance][relu_l1_loss][gradient]") {
  Rng rng(2);
  MoELayer layer(LinearRouter<double>(test::random_matrix(4, 3, 3)), ReluRouting<double>(),
                 Dropless(), GluBank<double>(3, 4, 5, rng),
                 ReluL1Loss<double>({.k = 2, .initial = 0.1}));
  test::check_gradients(layer, test::random_matrix(6, 3, 4));
  const double before = layer.balancer<0>().coefficient();
  update(layer);
  CHECK(layer.balancer<0>().coefficient() != before);
}

TEST_CASE("ReluL1Loss names the setting that is out of range", "[moe][balance][relu_l1_loss]") {
  const auto message = [](const ReluL1LossConfig& config) {
    return test::message_of<ConfigError>([&] { const ReluL1Loss<double> made(config); });
  };
  CHECK(message({.k = 0}) == "ReluL1Loss: k = 0, expected >= 1");
  CHECK(message({.initial = 0.0}) == "ReluL1Loss: initial = 0, expected a finite number > 0");
  CHECK(message({.multiplier = 0.5}) ==
        "ReluL1Loss: multiplier = 0.5, expected a finite number >= 1");
  CHECK(test::message_of<ConfigError>([] { ReluL1Loss<double>{}.set_coefficient(0.0); }) ==
        "ReluL1Loss: coefficient = 0, expected a finite number > 0");
}

}  // namespace weir::relu_l1_loss_test
