// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/loss_gradient.hpp"
#include "support/routing.hpp"

namespace weir::switch_loss_test {
using test::logit_gradient;
using test::loss_of;
using test::route;

static_assert(RoutingLoss<SwitchLoss<float>, float>);
static_assert(!ObservingBalancer<SwitchLoss<float>, float>);

TEST_CASE("SwitchLoss at uniform load is what its fraction says", "[moe][balance][switch_loss]") {
  const auto k = GENERATE(as<Index>{}, 1, 2, 4);
  const auto experts = GENERATE(as<Index>{}, 4, 8);
  Routing<double> routing =
      route(SoftmaxTopK<double>({.k = k}), Matrix<double>::Constant(2 * experts, experts, 0.7));
  for (Index a = 0; a < routing.assignments(); ++a) routing.expert[a] = a % experts;

  CHECK(loss_of(SwitchLoss<double>({.coefficient = 0.01}), routing) == Approx(0.01));
  CHECK(loss_of(SwitchLoss<double>({.coefficient = 0.01, .fraction = LoadFraction::kOfTokens}),
                routing) == Approx(0.01 * static_cast<double>(k)));
}

TEST_CASE("SwitchLoss matches routings worked out by hand", "[moe][balance][switch_loss]") {
  SECTION("k = 1") {
    // Softmax rows (3/4, 1/4) and (2/3, 1/3); both tokens choose expert 0, so
    // f = (1, 0), P = (17/24, 7/24) and loss = 2 * 17/24.
    Matrix<double> logits(2, 2);
    logits << std::log(3.0), 0.0, std::log(2.0), 0.0;
    CHECK(loss_of(SwitchLoss<double>({.coefficient = 1.0}),
                  route(SoftmaxTopK<double>({.k = 1}), logits)) == Approx(17.0 / 12.0));
  }
  SECTION("k = 2") {
    // Softmax rows (3, 2, 1)/6 and (1, 3, 2)/6, choices {0, 1} and {1, 2}: counts (1, 2, 1),
    // P = (4, 5, 3)/12, sum_e count_e P_e = 17/12; over 4 assignments or 2 tokens, times 3.
    Matrix<double> logits(2, 3);
    logits << std::log(3.0), std::log(2.0), 0.0, 0.0, std::log(3.0), std::log(2.0);
    const Routing<double> routing = route(SoftmaxTopK<double>({.k = 2}), logits);
    CHECK(loss_of(SwitchLoss<double>({.coefficient = 0.5}), routing) == Approx(0.5 * 17.0 / 16.0));
    CHECK(loss_of(SwitchLoss<double>({.coefficient = 0.5, .fraction = LoadFraction::kOfTokens}),
                  routing) == Approx(0.5 * 17.0 / 8.0));
  }
  SECTION("the value at uniform load is not the least") {
    // p = (.51, .49) twice and (0, 1): f = (2/3, 1/3), P = (.34, .66).
    Matrix<double> logits(3, 2);
    logits << std::log(0.51), std::log(0.49), std::log(0.51), std::log(0.49), -1000.0, 0.0;
    const double loss = loss_of(SwitchLoss<double>({.coefficient = 1.0}),
                                route(SoftmaxTopK<double>({.k = 1}), logits));
    CHECK(loss == Approx(2.0 * (2.0 * 0.34 + 0.66) / 3.0));
    CHECK(std::abs(loss - 0.893) < 5e-4);
  }
}

TEST_CASE("SwitchLoss counts assignments before any are dropped", "[moe][balance][switch_loss]") {
  Routing<double> routing = route(SoftmaxTopK<double>({.k = 2}), test::random_matrix(9, 4, 1));
  const double before = loss_of(SwitchLoss<double>(), routing);
  test::limit(FixedCapacity({.capacity = 1}), routing);
  CHECK(loss_of(SwitchLoss<double>(), routing) == before);
}

TEST_CASE("SwitchLoss of sequences is the mean over those that are not empty",
          "[moe][balance][switch_loss]") {
  const Matrix<double> logits = test::random_matrix(9, 4, 2);
  const Sequences sequences({3, 0, 4, 2});
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1, 0, 0};  // The last: only padding.
  const SoftmaxTopK<double> selector({.k = 2});
  const auto fraction = GENERATE(LoadFraction::kOfAssignments, LoadFraction::kOfTokens);
  const SwitchLoss<double> batch(
      {.coefficient = 0.3, .fraction = fraction, .scope = Scope::kBatch});
  const SwitchLoss<double> sequence(
      {.coefficient = 0.3, .fraction = fraction, .scope = Scope::kSequence});

  const double first = loss_of(batch, route(selector, logits.topRows(2)));
  const double third = loss_of(batch, route(selector, logits.middleRows(3, 4)));
  const Routing<double> routing = route(selector, logits, {.sequences = &sequences, .mask = mask});
  CHECK(loss_of(sequence, routing) == Approx((first + third) / 2.0));
  CHECK(loss_of(batch, routing) != Approx((first + third) / 2.0));

  CHECK(loss_of(sequence, route(selector, logits)) ==
        Approx(loss_of(batch, route(selector, logits))));
}

TEST_CASE("SwitchLoss does not see padding", "[moe][balance][switch_loss]") {
  const Matrix<double> logits = test::random_matrix(5, 4, 3);
  Matrix<double> padded = test::random_matrix(7, 4, 4);
  padded.topRows(2) = logits.topRows(2);
  padded.middleRows(3, 3) = logits.bottomRows(3);
  padded(2, 1) = NAN;
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 0};
  const SoftmaxTopK<double> selector({.k = 2});
  const auto fraction = GENERATE(LoadFraction::kOfAssignments, LoadFraction::kOfTokens);
  const auto scope = GENERATE(Scope::kBatch, Scope::kSequence);
  const SwitchLoss<double> balancer({.coefficient = 0.3, .fraction = fraction, .scope = scope});

  const Routing<double> plain = route(selector, logits);
  const Routing<double> masked = route(selector, padded, {.mask = mask});
  CHECK(loss_of(balancer, masked) == Approx(loss_of(balancer, plain)));

  const Matrix<double> expected = logit_gradient(selector, balancer, logits);
  const Matrix<double> actual = logit_gradient(selector, balancer, padded, {.mask = mask});
  CHECK(test::relative_error(actual.topRows(2), expected.topRows(2)) < 1e-14);
  CHECK(test::relative_error(actual.middleRows(3, 3), expected.bottomRows(3)) < 1e-14);
  CHECK(actual.row(2).isZero(0.0));
  CHECK(actual.row(6).isZero(0.0));
}

TEST_CASE("SwitchLoss is zero without real tokens", "[moe][balance][switch_loss]") {
  const auto scope = GENERATE(Scope::kBatch, Scope::kSequence);
  const SwitchLoss<double> balancer(
      {.coefficient = 1.0, .fraction = LoadFraction::kOfAssignments, .scope = scope});
  const SoftmaxTopK<double> selector({.k = 1});
  const std::vector<std::uint8_t> mask = {0, 0};

  const Routing<double> none = route(selector, Matrix<double>(0, 4));
  CHECK(loss_of(balancer, none) == 0.0);
  CHECK(logit_gradient(selector, balancer, Matrix<double>(0, 4)).rows() == 0);

  const Routing<double> padding = route(selector, Matrix<double>::Ones(2, 4), {.mask = mask});
  CHECK(loss_of(balancer, padding) == 0.0);
  CHECK(logit_gradient(selector, balancer, Matrix<double>::Ones(2, 4), {.mask = mask}).isZero(0.0));
}

TEST_CASE("SwitchLoss gradient agrees with finite differences",
          "[moe][balance][switch_loss][gradient]") {
  Matrix<double> logits = test::random_matrix(7, 5, 5);
  const Sequences sequences({4, 0, 3});
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1};
  const Pass pass{.sequences = &sequences, .mask = mask};
  const auto fraction = GENERATE(LoadFraction::kOfAssignments, LoadFraction::kOfTokens);
  const auto scope = GENERATE(Scope::kBatch, Scope::kSequence);
  const SwitchLoss<double> balancer({.coefficient = 0.5, .fraction = fraction, .scope = scope});

  const auto check = [&](const auto& selector) {
    test::check_logit_gradient(selector, balancer, logits, pass);
  };
  check(SoftmaxTopK<double>({.k = 2}));
  check(SigmoidTopK<double>(5, {.k = 2}));
}

TEST_CASE("SwitchLoss refuses a negative coefficient", "[moe][balance][switch_loss]") {
  CHECK(test::message_of<ConfigError>([] { SwitchLoss<float>({.coefficient = -1.0}); }) ==
        "SwitchLoss: coefficient = -1, expected a finite number >= 0");
  CHECK(test::message_of<ConfigError>([] { SwitchLoss<float>({.coefficient = NAN}); }) ==
        "SwitchLoss: coefficient = nan, expected a finite number >= 0");
  SwitchLoss<float>({.coefficient = 0.0});
}

}  // namespace weir::switch_loss_test
