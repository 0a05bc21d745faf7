// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/relaxed_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "moe/selector/selected.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/threads.hpp"

namespace weir::relaxed_top_k_test {

static_assert(Selector<RelaxedTopK<float>, float>);

namespace {

using Row = RowVector<double>;

using Objective = test::RoutingObjective<double>;

}  // namespace

TEST_CASE("RelaxedTopK matches a routing worked out by hand", "[moe][selector][relaxed_top_k]") {
  // p = (0.1, 0.4, 0.2, 0.3); one iteration makes lambda = min(exp(p / epsilon) k' / 4, 1).
  Matrix<double> logits(1, 4);
  logits << std::log(1.0), std::log(4.0), std::log(2.0), std::log(3.0);
  const CoordinateDescentConfig descent{.epsilon = 0.4, .iterations = 1};
  const auto weights = [&](const RelaxedTopKConfig& config) {
    const Routing<double> routing = test::route(RelaxedTopK<double>(config), logits);
    CHECK(routing.probabilities(0, 1) == Approx(0.4));
    return routing;
  };
  const auto one = weights({.k = 1, .renormalise = false, .ratio = 1.0, .descent = descent});
  CHECK(one.expert == std::vector<Index>{1});
  CHECK(one.weight[0] == Approx(std::exp(1.0) / 4.0));
  // Both are above 1.
  const auto two = weights({.k = 2, .ratio = 1.0, .descent = descent});
  CHECK(two.expert == std::vector<Index>{1, 3});
  CHECK(two.weight[0] == Approx(0.5));
  // exp(0.2) / 2 and exp(0.15) / 2
  const auto soft = weights({.k = 2, .ratio = 1.0, .descent = {.epsilon = 2.0, .iterations = 1}});
  CHECK(soft.weight[0] == Approx(1.0 / (1.0 + std::exp(-0.05))));
  const auto straight =
      weights({.k = 2, .weight = RelaxedWeight::kStraightThrough, .renormalise = false});
  CHECK(straight.weight[0] == Approx(0.4));
  CHECK(straight.weight[1] == Approx(0.3));
}

TEST_CASE("RelaxedTopK chooses as SoftmaxTopK, with weights that its setting norms",
          "[moe][selector][relaxed_top_k]") {
  for (const Index k : {1, 3, 6}) {
    const Matrix<double> logits = 2.0 * test::random_matrix(20, 6, 3);
    const Routing<double> plain = test::route(SoftmaxTopK<double>({.k = k}), logits);
    const Routing<double> routing = test::route(RelaxedTopK<double>({.k = k}), logits);
    CHECK(routing.expert == plain.expert);
    CHECK(routing.probabilities == plain.probabilities);
    for (Index t = 0; t < 20; ++t) {
      double sum = 0.0;
      for (Index a = routing.first(t); a < routing.last(t); ++a) {
        sum += routing.weight[a];
      }
      CHECK(sum == Approx(1.0));
    }
    const RelaxedTopK<double> straight(
        {.k = k, .weight = RelaxedWeight::kStraightThrough, .renormalise = false});
    CHECK(test::route(straight, logits).weight == plain.weight);
  }
}

TEST_CASE("RelaxedTopK gradients agree with finite differences",
          "[moe][selector][relaxed_top_k][gradient]") {
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1};
  for (const bool renormalise : {true, false}) {
    for (const Index k : {1, 2, 4}) {
      const RelaxedTopK<double> selector(
          {.k = k,
           .renormalise = renormalise,
           .descent = {
               .epsilon = 0.3, .iterations = 12, .first_epsilon = 1.0, .epsilon_decay = 0.8}});
      test::check_selector_gradient(selector, 1.5 * test::random_matrix(5, 6, 4),
                                    {.training = true, .mask = mask}, 1e-6);
    }
  }
}

TEST_CASE("RelaxedTopK straight through has the derivative of p lambda with lambda at 1",
          "[moe][selector][relaxed_top_k][gradient]") {
  const CoordinateDescentConfig descent{.epsilon = 0.3, .iterations = 9};
  for (const bool renormalise : {true, false}) {
    const RelaxedTopKConfig settings{.k = 2,
                                     .weight = RelaxedWeight::kStraightThrough,
                                     .renormalise = renormalise,
                                     .descent = descent};
    const RelaxedTopK<double> selector(settings);
    RelaxedTopKConfig own = settings;
    own.weight = RelaxedWeight::kRelaxed;
    own.renormalise = false;
    const RelaxedTopK<double> relaxed(own);
    Matrix<double> logits = 1.5 * test::random_matrix(4, 6, 7);
    const Objective objective{test::random_matrix(1, 8, 8), test::random_matrix(4, 6, 9)};
    const List<double> fixed = test::route(relaxed, logits).weight;
    auto selected = test::select(selector, logits);
    const Matrix<double> analytic = objective.logit_gradient(selector, selected);
    const Matrix<double> numeric = test::numeric_gradient(logits, [&] {
      Routing<double> routing = test::route(SoftmaxTopK<double>({.k = 2}), logits);
      const List<double> lambda = test::route(relaxed, logits).weight;
      for (Index a = 0; a < 8; ++a) routing.weight[a] *= 1.0 + lambda[a] - fixed[a];
      for (Index a = 0; renormalise && a < 8; a += 2) {
        const double sum = routing.weight[a] + routing.weight[a + 1];
        routing.weight[a] /= sum;
        routing.weight[a + 1] /= sum;
      }
      return objective.value(routing);
    });
    CHECK(test::relative_error(analytic, numeric) <= 1e-6);
    // The plain derivative is another one.
    const SoftmaxTopK<double> softmax({.k = 2, .renormalise = renormalise});
    auto plainly = test::select(softmax, logits);
    const Matrix<double> plain = objective.logit_gradient(softmax, plainly);
    CHECK(test::relative_error(analytic, plain) > 1e-3);
  }
}

TEST_CASE("RelaxedTopK with forbidden experts is that without them",
          "[moe][selector][relaxed_top_k]") {
  const std::vector<std::uint8_t> allowed = {1, 0, 1, 1, 0, 1};
  const List<Index> columns = {0, 2, 3, 5};
  const Matrix<double> logits = test::random_matrix(8, 6, 10);
  Matrix<double> some(8, 4);
  for (Index e = 0; e < 4; ++e) some.col(e) = logits.col(columns[e]);
  for (const Index k : {2, 4}) {
    for (const RelaxedWeight weight : {RelaxedWeight::kRelaxed, RelaxedWeight::kStraightThrough}) {
      const RelaxedTopK<double> selector(
          {.k = k, .weight = weight, .renormalise = false, .descent = {.epsilon = 0.4}});
      auto selected = test::select(selector, logits, {.training = true, .allowed = allowed});
      auto expected = test::select(selector, some);
      const Routing<double>& routing = selected.routing;
      for (Index a = 0; a < routing.assignments(); ++a) {
        CHECK(routing.expert[a] == columns[expected.routing.expert[a]]);
        CHECK(routing.weight[a] == Approx(expected.routing.weight[a]).epsilon(1e-12));
      }
      const Row c = test::random_matrix(1, 8 * k, 11);
      const Matrix<double> d =
          Objective{c, Matrix<double>::Zero(8, 6)}.logit_gradient(selector, selected);
      const Matrix<double> d_some =
          Objective{c, Matrix<double>::Zero(8, 4)}.logit_gradient(selector, expected);
      CHECK(d.col(1).isZero(0.0));
      CHECK(d.col(4).isZero(0.0));
      for (Index e = 0; e < 4; ++e) {
        CHECK((d.col(columns[e]) - d_some.col(e)).norm() <= 1e-12);
      }
    }
  }
}

TEST_CASE("RelaxedTopK is finite for extreme logits", "[moe][selector][relaxed_top_k]") {
  Matrix<double> logits(3, 3);
  logits << 1000.0, 0.0, -1000.0, 1e300, -1e300, 0.0, 0.0, 0.0, 0.0;
  for (const double epsilon : {1e-4, 0.1, 100.0}) {
    const RelaxedTopK<double> selector(
        {.k = 2, .descent = {.epsilon = epsilon, .iterations = 128}});
    auto selected = test::select(selector, logits);
    for (const double weight : selected.routing.weight) CHECK(std::isfinite(weight));
    const Objective objective{Row::Ones(6), Matrix<double>::Zero(3, 3)};
    CHECK(objective.logit_gradient(selector, selected).allFinite());
  }
  CHECK(test::route(RelaxedTopK<double>({.k = 1}), Matrix<double>::Ones(2, 1)).weight ==
        std::vector<double>{1.0, 1.0});
  CHECK(test::route(RelaxedTopK<double>(), Matrix<double>(0, 4)).assignments() == 0);
}

TEST_CASE(
    "A layer with RelaxedTopK has its exact gradient, the same bits for any number of "
    "threads, and allocates nothing",
    "[moe][selector][relaxed_top_k][gradient]") {
  Rng rng(12);
  MoELayer layer(LinearRouter<double>(4, 5, rng, {.init_scale = 4.0}),
                 RelaxedTopK<double>({.k = 2, .descent = {.epsilon = 0.3}}), Dropless(),
                 GluBank<double>(4, 5, 3, rng));
  test::check_gradients(layer, test::random_matrix(6, 4, 13));

  const Matrix<double> x = test::random_matrix(300, 4, 14);
  decltype(layer)::Cache cache;
  const auto step = [&] {
    layer.forward(x, kTraining, cache);
    layer.backward(x, cache);
  };
  step();
  CHECK(test::count_allocations(step) == 0);
  const Matrix<double> dx = cache.dx;
  const test::Threads threads(3);
  step();
  CHECK(cache.dx == dx);
}

TEST_CASE("RelaxedTopK says what is wrong with its settings", "[moe][selector][relaxed_top_k]") {
  const auto message = [](const RelaxedTopKConfig& config) {
    return test::message_of<ConfigError>(
        [&] { test::route(RelaxedTopK<double>(config), Matrix<double>::Zero(1, 4)); });
  };
  CHECK(message({.k = 0}) == "RelaxedTopK: k = 0, expected >= 1");
  CHECK(message({.k = 5}) == "RelaxedTopK: k = 5, expected 1 <= k <= experts = 4");
  CHECK(message({.ratio = 0.5}) == "RelaxedTopK: ratio = 0.5, expected a finite number >= 1");
  CHECK(message({.least_sum = 0.0}) == "RelaxedTopK: least_sum = 0, expected a finite number > 0");
  CHECK(message({.descent = {.epsilon = 0.0}}) ==
        "RelaxedTopK: epsilon = 0, expected a finite number > 0");
  Matrix<double> logits = Matrix<double>::Zero(1, 4);
  logits(0, 2) = std::numeric_limits<double>::quiet_NaN();
  CHECK(test::message_of<NonFiniteError>([&] { test::route(RelaxedTopK<double>(), logits); }) ==
        "RelaxedTopK: logits[0, 2] = nan, expected a finite number");
}

TEST_CASE("RelaxedTopK in single precision is that in double", "[moe][selector][relaxed_top_k]") {
  const Matrix<double> logits = test::random_matrix(10, 7, 15);
  const Row c = test::random_matrix(1, 20, 16);
  for (const RelaxedWeight weight : {RelaxedWeight::kRelaxed, RelaxedWeight::kStraightThrough}) {
    const RelaxedTopKConfig config{.k = 2, .weight = weight, .descent = {.epsilon = 0.3}};
    const RelaxedTopK<double> exact(config);
    const RelaxedTopK<float> selector(config);
    auto selected = test::select(selector, logits.cast<float>());
    auto expected = test::select(exact, logits);
    CHECK(selected.routing.expert == expected.routing.expert);
    for (Index a = 0; a < 20; ++a) {
      CHECK(static_cast<double>(selected.routing.weight[a]) ==
            Approx(expected.routing.weight[a]).epsilon(1e-4));
    }
    const Objective objective{c, Matrix<double>::Zero(10, 7)};
    const test::RoutingObjective<float> same{c.cast<float>(), Matrix<float>::Zero(10, 7)};
    CHECK(test::relative_error(same.logit_gradient(selector, selected).cast<double>(),
                               objective.logit_gradient(exact, expected)) <= 1e-3);
  }
}

TEST_CASE("RelaxedTopK keeps multipliers only where something needs them",
          "[moe][selector][relaxed_top_k]") {
  const Matrix<double> logits = test::random_matrix(3, 5, 17);
  const RelaxedTopK<double> relaxed;
  const RelaxedTopK<double> straight({.weight = RelaxedWeight::kStraightThrough});
  CHECK(test::select(relaxed, logits, {}).cache.multiplier.rows() == 3);
  CHECK(test::select(straight, logits, {}).cache.multiplier.rows() == 0);
  CHECK(test::select(straight, logits, {}).routing.weight ==
        test::select(straight, logits).routing.weight);
  CHECK(test::select(straight, logits).cache.multiplier.rows() == 3);
}

}  // namespace weir::relaxed_top_k_test
