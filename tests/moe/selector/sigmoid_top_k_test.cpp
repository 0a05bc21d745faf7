// SPDX-License-Identifier: MIT
#include <cmath>
#include <limits>
#include <vector>

#include <weir/core/parameter.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>

#include "moe/selector/selected.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::sigmoid_top_k_test {
using test::route;

namespace {

/// One token whose sigmoid is (1/2, 3/4, 1/4).
Matrix<double> quarters() {
  Matrix<double> logits(1, 3);
  logits << 0.0, std::log(3.0), -std::log(3.0);
  return logits;
}

/// d(first weight of each token) / d(logits)
Matrix<double> gradient_of_first(const SigmoidTopK<double>& selector,
                                 const Matrix<double>& logits) {
  auto selected = test::select(selector, logits);
  const Routing<double>& routing = selected.routing;
  RowVector<double> c = RowVector<double>::Zero(routing.assignments());
  for (Index t = 0; t < routing.tokens(); ++t) c[routing.first(t)] = 1.0;
  const Matrix<double> d = Matrix<double>::Zero(routing.tokens(), routing.experts());
  return test::RoutingObjective<double>{c, d}.logit_gradient(selector, selected);
}

}  // namespace

TEST_CASE("SigmoidTopK matches weights worked out by hand", "[moe][selector][sigmoid_top_k]") {
  SECTION("renormalised: s / (3/4 + 1/2)") {
    const Routing<double> routing = route(SigmoidTopK<double>(3), quarters());
    CHECK(routing.expert == std::vector<Index>{1, 0});
    CHECK(routing.weight[0] == Approx(0.6));
    CHECK(routing.weight[1] == Approx(0.4));
  }
  SECTION("scaled by 2.5, as DeepSeek-V3") {
    const Routing<double> routing = route(SigmoidTopK<double>(3, {.scale = 2.5}), quarters());
    CHECK(routing.weight[0] == Approx(1.5));
    CHECK(routing.weight[1] == Approx(1.0));
  }
  SECTION("raw") {
    const Routing<double> routing =
        route(SigmoidTopK<double>(3, {.renormalise = false}), quarters());
    CHECK(routing.weight[0] == Approx(0.75));
    CHECK(routing.weight[1] == Approx(0.5));
  }
  SECTION("raw, scaled") {
    const Routing<double> routing =
        route(SigmoidTopK<double>(3, {.renormalise = false, .scale = 4.0}), quarters());
    CHECK(routing.weight[0] == Approx(3.0));
    CHECK(routing.weight[1] == Approx(2.0));
  }
  SECTION("probabilities: s / (3/2)") {
    const Routing<double> routing = route(SigmoidTopK<double>(3), quarters());
    CHECK(routing.probabilities(0, 0) == Approx(1.0 / 3.0));
    CHECK(routing.probabilities(0, 1) == Approx(1.0 / 2.0));
    CHECK(routing.probabilities(0, 2) == Approx(1.0 / 6.0));
  }
}

TEST_CASE("SigmoidTopK's bias moves the choice and nothing else",
          "[moe][selector][sigmoid_top_k]") {
  SigmoidTopK<double> selector(3);
  const Routing<double> without = route(selector, quarters());
  // Biased scores (1/2, -1/4, 5/4): expert 2, then 0, weighed 1/4 : 1/2.
  selector.selection_bias().value << 0.0, -1.0, 1.0;
  const Routing<double> routing = route(selector, quarters());
  CHECK(routing.expert == std::vector<Index>{2, 0});
  CHECK(routing.weight[0] == Approx(1.0 / 3.0));
  CHECK(routing.weight[1] == Approx(2.0 / 3.0));
  CHECK(routing.probabilities == without.probabilities);
}

TEST_CASE("SigmoidTopK breaks ties of the biased scores", "[moe][selector][sigmoid_top_k]") {
  SigmoidTopK<double> selector(3, {.k = 1});
  selector.selection_bias().value << 0.25, 0.0, -0.25 + 0.75;  // (3/4, 3/4, 3/4)
  CHECK(route(selector, quarters()).expert == std::vector<Index>{0});
  selector.selection_bias().value << 0.0, 0.0, 0.5;  // (1/2, 3/4, 3/4)
  CHECK(route(selector, quarters()).expert == std::vector<Index>{1});
}

TEST_CASE("SigmoidTopK matches gradients worked out by hand", "[moe][selector][sigmoid_top_k]") {
  RowVector<double> expected(3);
  SECTION("raw: ds/dz = 3/4 * 1/4") {
    const SigmoidTopK<double> selector(3, {.renormalise = false, .scale = 2.0});
    expected << 0.0, 2.0 * 3.0 / 16.0, 0.0;
    CHECK(test::relative_error(gradient_of_first(selector, quarters()), expected) <= 1e-14);
  }
  SECTION("renormalised") {
    // g = s_1 / (s_1 + s_0): dg/ds_1 = s_0 / (5/4)^2 = 8/25, dg/ds_0 = -s_1 / (5/4)^2 = -12/25;
    // ds/dz is 3/16 and 1/4.
    const SigmoidTopK<double> selector(3);
    expected << -3.0 / 25.0, 1.5 / 25.0, 0.0;
    CHECK(test::relative_error(gradient_of_first(selector, quarters()), expected) <= 1e-14);
  }
  SECTION("renormalised with k = 1: the weight is constant") {
    const SigmoidTopK<double> selector(3, {.k = 1});
    CHECK(route(selector, quarters()).weight[0] == Approx(1.0));
    CHECK(gradient_of_first(selector, quarters()).isZero(1e-15));
  }
}

TEST_CASE("SigmoidTopK of all experts weighs like its probabilities",
          "[moe][selector][sigmoid_top_k]") {
  const Routing<double> routing =
      route(SigmoidTopK<double>(5, {.k = 5}), test::random_matrix(6, 5, 1));
  for (Index t = 0; t < 6; ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      CHECK(routing.weight[a] == Approx(routing.probabilities(t, routing.expert[a])));
    }
  }
}

TEST_CASE("SigmoidTopK takes the square root of a softplus", "[moe][selector][sigmoid_top_k]") {
  // log(1 + exp(z)) is 4, 1 and 9 for these logits: scores 2, 1, 3.
  Matrix<double> logits(1, 3);
  logits << std::log(std::expm1(4.0)), std::log(std::expm1(1.0)), std::log(std::expm1(9.0));
  const SigmoidTopK<double> selector(3, {.k = 2, .score = ScoreFunction::kSqrtSoftplus});
  const Routing<double> routing = route(selector, logits);
  CHECK(routing.expert == std::vector<Index>{2, 0});
  CHECK(routing.weight[0] == Approx(0.6));
  CHECK(routing.weight[1] == Approx(0.4));
  CHECK(routing.probabilities(0, 1) == Approx(1.0 / 6.0));

  // Raw: ds/dz = (1 - exp(-s^2)) / (2 s).
  const SigmoidTopK<double> raw(
      3, {.k = 1, .renormalise = false, .score = ScoreFunction::kSqrtSoftplus});
  RowVector<double> expected(3);
  expected << 0.0, 0.0, -std::expm1(-9.0) / 6.0;
  CHECK(test::relative_error(gradient_of_first(raw, logits), expected) <= 1e-12);
}

TEST_CASE("SigmoidTopK's bias is a buffer", "[moe][selector][sigmoid_top_k]") {
  SigmoidTopK<double> selector(4);
  CHECK(parameters(selector).empty());
  const auto named = buffers(selector);
  REQUIRE(named.size() == 1);
  CHECK(named[0].name == "bias");
  CHECK(named[0].buffer == &selector.selection_bias());
  CHECK(named[0].buffer->value == Matrix<double>::Zero(1, 4));
}

TEST_CASE("SigmoidTopK names the setting that is out of range", "[moe][selector][sigmoid_top_k]") {
  const auto message = [](Index experts, SigmoidTopKConfig config) {
    return test::message_of<ConfigError>([&] { const SigmoidTopK<double> made(experts, config); });
  };
  CHECK(message(4, {.k = 0}) == "SigmoidTopK: k = 0, expected 1 <= k <= experts = 4");
  CHECK(message(4, {.k = 5}) == "SigmoidTopK: k = 5, expected 1 <= k <= experts = 4");
  CHECK(message(4, {.scale = 0.0}) == "SigmoidTopK: scale = 0, expected a finite number > 0");
  CHECK(message(-1, {}) == "SigmoidTopK: experts = -1, expected >= 1");
  CHECK(message(4, {.k = 4}) == "no exception");

  const auto misfit = [](const SigmoidTopK<double>& selector, Index experts) {
    return test::message_of<ConfigError>(
        [&] { route(selector, Matrix<double>::Zero(2, experts)); });
  };
  SigmoidTopK<double> selector(4);
  CHECK(misfit(selector, 5) == "SigmoidTopK: the bias is [1, 4], expected [1, 5]");
  selector.selection_bias().value.resize(0, 4);
  CHECK(misfit(selector, 4) == "SigmoidTopK: the bias is [0, 4], expected [1, 4]");

  selector.selection_bias().value.setZero(1, 4);
  selector.selection_bias().value(0, 3) = std::numeric_limits<double>::quiet_NaN();
  CHECK(test::message_of<NonFiniteError>([&] { route(selector, Matrix<double>::Zero(2, 4)); }) ==
        "SigmoidTopK: bias[3] = nan, expected a finite number");
}

}  // namespace weir::sigmoid_top_k_test
