// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/loss_gradient.hpp"
#include "support/routing.hpp"

namespace weir::z_loss_test {
using test::logit_gradient;
using test::loss_of;

static_assert(RoutingLoss<ZLoss<float>, float>);
static_assert(!ObservingBalancer<ZLoss<float>, float>);

namespace {

Routing<double> route(const Matrix<double>& logits, const Pass& pass = {}) {
  return test::route(SoftmaxTopK<double>({.k = 1}), logits, pass);
}

}  // namespace

TEST_CASE("ZLoss matches a case worked out by hand", "[moe][balance][z_loss]") {
  // log(1 + 1) = ln 2 and log(3 + 1) = 2 ln 2: mean of squares 5/2 (ln 2)^2.
  Matrix<double> logits(2, 2);
  logits << 0.0, 0.0, std::log(3.0), 0.0;
  CHECK(loss_of(ZLoss<double>({.coefficient = 0.5}), route(logits)) ==
        Approx(1.25 * std::log(2.0) * std::log(2.0)));
}

TEST_CASE("ZLoss of a router of zeros is (ln experts)^2", "[moe][balance][z_loss]") {
  const auto experts = GENERATE(as<Index>{}, 1, 8, 37);
  const double log_experts = std::log(static_cast<double>(experts));
  CHECK(loss_of(ZLoss<double>({.coefficient = 1.0}), route(Matrix<double>::Zero(3, experts))) ==
        Approx(log_experts * log_experts));
}

TEST_CASE("ZLoss is moved by a shift that leaves the routing alone", "[moe][balance][z_loss]") {
  const Matrix<double> logits = test::random_matrix(1, 5, 1);
  const Matrix<double> shifted = logits.array() + 3.0;
  const ZLoss<double> balancer({.coefficient = 1.0});
  const Routing<double> before = route(logits);
  const Routing<double> after = route(shifted);
  CHECK(test::relative_error(after.probabilities, before.probabilities) < 1e-14);
  CHECK(std::sqrt(loss_of(balancer, after)) == Approx(std::sqrt(loss_of(balancer, before)) + 3.0));
}

TEST_CASE("ZLoss does not overflow", "[moe][balance][z_loss]") {
  Matrix<double> logits(1, 3);
  logits << 5000.0, 4000.0, -5000.0;
  CHECK(loss_of(ZLoss<double>({.coefficient = 1.0}), route(logits)) == Approx(25e6));
  const Matrix<double> gradient =
      logit_gradient(SoftmaxTopK<double>({.k = 1}), ZLoss<double>({.coefficient = 1.0}), logits);
  CHECK(gradient(0, 0) == Approx(1e4));
  CHECK(gradient.rightCols(2).isZero(1e-300));
}

TEST_CASE("ZLoss does not see padding", "[moe][balance][z_loss]") {
  const Matrix<double> logits = test::random_matrix(3, 4, 2);
  Matrix<double> padded = Matrix<double>::Constant(5, 4, NAN);
  padded.topRows(2) = logits.topRows(2);
  padded.row(3) = logits.row(2);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 0};
  const ZLoss<double> balancer({.coefficient = 0.3});
  const SoftmaxTopK<double> selector({.k = 1});
  const Routing<double> routing = route(padded, {.mask = mask});

  CHECK(loss_of(balancer, routing) == loss_of(balancer, route(logits)));
  const Matrix<double> expected = logit_gradient(selector, balancer, logits);
  const Matrix<double> actual = logit_gradient(selector, balancer, padded, {.mask = mask});
  CHECK(test::relative_error(actual.topRows(2), expected.topRows(2)) < 1e-14);
  CHECK(test::relative_error(actual.row(3), expected.row(2)) < 1e-14);
  CHECK(actual.row(2).isZero(0.0));
  CHECK(actual.row(4).isZero(0.0));
}

TEST_CASE("ZLoss is zero without real tokens", "[moe][balance][z_loss]") {
  const SoftmaxTopK<double> selector({.k = 1});
  const std::vector<std::uint8_t> mask = {0, 0};
  const Routing<double> none = route(Matrix<double>(0, 4));
  CHECK(loss_of(ZLoss<double>(), none) == 0.0);
  CHECK(logit_gradient(selector, ZLoss<double>(), Matrix<double>(0, 4)).rows() == 0);

  const Routing<double> padding = route(Matrix<double>::Ones(2, 4), {.mask = mask});
  CHECK(loss_of(ZLoss<double>(), padding) == 0.0);
  CHECK(logit_gradient(selector, ZLoss<double>(), Matrix<double>::Ones(2, 4), {.mask = mask})
            .isZero(0.0));
}

TEST_CASE("ZLoss gradient agrees with finite differences", "[moe][balance][z_loss][gradient]") {
  Matrix<double> logits = test::random_matrix(7, 5, 3);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1};
  const Pass pass{.mask = mask};
  const ZLoss<double> balancer({.coefficient = 0.5});
  const auto check = [&](const auto& selector) {
    test::check_logit_gradient(selector, balancer, logits, pass);
  };
  check(SoftmaxTopK<double>({.k = 2}));
  check(SigmoidTopK<double>(5, {.k = 2}));
}

TEST_CASE("ZLoss refuses a negative coefficient", "[moe][balance][z_loss]") {
  CHECK(test::message_of<ConfigError>([] { ZLoss<float>({.coefficient = -0.5}); }) ==
        "ZLoss: coefficient = -0.5, expected a finite number >= 0");
}

}  // namespace weir::z_loss_test
