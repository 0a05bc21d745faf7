// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/balance/communication_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/loss_gradient.hpp"
#include "support/routing.hpp"

namespace weir::communication_loss_test {
using test::logit_gradient;
using test::loss_of;
using test::route;

static_assert(RoutingLoss<CommunicationLoss<float>, float>);

TEST_CASE("CommunicationLoss counts a token once for each device",
          "[moe][balance][communication_loss]") {
  // Probabilities (4, 3, 2, 1)/10 twice, choices {0, 1}. Devices {0, 1} and {2, 3}: both tokens go
  // to device 0 only, f'' = 2 / (1 * 2) * (2, 0), P'' = (0.7, 0.3). Devices {0, 2} and {1, 3}, M =
  // 2: both go to both, f'' = 2 / (2 * 2) * (2, 2).
  Matrix<double> logits(2, 4);
  logits.rowwise() =
      RowVector<double>(Eigen::RowVector4d(std::log(4.0), std::log(3.0), std::log(2.0), 0.0));
  const Routing<double> routing = route(SoftmaxTopK<double>({.k = 2}), logits);
  CHECK(loss_of(CommunicationLoss<double>(ExpertGroups::uniform(4, 2),
                                          {.devices_per_token = 1, .coefficient = 0.5}),
                routing) == Approx(0.5 * 1.4));
  CHECK(loss_of(CommunicationLoss<double>(ExpertGroups({0, 1, 0, 1}),
                                          {.devices_per_token = 2, .coefficient = 0.5}),
                routing) == Approx(0.5));
}

TEST_CASE("CommunicationLoss of one expert per device and M = k is the Switch loss",
          "[moe][balance][communication_loss]") {
  const auto seed = GENERATE(as<std::uint64_t>{}, 1, 2, 3);
  const auto k = GENERATE(as<Index>{}, 1, 2, 6);
  const auto scope = GENERATE(Scope::kBatch, Scope::kSequence);
  const Sequences sequences({4, 0, 3});
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 0, 1};
  const Routing<double> routing =
      route(SoftmaxTopK<double>({.k = k}), test::random_matrix(7, 6, seed),
            {.sequences = &sequences, .mask = mask});
  CHECK(loss_of(
            CommunicationLoss<double>(ExpertGroups::uniform(6, 6),
                                      {.devices_per_token = k, .coefficient = 0.3, .scope = scope}),
            routing) == Approx(loss_of(SwitchLoss<double>({.coefficient = 0.3,
                                                           .fraction = LoadFraction::kOfAssignments,
                                                           .scope = scope}),
                                       routing)));
}

TEST_CASE("CommunicationLoss is zero without real tokens", "[moe][balance][communication_loss]") {
  const CommunicationLoss<double> balancer(ExpertGroups::uniform(4, 2),
                                           {.devices_per_token = 1, .coefficient = 1.0});
  const SoftmaxTopK<double> selector({.k = 1});
  const std::vector<std::uint8_t> mask = {0, 0};
  CHECK(loss_of(balancer, route(selector, Matrix<double>(0, 4))) == 0.0);
  const Routing<double> padding = route(selector, Matrix<double>::Ones(2, 4), {.mask = mask});
  CHECK(loss_of(balancer, padding) == 0.0);
  CHECK(logit_gradient(selector, balancer, Matrix<double>::Ones(2, 4), {.mask = mask}).isZero(0.0));
}

TEST_CASE("CommunicationLoss gradient agrees with finite differences",
          "[moe][balance][communication_loss][gradient]") {
  Matrix<double> logits = test::random_matrix(7, 6, 5);
  const Sequences sequences({4, 0, 3});
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1};
  const Pass pass{.sequences = &sequences, .mask = mask};
  const auto scope = GENERATE(Scope::kBatch, Scope::kSequence);
  const CommunicationLoss<double> balancer(
      ExpertGroups({0, 1, 1, 2, 0, 1}),
      {.devices_per_token = 2, .coefficient = 0.5, .scope = scope});
  const auto check = [&](const auto& selector) {
    test::check_logit_gradient(selector, balancer, logits, pass);
  };
  check(SoftmaxTopK<double>({.k = 3}));
  check(SigmoidTopK<double>(6, {.k = 3}));
}

TEST_CASE("CommunicationLoss says what is wrong", "[moe][balance][communication_loss]") {
  const auto message = [](auto action) { return test::message_of<ConfigError>(action); };
  CHECK(message([] {
          CommunicationLoss<float>(ExpertGroups::uniform(4, 2),
                                   {.devices_per_token = 1, .coefficient = -1.0});
        }) == "CommunicationLoss: coefficient = -1, expected a finite number >= 0");
  CHECK(message([] {
          CommunicationLoss<float>(ExpertGroups::uniform(4, 2), {.devices_per_token = 3});
        }) ==
        "CommunicationLoss: devices_per_token = 3, expected 1 <= devices_per_token <= devices = 2");
  CHECK(message([] {
          loss_of(CommunicationLoss<double>(ExpertGroups::uniform(4, 2)),
                  route(SoftmaxTopK<double>({.k = 1}), Matrix<double>::Ones(2, 6)));
        }) == "CommunicationLoss: the groups are of 4 experts, expected 6 as routed to");
}

}  // namespace weir::communication_loss_test
