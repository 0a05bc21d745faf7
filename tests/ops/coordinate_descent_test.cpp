// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <weir/core/list.hpp>
#include <weir/core/random.hpp>
#include <weir/ops/coordinate_descent.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::coordinate_descent_test {

namespace {

using Row = RowVector<double>;

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

/// The multipliers, with nothing left out.
Row multipliers(const CoordinateDescentConfig& config, const Row& s, double k) {
  Row a(config.iterations);
  coordinate_descent(config, s.data(), s.data(), s.size(), k, a.data());
  return a;
}

Row lambda_of(const CoordinateDescentConfig& config, const Row& s, double k) {
  const Row a = multipliers(config, s, k);
  return s.unaryExpr([&](double v) { return coordinate_descent_lambda(config, v, a.data()); });
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

}  // namespace

TEST_CASE("The coordinate descent is that of two vectors", "[ops][coordinate_descent]") {
  Rng rng(1);
  for (int draw = 0; draw < 300; ++draw) {
    const CoordinateDescentConfig config = random_config(rng);
    const Index n = 1 + rng.below(20);
    const Row s = test::random_matrix(1, n, 100 + static_cast<std::uint64_t>(draw));
    const double k = rng.uniform(0.3, static_cast<double>(n));
    CHECK(test::relative_error(lambda_of(config, s, k), slow_lambda(config, s, k)) <= 1e-10);
  }
}

TEST_CASE("The relaxed choice of equal scores is an equal share", "[ops][coordinate_descent]") {
  const Row s = Row::Constant(8, 0.7);
  CHECK(test::relative_error(lambda_of({}, s, 2.0), Row::Constant(8, 0.25)) <= 1e-12);
  CHECK(test::relative_error(lambda_of({}, s, 8.0), Row::Ones(8)) <= 1e-12);
}

TEST_CASE("One iteration of the relaxed choice, by hand", "[ops][coordinate_descent]") {
  // a = epsilon log(k / n) = -0.5 log 2; lambda = min(exp((s + a) / 0.5), 1).
  Row s(4);
  s << 1.0, 0.0, 0.5 * std::log(1.5), -0.5 * std::log(4.0);
  Row expected(4);
  expected << 1.0, 0.5, 0.75, 0.125;
  CHECK(test::relative_error(lambda_of({.epsilon = 0.5, .iterations = 1}, s, 2.0), expected) <=
        1e-14);
}

TEST_CASE("The relaxed choice goes to k whole ones as epsilon falls", "[ops][coordinate_descent]") {
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
          "[ops][coordinate_descent][gradient]") {
  Rng rng(2);
  int moved = 0;
  for (int draw = 0; draw < 60; ++draw) {
    const CoordinateDescentConfig config = random_config(rng);
    const Index n = 2 + rng.below(12);
    Matrix<double> s = test::random_matrix(1, n, 500 + static_cast<std::uint64_t>(draw));
    const double k = rng.uniform(0.5, static_cast<double>(n));
    const Row c = test::random_matrix(1, n, 900 + static_cast<std::uint64_t>(draw));
    List<Index> all(n);
    std::iota(all.begin(), all.end(), 0);
    Row analytic = Row::Zero(n);
    add_coordinate_descent_backward(config, s.data(), s.data(), n, multipliers(config, s, k).data(),
                                    all.data(), c.data(), n, analytic.data());
    const Matrix<double> numeric = test::numeric_gradient(
        s, [&] { return lambda_of(config, s, k).dot(c); }, 1e-6);
    CHECK((analytic - numeric).norm() <= 1e-6 * (1.0 + numeric.norm()));
    moved += numeric.norm() > 1e-3 ? 1 : 0;
  }
  CHECK(moved > 40);
}

TEST_CASE("The coordinate descent leaves out what is forbidden, in its derivative too",
          "[ops][coordinate_descent][gradient]") {
  const CoordinateDescentConfig config{.epsilon = 0.3, .iterations = 7};
  Row s(5);
  s << 0.4, -0.2, 0.9, 0.1, 0.3;
  Row marks = Row::Zero(5);
  marks[1] = marks[4] = -std::numeric_limits<double>::infinity();
  Row some(3);
  some << 0.4, 0.9, 0.1;
  // A k beyond the number of those allowed is that number.
  const double k = GENERATE(1.5, 3.0, 4.0);
  Row a(config.iterations);
  coordinate_descent(config, s.data(), marks.data(), 5, k, a.data());
  const Row expected = multipliers(config, some, std::min(k, 3.0));
  CHECK(test::relative_error(a, expected) <= 1e-14);

  const std::vector<Index> chosen = {2, 0}, chosen_of_some = {1, 0};
  const std::vector<double> d_lambda = {1.0, -0.5};
  Row d = Row::Zero(5), d_some = Row::Zero(3);
  add_coordinate_descent_backward(config, s.data(), marks.data(), 5, a.data(), chosen.data(),
                                  d_lambda.data(), 2, d.data());
  add_coordinate_descent_backward(config, some.data(), some.data(), 3, expected.data(),
                                  chosen_of_some.data(), d_lambda.data(), 2, d_some.data());
  CHECK(d[1] == 0.0);
  CHECK(d[4] == 0.0);
  Row moved(3);
  moved << d[0], d[2], d[3];
  CHECK((moved - d_some).norm() <= 1e-14);
}

TEST_CASE("The coordinate descent says what is wrong with its settings",
          "[ops][coordinate_descent]") {
  const auto message = [](const CoordinateDescentConfig& config) {
    return test::message_of<ConfigError>([&] { config.check("User"); });
  };
  CHECK(message({}) == "no exception");
  CHECK(message({.epsilon = 0.0}) == "User: epsilon = 0, expected a finite number > 0");
  CHECK(message({.iterations = 0}) == "User: iterations = 0, expected >= 1");
  CHECK(message({.first_epsilon = 0.01}) ==
        "User: first_epsilon = 0.01, expected 0 or at least epsilon = 0.1");
  CHECK(message({.first_epsilon = HUGE_VAL}) ==
        "User: first_epsilon = inf, expected 0 or at least epsilon = 0.1");
  CHECK(message({.epsilon_decay = 1.5}) ==
        "User: epsilon_decay = 1.5, expected 0 < epsilon_decay <= 1");
}

}  // namespace weir::coordinate_descent_test
