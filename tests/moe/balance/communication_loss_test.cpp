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
#include "support/routing.hpp"

using namespace weir;
using test::logit_gradient;
using test::route;

static_assert(BalancingLoss<CommunicationLoss<float>, float>);

TEST_CASE("CommunicationLoss counts a token once for each device",
          "[moe][balance][communication_loss]") {
  // Probabilities (4, 3, 2, 1)/10 twice, choices {0, 1}. Devices {0, 1} and {2, 3}: both tokens go
  // to device 0 only, f'' = 2 / (1 * 2) * (2, 0), P'' = (0.7, 0.3). Devices {0, 2} and {1, 3}, M =
  // 2: both go to both, f'' = 2 / (2 * 2) * (2, 2).
  Matrix<double> logits(2, 4);
  logits.rowwise() =
      RowVector<double>(Eigen::RowVector4d(std::log(4.0), std::log(3.0), std::log(2.0), 0.0));
  const Routing<double> routing = route(SoftmaxTopK<double>{2}, logits);
  CHECK(CommunicationLoss<double>{ExpertGroups::uniform(4, 2), 1, 0.5}.loss(routing) ==
        Approx(0.5 * 1.4));
  CHECK(CommunicationLoss<double>{ExpertGroups({0, 1, 0, 1}), 2, 0.5}.loss(routing) == Approx(0.5));
}

TEST_CASE("CommunicationLoss of one expert per device and M = k is the Switch loss",
          "[moe][balance][communication_loss]") {
  const auto seed = GENERATE(as<std::uint64_t>{}, 1, 2, 3);
  const auto k = GENERATE(as<Index>{}, 1, 2, 6);
  const auto scope = GENERATE(Scope::kBatch, Scope::kSequence);
  const Sequences sequences({4, 0, 3});
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 0, 1};
  const Routing<double> routing = route(SoftmaxTopK<double>{k}, test::random_matrix(7, 6, seed),
                                        {.sequences = &sequences, .mask = mask});
  CHECK(CommunicationLoss<double>{ExpertGroups::uniform(6, 6), k, 0.3, scope}.loss(routing) ==
        Approx(SwitchLoss<double>{0.3, LoadFraction::kOfAssignments, scope}.loss(routing)));
}

TEST_CASE("CommunicationLoss is zero without real tokens", "[moe][balance][communication_loss]") {
  const CommunicationLoss<double> balancer{ExpertGroups::uniform(4, 2), 1, 1.0};
  const SoftmaxTopK<double> selector{1};
  const std::vector<std::uint8_t> mask = {0, 0};
  CHECK(balancer.loss(route(selector, Matrix<double>(0, 4))) == 0.0);
  const Routing<double> padding = route(selector, Matrix<double>::Ones(2, 4), {.mask = mask});
  CHECK(balancer.loss(padding) == 0.0);
  CHECK(logit_gradient(selector, balancer, padding).isZero(0.0));
}

TEST_CASE("CommunicationLoss gradient agrees with finite differences",
          "[moe][balance][communication_loss][gradient]") {
  Matrix<double> logits = test::random_matrix(7, 6, 5);
  const Sequences sequences({4, 0, 3});
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1};
  const Pass pass{.sequences = &sequences, .mask = mask};
  const auto scope = GENERATE(Scope::kBatch, Scope::kSequence);
  const CommunicationLoss<double> balancer{ExpertGroups({0, 1, 1, 2, 0, 1}), 2, 0.5, scope};
  const auto check = [&](const auto& selector) {
    const auto loss = [&] { return balancer.loss(route(selector, logits, pass)); };
    const Matrix<double> analytic =
        logit_gradient(selector, balancer, route(selector, logits, pass));
    CHECK(test::relative_error(analytic, test::numeric_gradient(logits, loss)) <= 1e-6);
  };
  check(SoftmaxTopK<double>{3});
  check(SigmoidTopK<double>(6, {.k = 3}));
}

TEST_CASE("CommunicationLoss says what is wrong", "[moe][balance][communication_loss]") {
  const auto message = [](auto action) { return test::message_of<ConfigError>(action); };
  CHECK(message([] {
          CommunicationLoss<float>{ExpertGroups::uniform(4, 2), 1, -1.0F}.check();
        }) == "CommunicationLoss: coefficient = -1, expected >= 0");
  CHECK(message([] {
          CommunicationLoss<float>{ExpertGroups::uniform(4, 2), 3}.check();
        }) ==
        "CommunicationLoss: devices_per_token = 3, expected 1 <= devices_per_token <= devices = 2");
  CHECK(message([] {
          CommunicationLoss<double>{ExpertGroups::uniform(4, 2)}.loss(
              route(SoftmaxTopK<double>{1}, Matrix<double>::Ones(2, 6)));
        }) == "CommunicationLoss: the groups are of 4 experts, expected 6 as routed to");
}
