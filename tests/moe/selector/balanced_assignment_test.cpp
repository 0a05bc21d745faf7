// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/balanced_assignment.hpp>

#include "moe/selector/selected.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::balanced_assignment_test {
using test::route;

static_assert(Selector<BalancedAssignment<float>, float>);

namespace {

RowVector<double> load_of(const Routing<double>& routing) {
  RowVector<double> load = RowVector<double>::Zero(routing.experts());
  routing.add_load(0, routing.tokens(), load);
  return load;
}

double total(const Routing<double>& routing) {
  double sum = 0.0;
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (const Index e : routing.experts_of(t)) sum += routing.logits(t, e);
  }
  return sum;
}

/// The largest total of any level assignment, by trying all.
double best_total(const Matrix<double>& logits) {
  const Index tokens = logits.rows();
  const Index experts = logits.cols();
  std::vector<Index> load(static_cast<std::size_t>(experts), 0);
  double best = -1e300;
  const std::function<void(Index, double)> place = [&](Index t, double sum) {
    if (t == tokens) {
      const auto [least, most] = std::minmax_element(load.begin(), load.end());
      if (*most - *least <= 1) best = std::max(best, sum);
      return;
    }
    for (Index e = 0; e < experts; ++e) {
      ++load[static_cast<std::size_t>(e)];
      place(t + 1, sum + logits(t, e));
      --load[static_cast<std::size_t>(e)];
    }
  };
  place(0, 0.0);
  return best;
}

}  // namespace

TEST_CASE("BalancedAssignment finds the best level assignment within its epsilon",
          "[moe][selector][balanced_assignment]") {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    const Index tokens = 1 + static_cast<Index>(seed % 7);
    const Index experts = 1 + static_cast<Index>(seed % 4);
    const Matrix<double> logits = test::random_matrix(tokens, experts, seed);
    const BalancedAssignment<double> selector({.epsilon = 1e-5});
    const Routing<double> routing = route(selector, logits, kTraining);
    INFO("seed " << seed);
    const RowVector<double> load = load_of(routing);
    CHECK(load.maxCoeff() - load.minCoeff() <= 1.0);
    CHECK(load.sum() == static_cast<double>(tokens));
    const double slack =
        1e-5 * static_cast<double>(tokens + experts) * (logits.maxCoeff() - logits.minCoeff());
    CHECK(total(routing) >= best_total(logits) - slack - 1e-12);
  }
}

TEST_CASE("BalancedAssignment levels a batch with padding",
          "[moe][selector][balanced_assignment]") {
  for (const Index tokens : {64, 67, 97}) {
    Matrix<double> logits = test::random_matrix(tokens, 8, 3);
    logits.col(2).array() += 3.0;
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(tokens), 1);
    mask[5] = 0;
    logits.row(5).setConstant(std::nan(""));
    const Pass pass{.training = true, .mask = mask};
    const Routing<double> routing = route(BalancedAssignment<double>(), logits, pass);
    const RowVector<double> load = load_of(routing);
    CHECK(load.maxCoeff() - load.minCoeff() <= 1.0);
    CHECK(routing.assignments() == tokens - 1);
    const test::Threads threads(3);
    const Routing<double> threaded = route(BalancedAssignment<double>(), logits, pass);
    CHECK(threaded.expert == routing.expert);
    CHECK(threaded.weight == routing.weight);
  }
}

TEST_CASE(
    "BalancedAssignment matches an assignment worked out by hand, and takes the best in "
    "evaluation",
    "[moe][selector][balanced_assignment]") {
  // Both like expert 0; token 1 loses less by going to expert 1: 2 + 1 > 1.5 + 0.
  Matrix<double> logits(2, 2);
  logits << 2.0, 0.0, 1.5, 1.0;
  const Routing<double> level = route(BalancedAssignment<double>(), logits, kTraining);
  CHECK(level.expert == std::vector<Index>{0, 1});
  CHECK(level.weight[1] == Approx(1.0 / (1.0 + std::exp(-1.0))));
  CHECK(route(BalancedAssignment<double>(), logits).expert == std::vector<Index>{0, 0});
}

TEST_CASE("BalancedAssignment is not causal in training, and is in evaluation",
          "[moe][selector][balanced_assignment]") {
  Matrix<double> logits(2, 2);
  logits << 2.0, 0.0, 1.5, 1.0;
  const BalancedAssignment<double> selector;
  CHECK(route(selector, logits, kTraining).expert[0] == 0);
  logits.row(1) << 5.0, 0.0;
  CHECK(route(selector, logits, kTraining).expert[0] == 1);
  CHECK(route(selector, logits).expert[0] == 0);
}

TEST_CASE("BalancedAssignment routes no tokens, equal logits and one expert",
          "[moe][selector][balanced_assignment]") {
  const BalancedAssignment<double> selector;
  CHECK(route(selector, Matrix<double>(0, 3), kTraining).assignments() == 0);
  CHECK(load_of(route(selector, Matrix<double>::Zero(9, 3), kTraining)).isConstant(3.0));
  CHECK(load_of(route(selector, test::random_matrix(4, 1, 1), kTraining))[0] == 4.0);
}

TEST_CASE("BalancedAssignment gradient agrees with finite differences",
          "[moe][selector][balanced_assignment][gradient]") {
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1};
  test::check_selector_gradient(BalancedAssignment<double>(), test::random_matrix(6, 3, 21),
                                {.training = GENERATE(false, true), .mask = mask});
}

TEST_CASE("BalancedAssignment is level after however few bids",
          "[moe][selector][balanced_assignment]") {
  for (const Index tokens : {Index(9), Index(64), Index(67)}) {
    for (const std::uint64_t seed : {1u, 2u, 3u}) {
      Matrix<double> logits = test::random_matrix(tokens, 8, seed);
      logits.col(0).array() += 3.0;
      for (const Index bids : {Index(1), Index(2), Index(5), Index(1000)}) {
        const BalancedAssignment<double> selector({.epsilon = 1e-6, .most_bids = bids});
        const RowVector<double> load = load_of(route(selector, logits, kTraining));
        CHECK(load.sum() == static_cast<double>(tokens));
        CHECK(load.maxCoeff() - load.minCoeff() <= 1.0);
      }
    }
  }
}

TEST_CASE("BalancedAssignment gives a token without a place the best expert that has one",
          "[moe][selector][balanced_assignment]") {
  // One bid each: token 0 gets expert 0, and is put out by token 1.
  Matrix<double> logits(2, 2);
  logits << 1.0, 0.9, 1.0, -5.0;
  const BalancedAssignment<double> selector({.epsilon = 0.1, .most_bids = 1});
  CHECK(route(selector, logits, kTraining).expert == std::vector<Index>{1, 0});
}

TEST_CASE("BalancedAssignment ends where many tokens want the same at the smallest epsilon",
          "[moe][selector][balanced_assignment]") {
  // Every token likes every expert the same but for a little: prices rise step by step.
  Matrix<double> logits = 1e-6 * test::random_matrix(128, 16, 4);
  logits(0, 0) = 1.0;
  const BalancedAssignment<double> selector({.epsilon = 1e-6});
  const RowVector<double> load = load_of(route(selector, logits, kTraining));
  CHECK(load.maxCoeff() == 8.0);
  CHECK(load.minCoeff() == 8.0);
}

TEST_CASE("BalancedAssignment is as level as forbidden experts allow",
          "[moe][selector][balanced_assignment][allowed]") {
  // All assignments of seven tokens to three experts: the loads have the least sum of squares, and
  // the total is within the bound of the best one with those loads.
  constexpr Index kTokens = 7;
  constexpr Index kExperts = 3;
  Index uneven = 0;
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    const Matrix<double> logits = test::random_matrix(kTokens, kExperts, seed);
    Rng rng(seed);
    std::vector<std::uint8_t> allowed(kTokens * kExperts);
    for (auto& one : allowed) one = rng.uniform() < 0.15 ? 1 : 0;
    for (std::size_t t = 0; t < kTokens; ++t) {
      allowed[t * kExperts + static_cast<std::size_t>(rng.below(kExperts))] = 1;
    }
    const Routing<double> routing =
        route(BalancedAssignment<double>(), logits, {.training = true, .allowed = allowed});
    const RowVector<double> load = load_of(routing);
    REQUIRE(load.sum() == kTokens);
    double least = 1e300;
    double best = -1e300;
    for (Index code = 0; code < 2187; ++code) {  // 3^7.
      RowVector<double> of_code = RowVector<double>::Zero(kExperts);
      double sum = 0.0;
      bool fits = true;
      for (Index t = 0, rest = code; t < kTokens; ++t, rest /= kExperts) {
        const Index e = rest % kExperts;
        of_code[e] += 1.0;
        sum += logits(t, e);
        fits = fits && allowed[static_cast<std::size_t>(t * kExperts + e)] != 0;
      }
      if (!fits) continue;
      least = std::min(least, of_code.squaredNorm());
      if (of_code == load) best = std::max(best, sum);
    }
    INFO(seed);
    CHECK(load.squaredNorm() == least);
    uneven += load.maxCoeff() - load.minCoeff() > 1.0 ? 1 : 0;
    const double range = logits.maxCoeff() - logits.minCoeff();
    CHECK(total(routing) >= best - (kTokens + kExperts) * 1e-3 * range);
  }
  CHECK(uneven > 5);
}

TEST_CASE("BalancedAssignment levels each of two modalities that share no expert",
          "[moe][selector][balanced_assignment][allowed]") {
  const Matrix<double> logits = test::random_matrix(30, 5, 1);
  const std::vector<std::uint8_t> mask = [] {
    std::vector<std::uint8_t> real(30, 1);
    real[3] = real[17] = 0;
    return real;
  }();
  std::vector<std::uint8_t> allowed;
  std::vector<Index> first, second;
  for (Index t = 0; t < 30; ++t) {
    const bool one = t % 4 == 0;  // 8 tokens with experts 0 and 1, 20 with the other three.
    for (Index e = 0; e < 5; ++e) allowed.push_back(one == (e < 2) ? 1 : 0);
    if (mask[static_cast<std::size_t>(t)] != 0) (one ? first : second).push_back(t);
  }
  for (const Index most_bids : {Index(1000), Index(1)}) {
    const BalancedAssignment<double> selector({.most_bids = most_bids});
    const Pass pass{.training = true, .mask = mask, .allowed = allowed};
    const Routing<double> routing = route(selector, logits, pass);
    const RowVector<double> load = load_of(routing);
    CHECK(load.head(2) == RowVector<double>::Constant(2, 4.0));
    CHECK(load.tail(3).maxCoeff() == 7.0);
    CHECK(load.tail(3).minCoeff() == 6.0);
    for (const Index t : first) CHECK(routing.experts_of(t)[0] < 2);
    for (const Index t : second) CHECK(routing.experts_of(t)[0] >= 2);
    if (most_bids == 1) continue;  // The auction is broken off.
    const Routing<double> alone =
        route(selector, Matrix<double>(logits(first, Eigen::seq(0, 1))), kTraining);
    double of_first = 0.0;
    for (const Index t : first) of_first += logits(t, routing.experts_of(t)[0]);
    CHECK(std::abs(of_first - total(alone)) <= 30 * 1e-3 * 2.0 * logits.cwiseAbs().maxCoeff());
    const test::Threads threads(3);
    CHECK(route(selector, logits, pass).expert == routing.expert);
  }
}

TEST_CASE("BalancedAssignment gives a token its only expert",
          "[moe][selector][balanced_assignment][allowed]") {
  // Token 0 may go to expert 0 alone, and others like that best, too.
  Matrix<double> logits(4, 2);
  logits << -5.0, 0.0, 3.0, 0.0, 2.0, 0.0, 1.0, 0.0;
  const std::vector<std::uint8_t> allowed = {1, 0, 1, 1, 1, 1, 1, 1};
  const Routing<double> routing =
      route(BalancedAssignment<double>(), logits, {.training = true, .allowed = allowed});
  CHECK(routing.expert == std::vector<Index>{0, 0, 1, 1});
  // All may go to it alone: it has all.
  const std::vector<std::uint8_t> one = {1, 0, 1, 0, 1, 0, 1, 1};
  CHECK(route(BalancedAssignment<double>(), logits, {.training = true, .allowed = one}).expert ==
        std::vector<Index>{0, 0, 0, 1});
}

TEST_CASE("BalancedAssignment says what is wrong with its settings",
          "[moe][selector][balanced_assignment]") {
  const auto message = [](double epsilon) {
    return test::message_of<ConfigError>(
        [&] { BalancedAssignment<double>({.epsilon = epsilon}).check(4); });
  };
  CHECK(message(0.0) == "BalancedAssignment: epsilon = 0, expected 1e-06 <= epsilon <= 1");
  CHECK(message(std::nan("")) ==
        "BalancedAssignment: epsilon = nan, expected 1e-06 <= epsilon <= 1");
  CHECK(test::message_of<ConfigError>([] {
          BalancedAssignment<double>({.most_bids = 0}).check(4);
        }) == "BalancedAssignment: most_bids = 0, expected >= 1");
}

TEST_CASE("BalancedAssignment allocates nothing the second time",
          "[moe][selector][balanced_assignment]") {
  if (!test::allocations_are_counted()) return;
  const BalancedAssignment<double> selector;
  const Matrix<double> logits = test::random_matrix(37, 5, 31);
  CHECK(test::count_step_allocations(selector, logits) == 0);
  std::vector<std::uint8_t> allowed(37 * 5, 1);
  for (std::size_t i = 0; i < allowed.size(); i += 3) allowed[i] = 0;
  CHECK(test::count_step_allocations(selector, logits, {.training = true, .allowed = allowed}) ==
        0);
}

}  // namespace weir::balanced_assignment_test
