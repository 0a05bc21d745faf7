// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <vector>

#include <weir/moe/balance/quantile_balance.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/report.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::quantile_balance_test {

static_assert(BalancingRule<QuantileBalance<float>, BiasedSoftmaxTopK<float>>);
// Its bias is on scores, not on logits.
static_assert(!BalancingRule<QuantileBalance<float>, SigmoidTopK<float>>);
static_assert(!RoutingLoss<QuantileBalance<float>, float>);

TEST_CASE("QuantileBalance matches offsets worked out by hand",
          "[moe][balance][quantile_balance]") {
  // k = 1: alpha is the second largest of each row, 0.3, 0.4, 0.2 and 0.45. A share is 4 / 2 = 2
  // tokens, so local is the third largest of p - alpha.
  Matrix<double> p(4, 2);
  p << 0.7, 0.3, 0.6, 0.4, 0.8, 0.2, 0.55, 0.45;
  BiasedSoftmaxTopK<double> selector(2, {.k = 1});
  QuantileBalance<double> balance({.recentre = false});
  balance.observe(test::route(selector, p));
  balance.update(selector);
  // Expert 0: 0.4, 0.2, 0.6, 0.1; expert 1: zeros.
  CHECK(selector.selection_bias().value(0, 0) == Approx(-0.2));
  CHECK(std::abs(selector.selection_bias().value(0, 1)) <= 1e-15);

  // A moving average, recentred.
  BiasedSoftmaxTopK<double> other(2, {.k = 1});
  QuantileBalance<double> smooth({.momentum = 0.75});
  smooth.observe(test::route(other, p));
  smooth.update(other);
  CHECK(other.selection_bias().value(0, 0) == Approx(-0.025));
  CHECK(other.selection_bias().value(0, 1) == Approx(0.025));
  smooth.update(other);  // Nothing counted.
  CHECK(other.selection_bias().value(0, 0) == Approx(-0.025));
}

TEST_CASE("QuantileBalance works on raw logits, as Megatron-Core's dual update",
          "[moe][balance][quantile_balance]") {
  // k = 2 of 4, 8 tokens: a share is 4. The offsets were found by a script of its own.
  Matrix<double> logits(8, 4);
  logits << -1.18, -1.15, 0.67, -2.29,  //
      -0.14, -2.26, 1.1, 0.2,           //
      1.36, -0.5, 0.4, -0.29,           //
      -0.74, 0.15, -1.26, -0.35,        //
      0.7, 0.06, -0.41, 2.19,           //
      0.06, -0.59, 0.16, -0.52,         //
      -0.39, -0.35, 2.03, 0.02,         //
      0.18, 0.67, 2.02, -0.22;
  BiasedSoftmaxTopK<double> selector(4, {.k = 2});
  selector.selection_bias().value << -0.5, 0.25, 0.0, 0.25;
  const Routing<double> routing = test::route(selector, logits);
  CHECK(routing.expert == std::vector<Index>{2, 1, 2, 3, 0, 2, 1, 3, 3, 1, 2, 3, 2, 3, 2, 1});
  QuantileBalance<double> balance({.recentre = false});
  balance.observe(routing);
  balance.update(selector);
  const Matrix<double>& bias = selector.selection_bias().value;
  CHECK(bias(0, 0) == Approx(-0.5).epsilon(1e-12));
  CHECK(bias(0, 1) == Approx(0.25).epsilon(1e-12));
  CHECK(bias(0, 2) == Approx(-0.5).epsilon(1e-12));
  CHECK(bias(0, 3) == Approx(0.18).epsilon(1e-12));
  // What is added to all logits of a token makes no difference.
  BiasedSoftmaxTopK<double> other(4, {.k = 2});
  other.selection_bias().value << -0.5, 0.25, 0.0, 0.25;
  logits.row(3).array() += 100.0;
  balance.observe(test::route(other, logits));
  balance.update(other);
  CHECK(test::relative_error(other.selection_bias().value, bias) <= 1e-12);
}

TEST_CASE("QuantileBalance keeps the offsets of experts that tokens without a choice fill",
          "[moe][balance][quantile_balance]") {
  // Half of the tokens may go to experts 0 and 1 alone, k = 2.
  std::vector<std::uint8_t> allowed;
  for (Index t = 0; t < 8; ++t) {
    for (Index e = 0; e < 4; ++e) allowed.push_back(t % 2 == 0 || e < 2 ? 1 : 0);
  }
  BiasedSoftmaxTopK<double> selector(4, {.k = 2});
  selector.selection_bias().value << 0.1, 0.2, 0.3, 0.4;
  QuantileBalance<double> balance({.recentre = false});
  const Matrix<double> logits = test::random_matrix(8, 4, 12);
  balance.observe(test::route(selector, logits, {.allowed = allowed}));
  balance.update(selector);
  CHECK(selector.selection_bias().value.allFinite());
  const auto few = [&](Index e) { return selector.selection_bias().value(0, e); };
  CHECK(few(2) == 0.3);  // Four tokens may go there, and a share is four: minus infinity.
  CHECK(few(3) == 0.4);
  // The fifth largest, behind the four of those without a choice.
  CHECK((few(0) != 0.1 || few(1) != 0.2));
}

TEST_CASE("QuantileBalance keeps a bounded number of tokens", "[moe][balance][quantile_balance]") {
  const Matrix<double> logits = test::random_matrix(12, 4, 8);
  const auto bias_after = [&](Index most, Index tokens) {
    BiasedSoftmaxTopK<double> selector(4);
    QuantileBalance<double> balance({.most_tokens = most});
    balance.observe(test::route(selector, logits.topRows(5)));
    if (tokens > 5) balance.observe(test::route(selector, logits.middleRows(5, tokens - 5)));
    balance.update(selector);
    return selector.selection_bias().value;
  };
  CHECK(bias_after(8, 12) == bias_after(100, 8));
  CHECK(bias_after(5, 12) == bias_after(100, 5));
  CHECK(bias_after(12, 12) != bias_after(11, 12));
  CHECK(test::message_of<ConfigError>([] { QuantileBalance<double>({.most_tokens = 0}); }) ==
        "QuantileBalance: most_tokens = 0, expected >= 1");
}

TEST_CASE("QuantileBalance levels the load of the tokens it saw",
          "[moe][balance][quantile_balance]") {
  const auto k = GENERATE(as<Index>{}, 1, 2);
  Matrix<double> logits = test::random_matrix(128, 8, 7);
  logits.col(3).array() += 3.0;
  BiasedSoftmaxTopK<double> selector(8, {.k = k});
  QuantileBalance<double> balance;
  CHECK(report_of(test::route(selector, logits)).imbalance() > 3.5);
  for (int step = 0; step < 30; ++step) {
    balance.observe(test::route(selector, logits));
    balance.update(selector);
  }
  CHECK(report_of(test::route(selector, logits)).imbalance() < 1.3);
  CHECK(std::abs(selector.selection_bias().value.sum()) <= 1e-12);
}

TEST_CASE("To QuantileBalance, micro-batches are one batch and padding is nothing",
          "[moe][balance][quantile_balance]") {
  const Matrix<double> logits = test::random_matrix(12, 4, 8);
  const auto bias_after = [&](auto&& observe) {
    BiasedSoftmaxTopK<double> selector(4);
    QuantileBalance<double> balance;
    observe(balance, selector);
    balance.update(selector);
    return selector.selection_bias().value;
  };
  const Matrix<double> whole = bias_after(
      [&](auto& balance, const auto& selector) { balance.observe(test::route(selector, logits)); });
  CHECK(whole.norm() > 0.01);
  CHECK(bias_after([&](auto& balance, const auto& selector) {
          balance.observe(test::route(selector, logits.topRows(5)));
          balance.observe(test::route(selector, logits.bottomRows(7)));
        }) == whole);
  CHECK(bias_after([&](auto& balance, const auto& selector) {
          Matrix<double> padded = Matrix<double>::Constant(13, 4, NAN);
          padded.topRows(12) = logits;
          std::vector<std::uint8_t> mask(13, 1);
          mask.back() = 0;
          balance.observe(test::route(selector, padded, {.mask = mask}));
        }) == whole);
}

TEST_CASE("QuantileBalance leaves the bias alone where there is nothing to balance",
          "[moe][balance][quantile_balance]") {
  BiasedSoftmaxTopK<double> all(3, {.k = 3});
  QuantileBalance<double> balance;
  balance.observe(test::route(all, test::random_matrix(4, 3, 9)));
  balance.update(all);
  balance.observe(test::route(all, Matrix<double>(0, 3)));
  balance.update(all);
  CHECK(all.selection_bias().value.isZero(0.0));
  BiasedSoftmaxTopK<double> one(3, {.k = 1});
  balance.observe(test::route(one, test::random_matrix(1, 3, 9)));  // The rank is 0 + 1.
  balance.update(one);
  CHECK(one.selection_bias().value.allFinite());
}

TEST_CASE("QuantileBalance balances as if an expert that no token was allowed were not there",
          "[moe][balance][quantile_balance]") {
  const bool recentre = GENERATE(false, true);
  const double momentum = GENERATE(0.0, 0.5);
  const Matrix<double> logits = test::random_matrix(24, 5, 10);
  Matrix<double> without(24, 4);  // Expert 2 has failed.
  without << logits.leftCols(2), logits.rightCols(2);
  const std::vector<std::uint8_t> failed = {1, 1, 0, 1, 1};
  BiasedSoftmaxTopK<double> five(5, {.k = 2});
  BiasedSoftmaxTopK<double> four(4, {.k = 2});
  five.selection_bias().value(0, 2) = 0.7;
  QuantileBalance<double> of_five({.momentum = momentum, .recentre = recentre});
  QuantileBalance<double> of_four({.momentum = momentum, .recentre = recentre});
  Matrix<double> others(1, 4);
  for (int step = 0; step < 5; ++step) {
    of_five.observe(test::route(five, logits, {.allowed = failed}));
    of_five.update(five);
    of_four.observe(test::route(four, without));
    of_four.update(four);
    const Matrix<double>& bias = five.selection_bias().value;
    REQUIRE(bias(0, 2) == 0.7);
    others << bias.leftCols(2), bias.rightCols(2);
    REQUIRE(test::relative_error(others, four.selection_bias().value) <= 1e-12);
  }
  CHECK(others.norm() > 0.01);
  // As many as there are: nothing to balance.
  const std::vector<std::uint8_t> two = {1, 0, 0, 0, 1};
  const Matrix<double> before = five.selection_bias().value;
  of_five.observe(test::route(five, logits, {.allowed = two}));
  of_five.update(five);
  CHECK(five.selection_bias().value == before);
  // It is allowed again.
  of_five.observe(test::route(five, logits));
  of_five.update(five);
  CHECK(five.selection_bias().value(0, 2) != 0.7);
}

TEST_CASE("QuantileBalance names the setting that is out of range",
          "[moe][balance][quantile_balance]") {
  const auto message = [](double momentum) {
    return test::message_of<ConfigError>([&] { QuantileBalance<double>({.momentum = momentum}); });
  };
  CHECK(message(1.0) == "QuantileBalance: momentum = 1, expected 0 <= momentum < 1");
  CHECK(message(-0.5) == "QuantileBalance: momentum = -0.5, expected 0 <= momentum < 1");
  BiasedSoftmaxTopK<double> selector(3, {.k = 1});
  QuantileBalance<double> balance;
  balance.observe(test::route(selector, test::random_matrix(4, 3, 9)));
  BiasedSoftmaxTopK<double> other(2, {.k = 1});
  CHECK(test::message_of<ConfigError>([&] { balance.update(other); }) ==
        "QuantileBalance::update: the bias is [1, 2], expected [1, 3]");
}

TEST_CASE("QuantileBalance allocates nothing in the steady state",
          "[moe][balance][quantile_balance]") {
  if (!test::allocations_are_counted()) return;
  BiasedSoftmaxTopK<double> selector(4);
  QuantileBalance<double> balance;
  const Routing<double> routing = test::route(selector, test::random_matrix(20, 4, 9));
  const auto step = [&] {
    balance.observe(routing);
    balance.update(selector);
  };
  step();
  CHECK(test::count_allocations(step) == 0);
}

}  // namespace weir::quantile_balance_test
