// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/balance/second_place_loss.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/loss_gradient.hpp"
#include "support/routing.hpp"

namespace weir::second_place_loss_test {
using test::logit_gradient;
using test::loss_of;
using test::route;

static_assert(RoutingLoss<SecondPlaceLoss<float>, float>);

TEST_CASE("SecondPlaceLoss matches a routing worked out by hand",
          "[moe][balance][second_place_loss]") {
  // Softmax rows (3, 2, 1)/6 and (1, 3, 2)/6: firsts 0 and 1, seconds 1 and 2. Without the first
  // the rows are (0, 2, 1)/3 and (1, 0, 2)/3: 3 / 4 * (1 * 2/3 + 1 * (1/3 + 2/3)) = 5/4.
  Matrix<double> logits(2, 3);
  logits << std::log(3.0), std::log(2.0), 0.0, 0.0, std::log(3.0), std::log(2.0);
  const auto k = GENERATE(as<Index>{}, 1, 2, 3);
  CHECK(loss_of(SecondPlaceLoss<double>({.coefficient = 0.5}),
                route(SoftmaxTopK<double>({.k = k}), logits)) == Approx(0.5 * 5.0 / 4.0));
}

TEST_CASE("SecondPlaceLoss is zero with one expert and without real tokens",
          "[moe][balance][second_place_loss]") {
  const SecondPlaceLoss<double> balancer({.coefficient = 1.0});
  const SoftmaxTopK<double> selector({.k = 1});
  const std::vector<std::uint8_t> mask = {0, 0};
  const Routing<double> one = route(selector, Matrix<double>::Ones(2, 1));
  CHECK(loss_of(balancer, one) == 0.0);
  CHECK(logit_gradient(selector, balancer, Matrix<double>::Ones(2, 1)).isZero(0.0));
  CHECK(loss_of(balancer, route(selector, Matrix<double>(0, 4))) == 0.0);
  const Routing<double> padding = route(selector, Matrix<double>::Ones(2, 4), {.mask = mask});
  CHECK(loss_of(balancer, padding) == 0.0);
  CHECK(logit_gradient(selector, balancer, Matrix<double>::Ones(2, 4), {.mask = mask}).isZero(0.0));
}

TEST_CASE("SecondPlaceLoss has no second place for a forbidden expert",
          "[moe][balance][second_place_loss]") {
  // Token 0 may have experts 0 and 2, token 1 only expert 1, token 2 only experts 2 and 3, the
  // second of which has lost all to underflow. Counts: experts 0 and 3; q_00 = 1, q_23 = 0.
  Matrix<double> logits(3, 4);
  logits << 1.0, 9.0, 2.0, 9.0, 9.0, 1.0, 9.0, 9.0, 9.0, 9.0, 0.0, -1000.0;
  const std::vector<std::uint8_t> allowed = {1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1};
  const SoftmaxTopK<double> selector({.k = 1});
  const SecondPlaceLoss<double> balancer({.coefficient = 0.5});
  const Routing<double> routing = route(selector, logits, {.allowed = allowed});
  CHECK(loss_of(balancer, routing) == Approx(0.5 * 4.0 / 9.0).epsilon(1e-6));
  const RoutingGradient<double> gradient = test::gradient_of(balancer, routing);
  CHECK(gradient.probabilities(0, 1) == 0.0);
  CHECK(gradient.probabilities(0, 3) == 0.0);
  CHECK(gradient.probabilities.row(1).isZero(0.0));
  CHECK(gradient.probabilities.row(2).leftCols(2).isZero(0.0));
}

TEST_CASE("SecondPlaceLoss gradient agrees with finite differences",
          "[moe][balance][second_place_loss][gradient]") {
  Matrix<double> logits = test::random_matrix(7, 5, 5);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1};
  std::vector<std::uint8_t> allowed(35, 1);
  for (const int i : {0, 7, 8, 16, 30, 31, 34}) allowed[static_cast<std::size_t>(i)] = 0;
  const SecondPlaceLoss<double> balancer({.coefficient = 0.5});
  const auto check = [&](const auto& selector, const Pass& pass) {
    test::check_logit_gradient(selector, balancer, logits, pass);
  };
  for (const Pass& pass : {Pass{.mask = mask}, Pass{.mask = mask, .allowed = allowed}}) {
    check(SoftmaxTopK<double>({.k = 2}), pass);
    check(SigmoidTopK<double>(5, {.k = 1}), pass);
  }
}

TEST_CASE("SecondPlaceLoss refuses a negative coefficient", "[moe][balance][second_place_loss]") {
  CHECK(test::message_of<ConfigError>([] { SecondPlaceLoss<float>({.coefficient = -1.0}); }) ==
        "SecondPlaceLoss: coefficient = -1, expected a finite number >= 0");
}

}  // namespace weir::second_place_loss_test
