// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/biased_probability_top_k.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::biased_probability_top_k_test {

static_assert(Selector<BiasedProbabilityTopK<float>, float>);
static_assert(BiasedSelector<BiasedProbabilityTopK<float>>);
static_assert(ImposableSelector<BiasedProbabilityTopK<float>>);

namespace {

Matrix<double> logarithms(const Matrix<double>& p) {
  return p.array().log();
}

}  // namespace

TEST_CASE(
    "BiasedProbabilityTopK chooses by biased probabilities and weighs with those that are not",
    "[moe][selector][biased_probability_top_k]") {
  Matrix<double> p(1, 4);
  p << 0.1, 0.4, 0.3, 0.2;
  BiasedProbabilityTopK<double> selector(4, {.k = 2, .renormalise = false, .scale = 3.0});
  CHECK(test::route(selector, logarithms(p)).expert == std::vector<Index>{1, 2});
  selector.selection_bias().value << 0.35, 0.0, -0.2, 0.0;  // 0.45, 0.4, 0.1 and 0.2
  const Routing<double> routing = test::route(selector, logarithms(p));
  CHECK(routing.expert == std::vector<Index>{0, 1});
  CHECK(routing.weight[0] == Approx(0.3));
  CHECK(routing.weight[1] == Approx(1.2));
  CHECK(test::relative_error(routing.probabilities, p) <= 1e-15);

  BiasedProbabilityTopK<double> renormalised(4, {.k = 2, .scale = 3.0});
  renormalised.selection_bias() = selector.selection_bias();
  const Routing<double> other = test::route(renormalised, logarithms(p));
  CHECK(other.expert == routing.expert);
  CHECK(other.weight[0] == Approx(0.6));  // 3 * 0.1 / 0.5
  CHECK(other.weight[1] == Approx(2.4));

  // Ties: the lowest index first.
  selector.selection_bias().value << 0.5, 0.0, 0.0, 0.5;
  const Matrix<double> even = Matrix<double>::Zero(1, 4);
  CHECK(test::route(selector, even).expert == std::vector<Index>{0, 3});
  selector.selection_bias().value.setZero();
  CHECK(test::route(selector, even).expert == std::vector<Index>{0, 1});
}

TEST_CASE("BiasedProbabilityTopK never chooses a forbidden expert, whatever its bias",
          "[moe][selector][biased_probability_top_k]") {
  BiasedProbabilityTopK<double> selector(3, {.k = 2});
  selector.selection_bias().value << 5.0, -0.5, -0.7;
  const std::vector<std::uint8_t> allowed = {0, 1, 1};
  const Routing<double> routing =
      test::route(selector, Matrix<double>::Zero(1, 3), {.allowed = allowed});
  CHECK(routing.expert == std::vector<Index>{1, 2});
  CHECK(routing.weight[0] == Approx(0.5));
}

TEST_CASE("BiasedProbabilityTopK has gradients that agree with finite differences",
          "[moe][selector][biased_probability_top_k][gradient]") {
  Matrix<double> logits = test::random_matrix(6, 5, 1);
  const bool renormalise = GENERATE(false, true);
  BiasedProbabilityTopK<double> selector(5, {.k = 3, .renormalise = renormalise, .scale = 1.7});
  selector.selection_bias().value = 0.2 * test::random_matrix(1, 5, 2);
  const Matrix<double> on_weights = test::random_matrix(1, 18, 3);
  const Matrix<double> on_probabilities = test::random_matrix(6, 5, 4);
  const auto value = [&] {
    const Routing<double> routing = test::route(selector, logits);
    double sum = routing.probabilities.cwiseProduct(on_probabilities).sum();
    for (Index a = 0; a < 18; ++a) sum += on_weights(0, a) * routing.weight[a];
    return sum;
  };
  Routing<double> routing;
  BiasedProbabilityTopK<double>::Cache cache;
  selector.forward(logits, kTraining, routing, cache);
  RoutingGradient<double> gradient;
  gradient.reset(routing);
  gradient.weights = on_weights;
  gradient.probabilities = on_probabilities;
  selector.backward(routing, gradient, cache);
  CHECK(test::relative_error(gradient.logits, test::numeric_gradient(logits, value)) <= 1e-7);
}

TEST_CASE("BiasedProbabilityTopK gives the same bits for any number of threads",
          "[moe][selector][biased_probability_top_k]") {
  const Matrix<double> logits = test::random_matrix(900, 12, 5);
  BiasedProbabilityTopK<double> selector(12, {.k = 3});
  selector.selection_bias().value = 0.1 * test::random_matrix(1, 12, 6);
  const Routing<double> one = test::route(selector, logits);
  const test::Threads threads(3);
  const Routing<double> three = test::route(selector, logits);
  CHECK(one.expert == three.expert);
  CHECK(one.weight == three.weight);
  CHECK(one.probabilities == three.probabilities);
}

TEST_CASE("BiasedProbabilityTopK takes padding and no tokens, and says what is wrong",
          "[moe][selector][biased_probability_top_k]") {
  BiasedProbabilityTopK<double> selector(3, {.k = 2});
  CHECK(test::route(selector, Matrix<double>(0, 3)).assignments() == 0);
  Matrix<double> logits = Matrix<double>::Zero(2, 3);
  logits(1, 0) = NAN;
  const std::vector<std::uint8_t> mask = {1, 0};
  const Routing<double> routing = test::route(selector, logits, {.mask = mask});
  CHECK(routing.assignments() == 2);
  CHECK(routing.probabilities.row(1).isZero());

  CHECK(test::message_of<NonFiniteError>([&] { test::route(selector, logits); }) ==
        "BiasedProbabilityTopK: logits[1, 0] = nan, expected a finite number");
  CHECK(test::message_of<ConfigError>([] { BiasedProbabilityTopK<double>(3, {.k = 4}); }) ==
        "BiasedProbabilityTopK: k = 4, expected 1 <= k <= experts = 3");
  CHECK(test::message_of<ConfigError>([] { BiasedProbabilityTopK<double>(3, {.scale = 0.0}); }) ==
        "BiasedProbabilityTopK: scale = 0, expected a finite number > 0");
  CHECK(test::message_of<ConfigError>([] { BiasedProbabilityTopK<double>(0); }) ==
        "BiasedProbabilityTopK: experts = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([&] { selector.check(5); }) ==
        "BiasedProbabilityTopK: the bias is [1, 3], expected [1, 5]");
  selector.selection_bias().value(0, 1) = std::numeric_limits<double>::infinity();
  CHECK(test::message_of<NonFiniteError>([&] { selector.check(3); }) ==
        "BiasedProbabilityTopK: bias[1] = inf, expected a finite number");
}

}  // namespace weir::biased_probability_top_k_test
