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

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

using namespace weir;

static_assert(Selector<RelaxedTopK<float>, float>);

namespace {

using Row = RowVector<double>;
using Descent = CoordinateDescent<double>;

/// The same, as it is written in colt5-attention: vectors a and b, nothing left out.
Row slow_lambda(const CoordinateDescentConfig& config, const Row& s, double k) {
  double epsilon = std::max(config.first_epsilon, config.epsilon);
  Row b = -s;
  double a = 0.0;
  for (Index i = 0; i < config.iterations; ++i) {
    const Row sb = (s + b) / epsilon;
    const double top = sb.maxCoeff();
    a = epsilon * (std::log(k) - top - std::log((sb.array() - top).exp().sum()));
    b = -(s.array() + a).max(0.0);
    epsilon = std::max(epsilon * config.epsilon_decay, config.epsilon);
  }
  return ((s + b).array() + a).unaryExpr([&](double v) { return std::exp(v / epsilon); });
}

Row lambda_of(const CoordinateDescentConfig& config, const Row& s, double k) {
  const Descent descent(config, s.data(), s.data(), s.size(), k);
  Row lambda(s.size());
  for (Index e = 0; e < s.size(); ++e) lambda[e] = descent.lambda(e);
  return lambda;
}

CoordinateDescentConfig random_config(Rng& rng) {
  CoordinateDescentConfig config{.epsilon = rng.uniform(0.05, 0.6),
                                 .iterations = 1 + rng.below(25)};
  if (rng.uniform() < 0.5) {
    config.first_epsilon = config.epsilon * rng.uniform(1.0, 8.0);
    config.epsilon_decay = rng.uniform(0.5, 1.0);
  }
  return config;
}

/// sum(c * weights) + sum(d * probabilities), and its derivative.
struct Objective {
  Row c;
  Matrix<double> d;

  double value(const Routing<double>& routing) const {
    const Eigen::Map<const Row> g(routing.weight.data(), routing.assignments());
    return g.dot(c) + routing.probabilities.cwiseProduct(d).sum();
  }

  template <class S>
  Matrix<double> gradient(const S& selector, const Routing<double>& routing) const {
    RoutingGradient<double> gradient;
    gradient.reset(routing);
    gradient.weights = c;
    gradient.probabilities = d;
    selector.backward(routing, gradient);
    return gradient.logits;
  }
};

}  // namespace

TEST_CASE("The coordinate descent is that of two vectors", "[moe][selector][relaxed_top_k]") {
  Rng rng(1);
  for (int draw = 0; draw < 300; ++draw) {
    const CoordinateDescentConfig config = random_config(rng);
    const Index n = 1 + rng.below(20);
    const Row s = test::random_matrix(1, n, 100 + static_cast<std::uint64_t>(draw));
    const double k = rng.uniform(0.3, static_cast<double>(n));
    CHECK(test::relative_error(lambda_of(config, s, k), slow_lambda(config, s, k)) <= 1e-10);
  }
}

TEST_CASE("The relaxed choice of equal scores is an equal share",
          "[moe][selector][relaxed_top_k]") {
  const Row s = Row::Constant(8, 0.7);
  CHECK(test::relative_error(lambda_of({}, s, 2.0), Row::Constant(8, 0.25)) <= 1e-12);
  CHECK(test::relative_error(lambda_of({}, s, 8.0), Row::Ones(8)) <= 1e-12);
}

TEST_CASE("One iteration of the relaxed choice, by hand", "[moe][selector][relaxed_top_k]") {
  // a = epsilon log(k / n) = -0.5 log 2; lambda = min(exp((s + a) / 0.5), 1).
  Row s(4);
  s << 1.0, 0.0, 0.5 * std::log(1.5), -0.5 * std::log(4.0);
  Row expected(4);
  expected << 1.0, 0.5, 0.75, 0.125;
  CHECK(test::relative_error(lambda_of({.epsilon = 0.5, .iterations = 1}, s, 2.0), expected) <=
        1e-14);
}

TEST_CASE("The relaxed choice goes to k whole ones as epsilon falls",
          "[moe][selector][relaxed_top_k]") {
  Row s(5);
  s << 0.1, 0.9, 0.3, 0.7, -0.4;
  Row expected(5);
  expected << 0.0, 1.0, 0.0, 1.0, 0.0;
  const CoordinateDescentConfig hard{
      .epsilon = 0.005, .iterations = 100, .first_epsilon = 1.0, .epsilon_decay = 0.9};
  CHECK((lambda_of(hard, s, 2.0) - expected).cwiseAbs().maxCoeff() <= 1e-3);
  const Row soft = lambda_of({.epsilon = 0.3, .iterations = 128}, s, 2.0);
  CHECK(soft.sum() == Approx(2.0).epsilon(1e-3));
  CHECK(soft.maxCoeff() <= 1.0);
  CHECK((soft[1] >= soft[3] && soft[3] > soft[2] && soft[2] > soft[0] && soft[0] > soft[4]));
}

TEST_CASE("The gradient of the coordinate descent agrees with finite differences",
          "[moe][selector][relaxed_top_k][gradient]") {
  Rng rng(2);
  int moved = 0;
  for (int draw = 0; draw < 60; ++draw) {
    const CoordinateDescentConfig config = random_config(rng);
    const Index n = 2 + rng.below(12);
    Matrix<double> s = test::random_matrix(1, n, 500 + static_cast<std::uint64_t>(draw));
    const double k = rng.uniform(0.5, static_cast<double>(n));
    const Row c = test::random_matrix(1, n, 900 + static_cast<std::uint64_t>(draw));
    std::vector<Index> all(static_cast<std::size_t>(n));
    for (Index e = 0; e < n; ++e) all[static_cast<std::size_t>(e)] = e;
    Row analytic = Row::Zero(n);
    Descent(config, s.data(), s.data(), n, k).backward(all.data(), c.data(), n, analytic.data());
    const Matrix<double> numeric = test::numeric_gradient(
        s, [&] { return lambda_of(config, s, k).dot(c); }, 1e-6);
    CHECK((analytic - numeric).norm() <= 1e-6 * (1.0 + numeric.norm()));
    moved += numeric.norm() > 1e-3 ? 1 : 0;
  }
  CHECK(moved > 40);
}

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
    const Routing<double> plain = test::route(SoftmaxTopK<double>{.k = k}, logits);
    const Routing<double> routing = test::route(RelaxedTopK<double>({.k = k}), logits);
    CHECK(routing.expert == plain.expert);
    CHECK(routing.probabilities == plain.probabilities);
    for (Index t = 0; t < 20; ++t) {
      double sum = 0.0;
      for (Index a = routing.first(t); a < routing.last(t); ++a) {
        sum += routing.weight[static_cast<std::size_t>(a)];
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
  const Pass pass{.mask = mask};
  for (const bool renormalise : {true, false}) {
    for (const Index k : {1, 2, 4}) {
      const RelaxedTopK<double> selector(
          {.k = k,
           .renormalise = renormalise,
           .descent = {
               .epsilon = 0.3, .iterations = 12, .first_epsilon = 1.0, .epsilon_decay = 0.8}});
      Matrix<double> logits = 1.5 * test::random_matrix(5, 6, 4);
      const Objective objective{test::random_matrix(1, 4 * k, 5), test::random_matrix(5, 6, 6)};
      const Matrix<double> analytic =
          objective.gradient(selector, test::route(selector, logits, pass));
      const Matrix<double> numeric = test::numeric_gradient(
          logits, [&] { return objective.value(test::route(selector, logits, pass)); });
      CHECK(test::relative_error(analytic, numeric) <= 1e-6);
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
    const std::vector<double> fixed = test::route(relaxed, logits).weight;
    const Matrix<double> analytic = objective.gradient(selector, test::route(selector, logits));
    const Matrix<double> numeric = test::numeric_gradient(logits, [&] {
      Routing<double> routing = test::route(SoftmaxTopK<double>{.k = 2}, logits);
      const std::vector<double> lambda = test::route(relaxed, logits).weight;
      for (std::size_t a = 0; a < 8; ++a) routing.weight[a] *= 1.0 + lambda[a] - fixed[a];
      for (std::size_t a = 0; renormalise && a < 8; a += 2) {
        const double sum = routing.weight[a] + routing.weight[a + 1];
        routing.weight[a] /= sum;
        routing.weight[a + 1] /= sum;
      }
      return objective.value(routing);
    });
    CHECK(test::relative_error(analytic, numeric) <= 1e-6);
    // The plain derivative is another one.
    const Matrix<double> plain =
        objective.gradient(SoftmaxTopK<double>{.k = 2, .renormalise = renormalise},
                           test::route(SoftmaxTopK<double>{.k = 2}, logits));
    CHECK(test::relative_error(analytic, plain) > 1e-3);
  }
}

TEST_CASE("RelaxedTopK with forbidden experts is that without them",
          "[moe][selector][relaxed_top_k]") {
  const std::vector<std::uint8_t> allowed = {1, 0, 1, 1, 0, 1};
  const std::vector<Index> columns = {0, 2, 3, 5};
  const Matrix<double> logits = test::random_matrix(8, 6, 10);
  Matrix<double> some(8, 4);
  for (Index e = 0; e < 4; ++e) some.col(e) = logits.col(columns[static_cast<std::size_t>(e)]);
  for (const Index k : {2, 4}) {
    for (const RelaxedWeight weight : {RelaxedWeight::kRelaxed, RelaxedWeight::kStraightThrough}) {
      const RelaxedTopK<double> selector(
          {.k = k, .weight = weight, .renormalise = false, .descent = {.epsilon = 0.4}});
      const Routing<double> routing = test::route(selector, logits, {.allowed = allowed});
      const Routing<double> expected = test::route(selector, some);
      for (std::size_t a = 0; a < routing.expert.size(); ++a) {
        CHECK(routing.expert[a] == columns[static_cast<std::size_t>(expected.expert[a])]);
        CHECK(routing.weight[a] == Approx(expected.weight[a]).epsilon(1e-12));
      }
      const Row c = test::random_matrix(1, 8 * k, 11);
      const Matrix<double> d = Objective{c, Matrix<double>::Zero(8, 6)}.gradient(selector, routing);
      const Matrix<double> d_some =
          Objective{c, Matrix<double>::Zero(8, 4)}.gradient(selector, expected);
      CHECK(d.col(1).isZero(0.0));
      CHECK(d.col(4).isZero(0.0));
      for (Index e = 0; e < 4; ++e) {
        CHECK((d.col(columns[static_cast<std::size_t>(e)]) - d_some.col(e)).norm() <= 1e-12);
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
    const Routing<double> routing = test::route(selector, logits);
    for (const double weight : routing.weight) CHECK(std::isfinite(weight));
    const Objective objective{Row::Ones(6), Matrix<double>::Zero(3, 3)};
    CHECK(objective.gradient(selector, routing).allFinite());
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
                 RelaxedTopK<double>({.k = 2, .descent = {.epsilon = 0.3}}), Dropless{},
                 GluBank<double>(5, 4, 3, rng, 1.0));
  test::check_gradients(layer, test::random_matrix(6, 4, 13));

  const Matrix<double> x = test::random_matrix(300, 4, 14);
  decltype(layer)::Cache cache;
  const auto step = [&] {
    layer.forward(x, cache);
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
  CHECK(message({.ratio = 0.5}) == "RelaxedTopK: ratio = 0.5, expected >= 1");
  CHECK(message({.descent = {.epsilon = 0.0}}) == "RelaxedTopK: epsilon = 0, expected > 0");
  CHECK(message({.descent = {.iterations = 129}}) ==
        "RelaxedTopK: iterations = 129, expected 1 to 128");
  CHECK(message({.descent = {.first_epsilon = 0.01}}) ==
        "RelaxedTopK: first_epsilon = 0.01, expected 0 or at least epsilon = 0.1");
  CHECK(message({.descent = {.epsilon_decay = 1.5}}) ==
        "RelaxedTopK: epsilon_decay = 1.5, expected 0 < epsilon_decay <= 1");
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
    Routing<float> routing;
    selector.select(logits.cast<float>(), {}, routing);
    const Routing<double> expected = test::route(exact, logits);
    CHECK(routing.expert == expected.expert);
    for (std::size_t a = 0; a < 20; ++a) {
      CHECK(static_cast<double>(routing.weight[a]) == Approx(expected.weight[a]).epsilon(1e-4));
    }
    RoutingGradient<float> gradient;
    gradient.reset(routing);
    gradient.weights = c.cast<float>();
    selector.backward(routing, gradient);
    CHECK(test::relative_error(
              gradient.logits.cast<double>(),
              Objective{c, Matrix<double>::Zero(10, 7)}.gradient(exact, expected)) <= 1e-3);
  }
}
