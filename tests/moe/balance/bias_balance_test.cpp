// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/report.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"

namespace weir::bias_balance_test {
using test::route;

static_assert(BalancingRule<BiasBalance<float>, SigmoidTopK<float>>);
static_assert(!BalancingRule<BiasBalance<float>, SoftmaxTopK<float>>);
static_assert(!RoutingLoss<BiasBalance<float>, float>);
static_assert(BiasedSelector<SigmoidTopK<float>>);
static_assert(!BiasedSelector<SoftmaxTopK<float>>);

namespace {

/// One token per entry, whose best expert is that entry.
Matrix<double> choices(const std::vector<Index>& experts) {
  Matrix<double> logits = Matrix<double>::Zero(static_cast<Index>(experts.size()), 4);
  for (Index t = 0; t < logits.rows(); ++t) logits(t, experts[static_cast<std::size_t>(t)]) = 1.0;
  return logits;
}

Matrix<double> row(double a, double b, double c, double d) {
  Matrix<double> m(1, 4);
  m << a, b, c, d;
  return m;
}

auto small_layer(Index k) {
  Rng rng(3);
  return MoELayer(LinearRouter<double>(3, 4, rng, {.init_scale = 10.0}),
                  SigmoidTopK<double>(4, {.k = k}), Dropless(), GluBank<double>(3, 4, 2, rng),
                  BiasBalance<double>({.rate = 0.5}));
}

}  // namespace

TEST_CASE("BiasBalance moves the bias by the sign of what an expert lacks",
          "[moe][balance][bias_balance]") {
  // Load (3, 2, 2, 1), mean 2.
  SigmoidTopK<double> selector(4, {.k = 1});
  BiasBalance<double> balancer({.rate = 0.25});
  balancer.observe(route(selector, choices({0, 1, 2, 0, 1, 2, 0, 3})));
  CHECK(balancer.load() == RowVector<double>(row(3, 2, 2, 1)));

  balancer.update(selector);
  CHECK(selector.selection_bias().value == row(-0.25, 0.0, 0.0, 0.25));

  SECTION("and starts counting anew") {
    CHECK(balancer.load().isZero(0.0));
    balancer.update(selector);
    CHECK(selector.selection_bias().value == row(-0.25, 0.0, 0.0, 0.25));
  }
  SECTION("by a rate that a schedule may change") {
    balancer.set_rate(0.0);
    balancer.observe(route(selector, choices({0, 0})));
    balancer.update(selector);
    CHECK(selector.selection_bias().value == row(-0.25, 0.0, 0.0, 0.25));
    CHECK(balancer.config().rate == 0.0);
  }
}

TEST_CASE("BiasBalance adds up micro-batches", "[moe][balance][bias_balance]") {
  // Each would move the bias another way: (2, 0, 0, 0), then (0, 2, 2, 1).
  SigmoidTopK<double> selector(4, {.k = 1});
  BiasBalance<double> balancer({.rate = 1.0});
  balancer.observe(route(selector, choices({0, 0})));
  balancer.observe(route(selector, choices({1, 1, 2, 2, 3})));
  balancer.update(selector);
  CHECK(selector.selection_bias().value == row(-1, -1, -1, 1));
}

TEST_CASE("BiasBalance may move the bias in proportion to what an expert lacks",
          "[moe][balance][bias_balance]") {
  // Load (4, 2, 2, 0), mean 2: (2 - c) / 2 = (-1, 0, 0, 1).
  SigmoidTopK<double> selector(4, {.k = 1});
  BiasBalance<double> balancer({.rate = 0.25, .rule = BiasRule::kProportional});
  balancer.observe(route(selector, choices({0, 0, 1, 2, 0, 1, 2, 0})));
  balancer.update(selector);
  CHECK(selector.selection_bias().value == row(-0.25, 0.0, 0.0, 0.25));
  balancer.add_load(RowVector<double>(row(3, 2, 2, 1)));
  balancer.update(selector);
  CHECK(selector.selection_bias().value == row(-0.375, 0.0, 0.0, 0.375));
}

TEST_CASE("BiasBalance shifts the bias to mean zero if asked to", "[moe][balance][bias_balance]") {
  // Load (5, 1, 1, 1), mean 2: by the sign (-1, 1, 1, 1), whose mean is 1/2.
  SigmoidTopK<double> selector(4, {.k = 1});
  BiasBalance<double> balancer({.rate = 1.0, .recentre = true});
  balancer.observe(route(selector, choices({0, 1, 2, 3, 0, 0, 0, 0})));
  balancer.update(selector);
  CHECK(selector.selection_bias().value == row(-1.5, 0.5, 0.5, 0.5));
}

TEST_CASE("A frozen BiasBalance leaves the bias and forgets", "[moe][balance][bias_balance]") {
  SigmoidTopK<double> selector(4, {.k = 1});
  BiasBalance<double> balancer({.rate = 1.0});
  balancer.set_frozen(true);
  CHECK(balancer.frozen());
  balancer.observe(route(selector, choices({0, 0})));
  balancer.update(selector);
  CHECK(selector.selection_bias().value.isZero(0.0));
  balancer.set_frozen(false);
  balancer.update(selector);
  CHECK(selector.selection_bias().value.isZero(0.0));
}

TEST_CASE("BiasBalance adds the counts of other ranks", "[moe][balance][bias_balance]") {
  SigmoidTopK<double> selector(4, {.k = 1});
  BiasBalance<double> balancer({.rate = 1.0});
  balancer.observe(route(selector, choices({0, 0})));
  balancer.add_load(RowVector<double>(row(0, 2, 2, 1)));
  CHECK(test::message_of<ShapeError>([&] { balancer.add_load(RowVector<double>::Zero(3)); }) ==
        "BiasBalance::add_load: load is [1, 3], expected [1, 4]");
  CHECK(balancer.load() == RowVector<double>(row(2, 2, 2, 1)));
  balancer.update(selector);
  CHECK(selector.selection_bias().value == row(-1, -1, -1, 1));
}

TEST_CASE("BiasBalance without anything counted leaves the bias", "[moe][balance][bias_balance]") {
  SigmoidTopK<double> selector(4, {.k = 1});
  BiasBalance<double> balancer({.rate = 1.0});
  balancer.update(selector);
  CHECK(balancer.load().size() == 0);
  balancer.observe(route(selector, Matrix<double>(0, 4)));
  balancer.update(selector);
  CHECK(selector.selection_bias().value.isZero(0.0));
}

TEST_CASE("BiasBalance counts what is dropped and not what is padding",
          "[moe][balance][bias_balance]") {
  SigmoidTopK<double> selector(4, {.k = 1});
  BiasBalance<double> balancer;
  const std::vector<std::uint8_t> mask = {1, 0, 1, 1, 0};
  Routing<double> routing = route(selector, choices({0, 1, 0, 2, 3}), {.mask = mask});
  test::limit(FixedCapacity({.capacity = 1}), routing);
  balancer.observe(routing);
  CHECK(balancer.load() == RowVector<double>(row(2, 0, 1, 0)));
}

TEST_CASE("BiasBalance leaves the bias of an expert alone that no token was allowed",
          "[moe][balance][bias_balance]") {
  // Load (3, 2, 1, 0); the last expert has failed, so that the mean is 2.
  const std::vector<std::uint8_t> three = {1, 1, 1, 0};
  const Pass failed{.allowed = three};
  SigmoidTopK<double> selector(4, {.k = 1});
  selector.selection_bias().value = row(0, 0, 0, 0.0625);
  BiasBalance<double> balancer({.rate = 0.25});
  balancer.observe(route(selector, choices({0, 0, 1, 0, 1, 2}), failed));
  CHECK(std::vector<std::uint8_t>(balancer.allowed().begin(), balancer.allowed().end()) == three);
  balancer.update(selector);
  CHECK(selector.selection_bias().value == row(-0.25, 0.0, 0.25, 0.0625));

  SECTION("however long, and whatever the rule") {
    const auto rule = GENERATE(BiasRule::kSign, BiasRule::kProportional);
    const bool recentre = GENERATE(false, true);
    BiasBalance<double> longer({.rate = 0.25, .rule = rule, .recentre = recentre});
    Matrix<double>& bias = selector.selection_bias().value;
    for (int step = 0; step < 50; ++step) {
      longer.observe(route(selector, choices({0, 0, 1, 0, 1, 2}), failed));
      longer.update(selector);
      REQUIRE(bias(0, 3) == 0.0625);
    }
    if (recentre) CHECK(std::abs(bias.leftCols(3).sum()) <= 1e-12);
  }
  SECTION("until one is allowed it, which is not padding") {
    std::vector<std::uint8_t> each = {1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1};
    const std::vector<std::uint8_t> mask = {1, 1, 0};
    selector.selection_bias().value.setZero();
    balancer.observe(route(selector, choices({0, 0, 1}), {.mask = mask, .allowed = each}));
    balancer.update(selector);
    CHECK(selector.selection_bias().value == row(-0.25, 0.25, 0.25, 0.0));
    balancer.observe(route(selector, choices({0, 0, 1}), {.allowed = each}));
    balancer.update(selector);
    CHECK(selector.selection_bias().value(0, 3) == 0.25);
  }
  SECTION("of any micro-batch") {
    const std::vector<std::uint8_t> last = {0, 0, 1, 1};
    selector.selection_bias().value.setZero();
    balancer.observe(route(selector, choices({0, 0}), failed));
    balancer.observe(route(selector, choices({2}), {.allowed = last}));
    balancer.update(selector);
    CHECK(selector.selection_bias().value == row(-0.25, 0.25, -0.25, 0.25));
  }
}

TEST_CASE("BiasBalance is told by other ranks which experts they were allowed",
          "[moe][balance][bias_balance]") {
  const std::vector<std::uint8_t> three = {1, 1, 1, 0};
  SigmoidTopK<double> selector(4, {.k = 1});
  BiasBalance<double> balancer({.rate = 1.0});
  balancer.add_load(RowVector<double>(row(3, 2, 1, 0)), three);
  balancer.update(selector);
  CHECK(selector.selection_bias().value == row(-1, 0, 1, 0));
  balancer.add_load(RowVector<double>(row(3, 2, 1, 0)), three);
  balancer.add_load(RowVector<double>(row(0, 0, 0, 0)));  // All.
  balancer.update(selector);
  CHECK(selector.selection_bias().value == row(-2, -1, 2, 1));
  CHECK(test::message_of<ShapeError>([&] {
          balancer.add_load(RowVector<double>::Zero(4), std::span(three).first(3));
        }) == "BiasBalance::add_load: allowed has 3 entries, expected 4");
}

TEST_CASE("Only backward passes count for BiasBalance", "[moe][balance][bias_balance]") {
  auto moe = small_layer(2);
  const Matrix<double> x = test::random_matrix(5, 3, 1);
  decltype(moe)::Cache cache;
  PassRecord record;
  moe.forward(x, {}, cache);
  moe.forward(x, test::recorded({}, record), cache);
  CHECK(moe.balancer<0>().load().size() == 0);
  CHECK(record.losses().empty());

  moe.backward(Matrix<double>::Ones(5, 3), cache);
  CHECK(moe.balancer<0>().load().sum() == 10.0);
  moe.forward(x, kTraining, cache);
  moe.backward(Matrix<double>::Ones(5, 3), cache);
  CHECK(moe.balancer<0>().load().sum() == 20.0);

  const RowVector<double> lack = 5.0 - moe.balancer<0>().load().array();
  update(moe);
  const Matrix<double>& bias = moe.selector().selection_bias().value;
  CHECK(bias == Matrix<double>(0.5 * lack.array().sign()));
  CHECK(bias.cwiseAbs().sum() > 0.0);
}

TEST_CASE("The bias changes neither weights nor gradients", "[moe][balance][bias_balance]") {
  // With k = experts nothing is left to choose: only an expert's place in the list may change.
  auto plain = small_layer(4);
  auto biased = small_layer(4);
  biased.selector().selection_bias().value << 0.3, -2.0, 0.0, 1.0;
  const Matrix<double> x = test::random_matrix(5, 3, 1);
  const Matrix<double> dy = test::random_matrix(5, 3, 2);
  decltype(plain)::Cache plain_cache;
  decltype(plain)::Cache biased_cache;

  CHECK(test::relative_error(biased.forward(x, kTraining, biased_cache),
                             plain.forward(x, kTraining, plain_cache)) < 1e-14);
  CHECK(test::relative_error(biased.backward(dy, biased_cache), plain.backward(dy, plain_cache)) <
        1e-14);
  const auto expected = parameters(plain);
  const auto actual = parameters(biased);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    INFO(expected[i].name);
    CHECK(test::relative_error(actual[i].parameter->grad, expected[i].parameter->grad) < 1e-14);
  }
}

TEST_CASE("BiasBalance levels a skewed router", "[moe][balance][bias_balance]") {
  Matrix<double> logits = 0.5 * test::random_matrix(256, 8, 7);
  logits.rowwise() += RowVector<double>::LinSpaced(8, 1.0, -1.0);
  SigmoidTopK<double> selector(8, {.k = 2});
  BiasBalance<double> balancer({.rate = 0.01});

  CHECK(report_of(route(selector, logits)).imbalance() > 2.0);
  for (int step = 0; step < 100; ++step) {
    balancer.observe(route(selector, logits));
    balancer.update(selector);
  }
  CHECK(report_of(route(selector, logits)).imbalance() < 1.2);
}

TEST_CASE("BiasBalance refuses a negative rate", "[moe][balance][bias_balance]") {
  const std::string message = "BiasBalance: rate = -1, expected a finite number >= 0";
  CHECK(test::message_of<ConfigError>([] { BiasBalance<float>({.rate = -1.0}); }) == message);
  BiasBalance<float> balancer;
  CHECK(test::message_of<ConfigError>([&] { balancer.set_rate(-1.0); }) == message);
  CHECK(balancer.config().rate == 0.001);
}

TEST_CASE("BiasBalance refuses a selector of other experts than it counted",
          "[moe][balance][bias_balance]") {
  BiasBalance<double> balance;
  balance.add_load(RowVector<double>::Ones(4));
  SigmoidTopK<double> selector(3);
  CHECK(test::message_of<ConfigError>([&] { balance.update(selector); }) ==
        "BiasBalance::update: the bias is [1, 3], expected [1, 4]");
}

}  // namespace weir::bias_balance_test
