// SPDX-License-Identifier: MIT
// TopP, Threshold and ReluRouting: what all selectors of a variable number of experts have to do,
// and each one's own formula.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/relu_routing.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/threshold.hpp>
#include <weir/moe/selector/top_p.hpp>

#include "moe/selector/selected.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::variable_k_test {

static_assert(Selector<TopP<float>, float>);
static_assert(Selector<Threshold<float>, float>);
static_assert(Selector<ReluRouting<float>, float>);

namespace {

template <class Body>
void for_each_selector(Body&& body) {
  body(TopP<double>({0.3}));
  body(TopP<double>({0.9}));
  body(TopP<double>({.threshold = 0.9, .most = 2}));
  body(Threshold<double>({.k = 4, .threshold = 0.5}));
  body(
      Threshold<double>({.k = 5, .k_min = 2, .threshold = 0.4, .renormalise = true, .scale = 2.5}));
  body(ReluRouting<double>());
}

/// One token whose softmax is (0.1, 0.4, 0.2, 0.3).
Matrix<double> tenths() {
  Matrix<double> logits(1, 4);
  logits << std::log(1.0), std::log(4.0), std::log(2.0), std::log(3.0);
  return logits;
}

using Objective = test::RoutingObjective<double>;

}  // namespace

TEST_CASE("TopP chooses as many as reach the threshold", "[moe][selector][top_p]") {
  const auto chosen = [](double threshold) {
    return test::route(TopP<double>({threshold}), tenths()).expert;
  };
  CHECK(chosen(0.01) == std::vector<Index>{1});
  CHECK(chosen(0.39) == std::vector<Index>{1});
  CHECK(chosen(0.41) == std::vector<Index>{1, 3});
  CHECK(chosen(0.69) == std::vector<Index>{1, 3});
  CHECK(chosen(0.71) == std::vector<Index>{1, 3, 2});
  CHECK(chosen(1.0) == std::vector<Index>{1, 3, 2, 0});
  // Exactly reached is enough: 1/4 + 1/4 of four equal ones, the lowest index first.
  CHECK(test::route(TopP<double>({0.5}), Matrix<double>::Zero(1, 4)).expert ==
        std::vector<Index>{0, 1});
  const Routing<double> routing = test::route(TopP<double>({0.5}), tenths());
  CHECK(routing.weight[0] == Approx(0.4));
  CHECK(routing.weight[1] == Approx(0.3));

  Matrix<double> certain(1, 3);
  certain << 0.0, -1e4, -1e4;  // The others are exactly zero.
  CHECK(test::route(TopP<double>({1.0}), certain).expert == std::vector<Index>{0});
}

TEST_CASE("TopP with a bound has the first experts alone", "[moe][selector][top_p]") {
  const auto chosen = [](double threshold, Index most) {
    return test::route(TopP<double>({.threshold = threshold, .most = most}), tenths()).expert;
  };
  CHECK(chosen(1.0, 2) == std::vector<Index>{1, 3});
  CHECK(chosen(1.0, 1) == std::vector<Index>{1});
  CHECK(chosen(0.41, 3) == std::vector<Index>{1, 3});  // What it needs is less.
  CHECK(chosen(1.0, 4) == chosen(1.0, 0));
  const Matrix<double> logits = test::random_matrix(50, 13, 1);
  const Routing<double> bound = test::route(TopP<double>({.threshold = 0.9, .most = 3}), logits);
  const Routing<double> all = test::route(TopP<double>({.threshold = 0.9}), logits);
  for (Index t = 0; t < 50; ++t) {
    const auto few = bound.experts_of(t);
    const auto many = all.experts_of(t);
    REQUIRE(few.size() == std::min<std::size_t>(3, many.size()));
    CHECK(std::equal(few.begin(), few.end(), many.begin()));
  }
  CHECK(bound.probabilities == all.probabilities);
}

TEST_CASE("TopP gives no token an expert more than it needs", "[moe][selector][top_p]") {
  const double threshold = GENERATE(0.1, 0.4, 0.8);
  const Routing<double> routing =
      test::route(TopP<double>({threshold}), test::random_matrix(50, 13, 1));
  for (Index t = 0; t < 50; ++t) {
    double sum = 0.0;
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      CHECK(sum < threshold);
      sum += routing.weight[a];
    }
    CHECK(sum >= threshold);
  }
}

TEST_CASE("Threshold drops what is far behind the best", "[moe][selector][threshold]") {
  const auto chosen = [](Index k, Index k_min, double threshold) {
    return test::route(Threshold<double>({.k = k, .k_min = k_min, .threshold = threshold}),
                       tenths())
        .expert;
  };
  CHECK(chosen(4, 1, 0.0) == std::vector<Index>{1, 3, 2, 0});
  CHECK(chosen(4, 1, 0.4) == std::vector<Index>{1, 3, 2});  // 0.1 < 0.4 * 0.4 <= 0.2
  CHECK(chosen(2, 1, 0.4) == std::vector<Index>{1, 3});
  CHECK(chosen(4, 1, 0.6) == std::vector<Index>{1, 3});
  CHECK(chosen(4, 1, 1.0) == std::vector<Index>{1});
  CHECK(chosen(4, 3, 1.0) == std::vector<Index>{1, 3, 2});

  const Routing<double> routing = test::route(
      Threshold<double>({.k = 4, .threshold = 0.6, .renormalise = true, .scale = 7.0}), tenths());
  CHECK(routing.weight[0] == Approx(4.0));
  CHECK(routing.weight[1] == Approx(3.0));
}

TEST_CASE("Threshold zero is SoftmaxTopK", "[moe][selector][threshold]") {
  const bool renormalise = GENERATE(false, true);
  const Matrix<double> logits = test::random_matrix(20, 9, 2);
  const Routing<double> a = test::route(
      Threshold<double>({.k = 3, .threshold = 0.0, .renormalise = renormalise}), logits);
  const Routing<double> b =
      test::route(SoftmaxTopK<double>({.k = 3, .renormalise = renormalise}), logits);
  CHECK(a.expert == b.expert);
  CHECK(a.offsets == b.offsets);
  for (Index i = 0; i < a.assignments(); ++i) CHECK(a.weight[i] == Approx(b.weight[i]));
}

TEST_CASE("ReluRouting chooses what is positive", "[moe][selector][relu_routing]") {
  Matrix<double> logits(3, 4);
  logits << 0.5, -1.0, 1.5, 0.0,  //
      -1.0, -2.0, 0.0, -0.1,      //
      1.0, 1.0, 3.0, 1.0;
  const ReluRouting<double> selector;
  auto [routing, cache] = test::select(selector, logits);
  CHECK(routing.offsets == std::vector<Index>{0, 2, 2, 6});
  CHECK(routing.expert == std::vector<Index>{2, 0, 2, 0, 1, 3});
  CHECK(routing.weight == std::vector<double>{1.5, 0.5, 3.0, 1.0, 1.0, 1.0});
  CHECK(routing.probabilities(0, 2) == Approx(0.75));
  CHECK(routing.probabilities.row(1).isZero(0.0));

  RoutingGradient<double> gradient;
  gradient.reset(routing);
  gradient.weights << 1.0, 2.0, 3.0, 4.0, 5.0, 6.0;
  selector.backward(routing, gradient, cache);
  Matrix<double> expected(3, 4);
  expected << 2.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0, 5.0, 3.0, 6.0;
  CHECK(gradient.logits == expected);
}

TEST_CASE("Selectors of variable k have gradients that agree with finite differences",
          "[moe][selector][gradient]") {
  const Matrix<double> logits = test::random_matrix(7, 6, 5);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1};
  const Pass pass{.training = true, .mask = mask};
  for_each_selector([&](const auto& selector) {
    const Routing<double> routing = test::route(selector, logits, pass);
    CHECK(routing.first(2) == routing.last(2));
    CHECK(routing.probabilities.row(2).isZero(0.0));
    test::check_selector_gradient(selector, logits, pass);
  });
}

TEST_CASE("Selectors of variable k take few tokens and few experts", "[moe][selector]") {
  const Index tokens = GENERATE(0, 1);
  const Matrix<double> logits = Matrix<double>::Constant(tokens, 1, 0.5);
  const auto check = [&](const auto& selector) {
    auto selected = test::select(selector, logits);
    const Routing<double>& routing = selected.routing;
    CHECK(routing.assignments() == tokens);
    CHECK(routing.offsets.size() == static_cast<std::size_t>(tokens) + 1);
    CHECK(Objective::random(routing, 3).logit_gradient(selector, selected).allFinite());
  };
  check(TopP<double>());
  check(Threshold<double>({.k = 1}));
  check(ReluRouting<double>());
}

TEST_CASE("Selectors of variable k give the same bits on any number of threads",
          "[moe][selector]") {
  const Matrix<double> logits = test::random_matrix(600, 33, 6);
  for_each_selector([&](const auto& selector) {
    auto serial = test::select(selector, logits);
    const auto objective = Objective::random(serial.routing, 3);
    const Matrix<double> gradient = objective.logit_gradient(selector, serial);
    const test::Threads threads(2);
    auto parallel = test::select(selector, logits);
    CHECK(serial.routing.expert == parallel.routing.expert);
    CHECK(serial.routing.weight == parallel.routing.weight);
    CHECK(serial.routing.probabilities == parallel.routing.probabilities);
    CHECK(objective.logit_gradient(selector, parallel) == gradient);
  });
}

TEST_CASE("Selectors of variable k need no memory the second time", "[moe][selector]") {
  if (!test::allocations_are_counted()) return;
  const Matrix<double> logits = test::random_matrix(20, 8, 7);
  for_each_selector([&](const auto& selector) {
    auto selected = test::select(selector, logits);
    CHECK(test::count_allocations(
              [&] { selector.forward(logits, kTraining, selected.routing, selected.cache); }) == 0);
  });
}

TEST_CASE("Selectors of variable k name what is out of range", "[moe][selector]") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const auto message = [](const auto& selector) {
    return test::message_of<ConfigError>([&] { test::route(selector, tenths()); });
  };
  CHECK(message(TopP<double>({0.0})) == "TopP: threshold = 0, expected 0 < threshold <= 1");
  CHECK(message(TopP<double>({1.5})) == "TopP: threshold = 1.5, expected 0 < threshold <= 1");
  CHECK(message(TopP<double>({nan})) == "TopP: threshold = nan, expected 0 < threshold <= 1");
  CHECK(message(TopP<double>({.most = 5})) == "TopP: most = 5, expected 0 <= most <= 4");
  CHECK(message(TopP<double>({.most = -1})) == "TopP: most = -1, expected 0 <= most <= 4");
  CHECK(test::message_of<ConfigError>([] { TopP<double>().check(0); }) ==
        "TopP: experts = 0, expected >= 1");
  CHECK(message(Threshold<double>({.k = 5})) == "Threshold: k = 5, expected 1 <= k <= experts = 4");
  CHECK(message(Threshold<double>({.k_min = 3})) ==
        "Threshold: k_min = 3, expected 1 <= k_min <= k = 2");
  CHECK(message(Threshold<double>({.threshold = -1.0})) ==
        "Threshold: threshold = -1, expected 0 <= threshold <= 1");
  CHECK(message(Threshold<double>({.scale = 0.0})) ==
        "Threshold: scale = 0, expected a finite number > 0");
  CHECK(test::message_of<ConfigError>([] { ReluRouting<double>().check(0); }) ==
        "ReluRouting: experts = 0, expected >= 1");
  Matrix<double> bad = tenths();
  bad(0, 2) = nan;
  CHECK(test::message_of<NonFiniteError>([&] { test::route(TopP<double>(), bad); }) ==
        "TopP: logits[0, 2] = nan, expected a finite number");
  CHECK(test::message_of<NonFiniteError>([&] { test::route(Threshold<double>(), bad); }) ==
        "Threshold: logits[0, 2] = nan, expected a finite number");
  CHECK(test::message_of<NonFiniteError>([&] { test::route(ReluRouting<double>(), bad); }) ==
        "ReluRouting: logits[0, 2] = nan, expected a finite number");
}

}  // namespace weir::variable_k_test
