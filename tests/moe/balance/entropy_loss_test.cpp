// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/balance/entropy_loss.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

using namespace weir;
using test::logit_gradient;
using test::route;

static_assert(BalancingLoss<EntropyLoss<float>, float>);

TEST_CASE("EntropyLoss matches a case worked out by hand", "[moe][balance][entropy_loss]") {
  // Rows (3, 1)/4 and (1, 3)/4: H_token = 2 ln 2 - 3/4 ln 3, P = (1, 1)/2, H_mean = ln 2.
  Matrix<double> logits(2, 2);
  logits << std::log(3.0), 0.0, 0.0, std::log(3.0);
  const Routing<double> routing = route(SoftmaxTopK<double>{1}, logits);
  const double of_token = 2.0 * std::log(2.0) - 0.75 * std::log(3.0);
  CHECK(EntropyLoss<double>{0.5, 0.0}.loss(routing) == Approx(0.5 * of_token));
  CHECK(EntropyLoss<double>{0.0, -2.0}.loss(routing) == Approx(-2.0 * std::log(2.0)));
  CHECK(EntropyLoss<double>::mutual_information(0.1).loss(routing) ==
        Approx(0.1 * (of_token - std::log(2.0))));
}

TEST_CASE("The mutual information is between zero and ln experts", "[moe][balance][entropy_loss]") {
  const auto balancer = EntropyLoss<double>::mutual_information(1.0);
  const SoftmaxTopK<double> selector{1};
  CHECK(balancer.loss(route(selector, test::random_matrix(1, 5, 1))) == Approx(0.0).margin(1e-14));
  CHECK(balancer.loss(route(selector, test::random_matrix(9, 1, 1))) == Approx(0.0).margin(1e-14));
  const Matrix<double> sure = 1e4 * Matrix<double>::Identity(5, 5);
  CHECK(balancer.loss(route(selector, sure)) == Approx(-std::log(5.0)));
  CHECK(logit_gradient(selector, balancer, route(selector, sure)).allFinite());
  const auto seed = GENERATE(as<std::uint64_t>{}, 1, 2, 3);
  const double loss = balancer.loss(route(selector, test::random_matrix(9, 5, seed)));
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
  const EntropyLoss<double> balancer{0.3, -0.2};
  const SoftmaxTopK<double> selector{2};
  const Routing<double> routing = route(selector, padded, {.mask = mask});
  const double loss = balancer.loss(routing);
  CHECK(loss == Approx(balancer.loss(route(selector, logits))));
  CHECK(logit_gradient(selector, balancer, routing).row(300).isZero(0.0));
  const test::Threads threads(3);
  CHECK(balancer.loss(routing) == loss);
}

TEST_CASE("EntropyLoss is zero without real tokens", "[moe][balance][entropy_loss]") {
  const EntropyLoss<double> balancer{1.0, -1.0};
  const SoftmaxTopK<double> selector{1};
  const std::vector<std::uint8_t> mask = {0, 0};
  CHECK(balancer.loss(route(selector, Matrix<double>(0, 4))) == 0.0);
  const Routing<double> padding = route(selector, Matrix<double>::Ones(2, 4), {.mask = mask});
  CHECK(balancer.loss(padding) == 0.0);
  CHECK(logit_gradient(selector, balancer, padding).isZero(0.0));
}

TEST_CASE("EntropyLoss gradient agrees with finite differences",
          "[moe][balance][entropy_loss][gradient]") {
  Matrix<double> logits = test::random_matrix(7, 5, 5);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1};
  const Pass pass{.mask = mask};
  const auto check = [&](const auto& selector, const EntropyLoss<double>& balancer) {
    const auto loss = [&] { return balancer.loss(route(selector, logits, pass)); };
    const Matrix<double> analytic =
        logit_gradient(selector, balancer, route(selector, logits, pass));
    CHECK(test::relative_error(analytic, test::numeric_gradient(logits, loss)) <= 1e-6);
  };
  for (const EntropyLoss<double>& balancer :
       {EntropyLoss<double>{0.5, 0.0}, EntropyLoss<double>{0.0, -0.4},
        EntropyLoss<double>{0.3, -0.7}}) {
    check(SoftmaxTopK<double>{2}, balancer);
    check(SigmoidTopK<double>(5, {.k = 2}), balancer);
  }
}

TEST_CASE("EntropyLoss refuses coefficients that are not finite", "[moe][balance][entropy_loss]") {
  CHECK(test::message_of<ConfigError>([] {
          EntropyLoss<float>{NAN, 0.0F}.check();
        }) == "EntropyLoss: token = nan, expected a finite number");
  CHECK(test::message_of<ConfigError>([] {
          EntropyLoss<float>{0.0F, HUGE_VALF}.check();
        }) == "EntropyLoss: mean = inf, expected a finite number");
}
