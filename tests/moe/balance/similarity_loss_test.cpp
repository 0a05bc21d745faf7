// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/balance/similarity_loss.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_p.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/loss_gradient.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::similarity_loss_test {
using test::logit_gradient;
using test::loss_of;
using test::route;

static_assert(RoutingLoss<SimilarityLoss<float>, float>);

namespace {

/// The definition, matrix by matrix.
double reference(const Routing<double>& routing) {
  const Index experts = routing.experts();
  Matrix<double> m = Matrix<double>::Zero(routing.tokens(), experts);
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      m(t, routing.expert[a]) = 1.0;
    }
  }
  const Matrix<double> mm = m.transpose() * m;
  const Matrix<double> pp = routing.probabilities.transpose() * routing.probabilities;
  const double diagonal = mm.diagonal().sum();
  const double others = mm.sum() - diagonal;
  const auto n = static_cast<double>(experts);
  double sum = 0.0;
  for (Index i = 0; i < experts; ++i) {
    for (Index j = 0; j < experts; ++j) {
      if (i == j) sum += n * mm(i, j) / diagonal * pp(i, j);
      if (i != j && others > 0.0) sum += (n * n - n) * mm(i, j) / others * pp(i, j);
    }
  }
  return sum / static_cast<double>(routing.rows.real());
}

}  // namespace

TEST_CASE("SimilarityLoss matches a routing worked out by hand", "[moe][balance][similarity]") {
  // Rows (3, 2, 1)/6 and (1, 3, 2)/6, choices {0, 1} and {1, 2}: M' = (1 1 0; 1 2 1; 0 1 1), its
  // diagonal sums to 4, the rest to 4. W = (3/4 3/2 0; 3/2 3/2 3/2; 0 3/2 3/4).
  // 36 P'_ii = 10, 13, 5 and 36 P'_01 = 9, 36 P'_12 = 8.
  Matrix<double> logits(2, 3);
  logits << std::log(3.0), std::log(2.0), 0.0, 0.0, std::log(3.0), std::log(2.0);
  const double sum = 0.75 * 10.0 + 1.5 * 13.0 + 0.75 * 5.0 + 2.0 * 1.5 * (9.0 + 8.0);
  CHECK(loss_of(SimilarityLoss<double>({.coefficient = 0.5}),
                route(SoftmaxTopK<double>({.k = 2}), logits)) == Approx(0.5 * sum / 36.0 / 2.0));
  // Choices {0} and {1}: W = diag(3/2, 3/2, 0).
  CHECK(loss_of(SimilarityLoss<double>({.coefficient = 0.5}),
                route(SoftmaxTopK<double>({.k = 1}), logits)) ==
        Approx(0.5 * 1.5 * 23.0 / 36.0 / 2.0));
}

TEST_CASE("SimilarityLoss is its definition in any setting", "[moe][balance][similarity]") {
  Rng rng(1);
  for (int draw = 0; draw < 100; ++draw) {
    const Index experts = 1 + rng.below(9);
    const Index tokens = 1 + rng.below(12);
    const Matrix<double> logits = normal_init<double>(tokens, experts, 1.5, rng);
    const SoftmaxTopK<double> fixed({.k = 1 + rng.below(experts)});
    const SimilarityLoss<double> loss({.coefficient = 0.3});
    const Routing<double> routing = route(fixed, logits);
    REQUIRE(loss_of(loss, routing) == Approx(0.3 * reference(routing)));
    const Routing<double> variable =
        route(TopP<double>({.threshold = rng.uniform(0.1, 1.0)}), logits);
    REQUIRE(loss_of(loss, variable) == Approx(0.3 * reference(variable)));
  }
}

TEST_CASE("SimilarityLoss with uniform probabilities is the coefficient at any load",
          "[moe][balance][similarity]") {
  Routing<double> routing =
      route(SoftmaxTopK<double>({.k = 2}), Matrix<double>::Constant(6, 4, 0.3));
  CHECK(loss_of(SimilarityLoss<double>({.coefficient = 0.5}), routing) ==
        Approx(0.5));  // All choose 0 and 1.
  CHECK(loss_of(SimilarityLoss<double>({.coefficient = 0.5}),
                route(SoftmaxTopK<double>({.k = 1}), Matrix<double>::Constant(6, 4, 0.3))) ==
        Approx(0.5 / 4.0));
}

TEST_CASE("SimilarityLoss counts what is dropped and does not see padding",
          "[moe][balance][similarity]") {
  const SoftmaxTopK<double> selector({.k = 2});
  const SimilarityLoss<double> loss({.coefficient = 0.5});
  const Matrix<double> logits = test::random_matrix(5, 4, 3);
  Routing<double> plain = route(selector, logits);
  const double expected = loss_of(loss, plain);
  const Matrix<double> expected_gradient = logit_gradient(selector, loss, logits);
  test::limit(FixedCapacity({.capacity = 1}), plain);
  CHECK(loss_of(loss, plain) == expected);

  Matrix<double> padded = Matrix<double>::Constant(7, 4, NAN);
  padded.topRows(2) = logits.topRows(2);
  padded.middleRows(3, 3) = logits.bottomRows(3);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 0};
  const Routing<double> masked = route(selector, padded, {.mask = mask});
  CHECK(loss_of(loss, masked) == Approx(expected));
  const Matrix<double> actual = logit_gradient(selector, loss, padded, {.mask = mask});
  CHECK(test::relative_error(actual.topRows(2), expected_gradient.topRows(2)) < 1e-13);
  CHECK(test::relative_error(actual.middleRows(3, 3), expected_gradient.bottomRows(3)) < 1e-13);
  CHECK(actual.row(2).isZero(0.0));
}

TEST_CASE("SimilarityLoss is zero without assignments", "[moe][balance][similarity]") {
  const SoftmaxTopK<double> selector({.k = 1});
  const std::vector<std::uint8_t> mask = {0, 0};
  const Index tokens = GENERATE(0, 2);
  const Pass pass{.mask = std::span(mask).first(static_cast<std::size_t>(tokens))};
  const Routing<double> routing = route(selector, Matrix<double>::Ones(tokens, 4), pass);
  CHECK(loss_of(SimilarityLoss<double>(), routing) == 0.0);
  CHECK(logit_gradient(selector, SimilarityLoss<double>(), Matrix<double>::Ones(tokens, 4), pass)
            .isZero(0.0));
}

TEST_CASE("SimilarityLoss gradient agrees with finite differences",
          "[moe][balance][similarity][gradient]") {
  Matrix<double> logits = test::random_matrix(7, 5, 5);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1};
  const Pass pass{.mask = mask};
  const SimilarityLoss<double> balancer({.coefficient = 0.5});
  const auto check = [&](const auto& selector) {
    test::check_logit_gradient(selector, balancer, logits, pass);
  };
  check(SoftmaxTopK<double>({.k = 1}));
  check(SoftmaxTopK<double>({.k = 3}));
  check(SigmoidTopK<double>(5, {.k = 2}));
}

TEST_CASE("SimilarityLoss gives the same bits on any number of threads and allocates nothing",
          "[moe][balance][similarity]") {
  Routing<float> routing;
  SoftmaxTopK<float>::Cache selector_cache;
  SoftmaxTopK<float>({.k = 4}).forward(test::random_matrix<float>(300, 33, 1), {}, routing,
                                       selector_cache);
  const SimilarityLoss<float> loss({.coefficient = 0.5});
  SimilarityLoss<float>::Cache cache;
  RoutingGradient<float> gradient;
  const auto run = [&](int threads) {
    const test::Threads set(threads);
    gradient.reset(routing);
    const double value = loss.forward(routing, cache);
    loss.backward(routing, 0.5, gradient, cache);
    return std::pair(value, gradient.probabilities);
  };
  CHECK(run(1) == run(3));
  if (!test::allocations_are_counted()) return;
  CHECK(test::count_allocations([&] {
          loss.forward(routing, cache);
          loss.backward(routing, 0.5, gradient, cache);
        }) == 0);
}

TEST_CASE("SimilarityLoss refuses a negative coefficient", "[moe][balance][similarity]") {
  CHECK(test::message_of<ConfigError>([] { SimilarityLoss<float>({.coefficient = -1.0}); }) ==
        "SimilarityLoss: coefficient = -1, expected a finite number >= 0");
  CHECK(test::message_of<ConfigError>([] { SimilarityLoss<float>({.coefficient = NAN}); }) ==
        "SimilarityLoss: coefficient = nan, expected a finite number >= 0");
}

}  // namespace weir::similarity_loss_test
