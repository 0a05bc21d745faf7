// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/balance/gshard_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/loss_gradient.hpp"
#include "support/routing.hpp"

namespace weir::gshard_loss_test {
using test::logit_gradient;
using test::loss_of;
using test::route;

static_assert(RoutingLoss<GShardLoss<float>, float>);
static_assert(!ObservingBalancer<GShardLoss<float>, float>);

TEST_CASE("GShardLoss matches a routing worked out by hand", "[moe][balance][gshard_loss]") {
  // Softmax rows (3, 2, 1)/6 and (1, 3, 2)/6, first choices 0 and 1, seconds not counted:
  // 3 / 4 * (1 * 4/6 + 1 * 5/6) = 9/8.
  Matrix<double> logits(2, 3);
  logits << std::log(3.0), std::log(2.0), 0.0, 0.0, std::log(3.0), std::log(2.0);
  Routing<double> routing = route(SoftmaxTopK<double>({.k = 2}), logits);
  CHECK(loss_of(GShardLoss<double>({.coefficient = 0.5}), routing) == Approx(0.5 * 9.0 / 8.0));
  test::limit(FixedCapacity({.capacity = 1}), routing);
  CHECK(loss_of(GShardLoss<double>({.coefficient = 0.5}), routing) == Approx(0.5 * 9.0 / 8.0));
}

TEST_CASE("GShardLoss is the Switch loss for one choice per token", "[moe][balance][gshard_loss]") {
  const auto seed = GENERATE(as<std::uint64_t>{}, 1, 2, 3);
  const auto scope = GENERATE(Scope::kBatch, Scope::kSequence);
  const auto experts = GENERATE(as<Index>{}, 1, 5);
  const Sequences sequences({4, 0, 3});
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 0, 1};
  const Matrix<double> logits = test::random_matrix(7, experts, seed);
  const Pass pass{.sequences = &sequences, .mask = mask};
  const Routing<double> one = route(SoftmaxTopK<double>({.k = 1}), logits, pass);
  const Routing<double> all = route(SoftmaxTopK<double>({.k = experts}), logits, pass);
  const double expected =
      loss_of(SwitchLoss<double>(
                  {.coefficient = 0.3, .fraction = LoadFraction::kOfAssignments, .scope = scope}),
              one);
  CHECK(loss_of(GShardLoss<double>({.coefficient = 0.3, .scope = scope}), one) == Approx(expected));
  CHECK(loss_of(GShardLoss<double>({.coefficient = 0.3, .scope = scope}), all) == Approx(expected));
}

TEST_CASE("GShardLoss does not see padding, and is zero without real tokens",
          "[moe][balance][gshard_loss]") {
  const Matrix<double> logits = test::random_matrix(3, 4, 2);
  Matrix<double> padded = Matrix<double>::Constant(5, 4, NAN);
  padded.topRows(2) = logits.topRows(2);
  padded.row(3) = logits.row(2);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 0};
  const GShardLoss<double> balancer({.coefficient = 0.3});
  const SoftmaxTopK<double> selector({.k = 2});
  const Routing<double> routing = route(selector, padded, {.mask = mask});
  CHECK(loss_of(balancer, routing) == Approx(loss_of(balancer, route(selector, logits))));
  const Matrix<double> gradient = logit_gradient(selector, balancer, padded, {.mask = mask});
  CHECK(gradient.row(2).isZero(0.0));
  CHECK(gradient.row(4).isZero(0.0));

  const std::vector<std::uint8_t> nothing = {0, 0, 0};
  CHECK(loss_of(balancer, route(selector, Matrix<double>(0, 4))) == 0.0);
  const Routing<double> all = route(selector, logits, {.mask = nothing});
  CHECK(loss_of(balancer, all) == 0.0);
  CHECK(logit_gradient(selector, balancer, logits, {.mask = nothing}).isZero(0.0));
}

TEST_CASE("GShardLoss gradient agrees with finite differences",
          "[moe][balance][gshard_loss][gradient]") {
  Matrix<double> logits = test::random_matrix(7, 5, 5);
  const Sequences sequences({4, 0, 3});
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1};
  const Pass pass{.sequences = &sequences, .mask = mask};
  const auto scope = GENERATE(Scope::kBatch, Scope::kSequence);
  const GShardLoss<double> balancer({.coefficient = 0.5, .scope = scope});
  const auto check = [&](const auto& selector) {
    test::check_logit_gradient(selector, balancer, logits, pass);
  };
  check(SoftmaxTopK<double>({.k = 2}));
  check(SigmoidTopK<double>(5, {.k = 2}));
}

TEST_CASE("GShardLoss refuses a negative coefficient", "[moe][balance][gshard_loss]") {
  CHECK(test::message_of<ConfigError>([] { GShardLoss<float>({.coefficient = -1.0}); }) ==
        "GShardLoss: coefficient = -1, expected a finite number >= 0");
}

}  // namespace weir::gshard_loss_test
