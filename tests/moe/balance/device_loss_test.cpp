// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/balance/device_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/loss_gradient.hpp"
#include "support/routing.hpp"

namespace weir::device_loss_test {
using test::logit_gradient;
using test::loss_of;
using test::route;

static_assert(RoutingLoss<DeviceLoss<float>, float>);

TEST_CASE("DeviceLoss matches a routing worked out by hand", "[moe][balance][device_loss]") {
  // Probabilities (4, 3, 2, 1)/10 twice, choices {0, 1}: f = (2, 2, 0, 0), P = p. Devices {0, 1}
  // and {2, 3}: f' = (2, 0), P' = (0.7, 0.3). Devices {0, 2} and {1, 3}: f' = (1, 1).
  Matrix<double> logits(2, 4);
  logits.rowwise() =
      RowVector<double>(Eigen::RowVector4d(std::log(4.0), std::log(3.0), std::log(2.0), 0.0));
  const Routing<double> routing = route(SoftmaxTopK<double>({.k = 2}), logits);
  CHECK(loss_of(DeviceLoss<double>(ExpertGroups::uniform(4, 2), {.coefficient = 0.5}), routing) ==
        Approx(0.5 * 1.4));
  CHECK(loss_of(DeviceLoss<double>(ExpertGroups({0, 1, 0, 1}), {.coefficient = 0.5}), routing) ==
        Approx(0.5));
  // Sizes 1 and 3: f' = (2, 2/3), P' = (0.4, 0.6).
  CHECK(loss_of(DeviceLoss<double>(ExpertGroups({0, 1, 1, 1}), {.coefficient = 1.0}), routing) ==
        Approx(1.2));
}

TEST_CASE("DeviceLoss of one expert per device is the Switch loss, of one device its coefficient",
          "[moe][balance][device_loss]") {
  const auto seed = GENERATE(as<std::uint64_t>{}, 1, 2, 3);
  const auto k = GENERATE(as<Index>{}, 1, 2, 6);
  const auto scope = GENERATE(Scope::kBatch, Scope::kSequence);
  const Sequences sequences({4, 0, 3});
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 0, 1};
  const Routing<double> routing =
      route(SoftmaxTopK<double>({.k = k}), test::random_matrix(7, 6, seed),
            {.sequences = &sequences, .mask = mask});
  CHECK(loss_of(
            DeviceLoss<double>(ExpertGroups::uniform(6, 6), {.coefficient = 0.3, .scope = scope}),
            routing) == Approx(loss_of(SwitchLoss<double>({.coefficient = 0.3,
                                                           .fraction = LoadFraction::kOfAssignments,
                                                           .scope = scope}),
                                       routing)));
  CHECK(
      loss_of(DeviceLoss<double>(ExpertGroups::uniform(6, 1), {.coefficient = 0.3, .scope = scope}),
              routing) == Approx(0.3));
}

TEST_CASE("DeviceLoss is zero without real tokens", "[moe][balance][device_loss]") {
  const DeviceLoss<double> balancer(ExpertGroups::uniform(4, 2), {.coefficient = 1.0});
  const SoftmaxTopK<double> selector({.k = 1});
  const std::vector<std::uint8_t> mask = {0, 0};
  CHECK(loss_of(balancer, route(selector, Matrix<double>(0, 4))) == 0.0);
  const Routing<double> padding = route(selector, Matrix<double>::Ones(2, 4), {.mask = mask});
  CHECK(loss_of(balancer, padding) == 0.0);
  CHECK(logit_gradient(selector, balancer, Matrix<double>::Ones(2, 4), {.mask = mask}).isZero(0.0));
}

TEST_CASE("DeviceLoss gradient agrees with finite differences",
          "[moe][balance][device_loss][gradient]") {
  Matrix<double> logits = test::random_matrix(7, 6, 5);
  const Sequences sequences({4, 0, 3});
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1};
  const Pass pass{.sequences = &sequences, .mask = mask};
  const auto scope = GENERATE(Scope::kBatch, Scope::kSequence);
  const DeviceLoss<double> balancer(ExpertGroups({0, 1, 1, 2, 0, 1}),
                                    {.coefficient = 0.5, .scope = scope});
  const auto check = [&](const auto& selector) {
    test::check_logit_gradient(selector, balancer, logits, pass);
  };
  check(SoftmaxTopK<double>({.k = 2}));
  check(SigmoidTopK<double>(6, {.k = 2}));
}

TEST_CASE("DeviceLoss and ExpertGroups say what is wrong", "[moe][balance][device_loss]") {
  const auto message = [](auto action) { return test::message_of<ConfigError>(action); };
  CHECK(message([] { DeviceLoss<float>(ExpertGroups::uniform(4, 2), {.coefficient = -1.0}); }) ==
        "DeviceLoss: coefficient = -1, expected a finite number >= 0");
  CHECK(message([] {
          loss_of(DeviceLoss<double>(ExpertGroups::uniform(4, 2)),
                  route(SoftmaxTopK<double>({.k = 1}), Matrix<double>::Ones(2, 6)));
        }) == "DeviceLoss: the groups are of 4 experts, expected 6 as routed to");
  CHECK(message([] { ExpertGroups::uniform(4, 3); }) ==
        "ExpertGroups: groups = 3, expected a divisor of experts = 4");
  CHECK(message([] { ExpertGroups::uniform(4, 0); }) == "ExpertGroups: groups = 0, expected >= 1");
  CHECK(message([] {
          ExpertGroups({0, 2, 0});
        }) == "ExpertGroups: group 1 has no expert, expected at least one");
  CHECK(message([] {
          ExpertGroups({0, 2});
        }) == "ExpertGroups: the group of expert 1 = 2, expected 0 <= group < experts = 2");
  CHECK(message([] { ExpertGroups(std::vector<Index>{}); }) ==
        "ExpertGroups: experts = 0, expected >= 1");
}

}  // namespace weir::device_loss_test
