// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/balance/entropy_loss.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/loss_gradient.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::entropy_loss_test {
using test::logit_gradient;
using test::loss_of;
using test::route;

static_assert(RoutingLoss<EntropyLoss<float>, float>);

TEST_CASE("EntropyLoss matches a case worked out by hand", "[moe][balance][entropy_loss]") {
  // Rows (3, 1)/4 and (1, 3)/4: H_token = 2 ln 2 - 3/4 ln 3, P = (1, 1)/2, H_mean = ln 2.
  Matrix<double> logits(2, 2);
  logits << std::log(3.0), 0.0, 0.0, std::log(3.0);
  const Routing<double> routing = route(SoftmaxTopK<double>({.k = 1}), logits);
  const double of_token = 2.0 * std::log(2.0) - 0.75 * std::log(3.0);
  CHECK(loss_of(EntropyLoss<double>({.token = 0.5, .mean = 0.0}), routing) ==
        Approx(0.5 * of_token));
  CHECK(loss_of(EntropyLoss<double>({.token = 0.0, .mean = -2.0}), routing) ==
        Approx(-2.0 * std::log(2.0)));
  CHECK(loss_of(EntropyLoss<double>::mutual_information(0.1), routing) ==
        Approx(0.1 * (of_token - std::log(2.0))));
}

TEST_CASE("The mutual information is between zero and ln experts", "[moe][balance][entropy_loss]") {
  const auto balancer = EntropyLoss<double>::mutual_information(1.0);
  const SoftmaxTopK<double> selector({.k = 1});
  CHECK(loss_of(balancer, route(selector, test::random_matrix(1, 5, 1))) ==
        Approx(0.0).margin(1e-14));
  CHECK(loss_of(balancer, route(selector, test::random_matrix(9, 1, 1))) ==
        Approx(0.0).margin(1e-14));
  const Matrix<double> sure = 1e4 * Matrix<double>::Identity(5, 5);
  CHECK(loss_of(balancer, route(selector, sure)) == Approx(-std::log(5.0)));
  CHECK(logit_gradient(selector, balancer, sure).allFinite());
  const auto seed = GENERATE(as<std::uint64_t>{}, 1, 2, 3);
  const double loss = loss_of(balancer, route(selector, test::random_matrix(9, 5, seed)));
  CHECK(loss < 0.0);
  CHECK(loss > -std::log(5.0));
}

TEST_CASE("EntropyLoss does not see padding, nor how many threads there are",
          "[moe][balance][entropy_loss]") {
  const Matrix<double> logits = test::random_matrix(300, 4, 2);
  Matrix<double> padded = Matrix<double>::Constant(301, 4, NAN);
  padded.topRows(300) = logits;
  std::vector<std::uint8_t> mask(301, 1);
  mask.back() = 0;
  const EntropyLoss<double> balancer({.token = 0.3, .mean = -0.2});
  const SoftmaxTopK<double> selector({.k = 2});
  const Routing<double> routing = route(selector, padded, {.mask = mask});
  const double loss = loss_of(balancer, routing);
  CHECK(loss == Approx(loss_of(balancer, route(selector, logits))));
  CHECK(logit_gradient(selector, balancer, padded, {.mask = mask}).row(300).isZero(0.0));
  const test::Threads threads(3);
  CHECK(loss_of(balancer, routing) == loss);
}

TEST_CASE("EntropyLoss is zero without real tokens", "[moe][balance][entropy_loss]") {
  const EntropyLoss<double> balancer({.token = 1.0, .mean = -1.0});
  const SoftmaxTopK<double> selector({.k = 1});
  const std::vector<std::uint8_t> mask = {0, 0};
  CHECK(loss_of(balancer, route(selector, Matrix<double>(0, 4))) == 0.0);
  const Routing<double> padding = route(selector, Matrix<double>::Ones(2, 4), {.mask = mask});
  CHECK(loss_of(balancer, padding) == 0.0);
  CHECK(logit_gradient(selector, balancer, Matrix<double>::Ones(2, 4), {.mask = mask}).isZero(0.0));
}

TEST_CASE("EntropyLoss gradient agrees with finite differences",
          "[moe][balance][entropy_loss][gradient]") {
  Matrix<double> logits = test::random_matrix(7, 5, 5);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1};
  const Pass pass{.mask = mask};
  const auto check = [&](const auto& selector, const EntropyLoss<double>& balancer) {
    test::check_logit_gradient(selector, balancer, logits, pass);
  };
  for (const EntropyLoss<double>& balancer : {EntropyLoss<double>({.token = 0.5, .mean = 0.0}),
                                              EntropyLoss<double>({.token = 0.0, .mean = -0.4}),
                                              EntropyLoss<double>({.token = 0.3, .mean = -0.7})}) {
    check(SoftmaxTopK<double>({.k = 2}), balancer);
    check(SigmoidTopK<double>(5, {.k = 2}), balancer);
  }
}

TEST_CASE("EntropyLoss refuses coefficients that are not finite", "[moe][balance][entropy_loss]") {
  CHECK(test::message_of<ConfigError>([] { EntropyLoss<float>({.token = NAN, .mean = 0.0}); }) ==
        "EntropyLoss: token = nan, expected a finite number");
  CHECK(test::message_of<ConfigError>([] {
          EntropyLoss<float>({.token = 0.0, .mean = HUGE_VALF});
        }) == "EntropyLoss: mean = inf, expected a finite number");
}

}  // namespace weir::entropy_loss_test
