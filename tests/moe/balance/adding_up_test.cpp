// SPDX-License-Identifier: MIT
// Every balancing loss adds to the gradients that are there, so that several can be in one layer.
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <weir/moe/balance/communication_loss.hpp>
#include <weir/moe/balance/device_loss.hpp>
#include <weir/moe/balance/entropy_loss.hpp>
#include <weir/moe/balance/global_batch_loss.hpp>
#include <weir/moe/balance/gshard_loss.hpp>
#include <weir/moe/balance/hierarchical_load_loss.hpp>
#include <weir/moe/balance/hierarchical_loss.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/load_loss.hpp>
#include <weir/moe/balance/relu_l1_loss.hpp>
#include <weir/moe/balance/second_place_loss.hpp>
#include <weir/moe/balance/similarity_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/noisy_routing.hpp"
#include "support/routing.hpp"

namespace weir::adding_up_test {

namespace {

/// A routing of six experts with `levels` levels of noise.
test::NoisyRouting<double> noisy_routing(std::vector<NoiseLevel<double>> levels) {
  return {test::route(TopKSoftmax<double>({.k = 2}), test::random_matrix(9, 6, 1), kTraining),
          std::move(levels)};
}

NoiseLevel<double> level(Index experts, std::uint64_t seed) {
  return {test::random_matrix(9, experts, seed), Matrix<double>::Constant(9, experts, 0.7)};
}

template <class L>
void check_adds(const std::string& name, const L& loss, const Routing<double>& routing) {
  INFO(name);
  const RoutingGradient<double> alone = test::gradient_of(loss, routing, 0.5);
  RoutingGradient<double> added;
  added.reset(routing);
  added.weights.setConstant(3.0);
  added.probabilities.setConstant(4.0);
  added.logits.setConstant(5.0);
  for (NoiseLevel<double>& of_level : added.noise) {
    of_level.clean.setConstant(6.0);
    of_level.deviation.setConstant(7.0);
  }
  typename L::Cache cache;
  static_cast<void>(loss.forward(routing, cache));
  loss.backward(routing, 0.5, added, cache);
  double largest = 0.0;  // Of what the loss adds at all.
  const auto check = [&](const Matrix<double>& sum, const Matrix<double>& own, double before) {
    CHECK((sum.array() - own.array() - before).abs().maxCoeff() <= 1e-14);
    largest = std::max(largest, own.cwiseAbs().maxCoeff());
  };
  check(added.weights, alone.weights, 3.0);
  check(added.probabilities, alone.probabilities, 4.0);
  check(added.logits, alone.logits, 5.0);
  for (std::size_t l = 0; l < added.noise.size(); ++l) {
    check(added.noise[l].clean, alone.noise[l].clean, 6.0);
    check(added.noise[l].deviation, alone.noise[l].deviation, 7.0);
  }
  CHECK(largest > 1e-6);
}

}  // namespace

TEST_CASE("Every balancing loss adds to the gradients that are there", "[moe][balance]") {
  const auto routing = noisy_routing({});
  const ExpertGroups devices({0, 0, 1, 1, 2, 2});
  for (const Scope scope : {Scope::kBatch, Scope::kSequence}) {
    check_adds("switch", SwitchLoss<double>({.scope = scope}), routing);
    check_adds("gshard", GShardLoss<double>({.scope = scope}), routing);
    check_adds("hierarchical", HierarchicalLoss<double>({.groups = 2, .scope = scope}), routing);
    check_adds("device", DeviceLoss<double>(devices, {.scope = scope}), routing);
    check_adds("communication",
               CommunicationLoss<double>(devices, {.devices_per_token = 2, .scope = scope}),
               routing);
  }
  check_adds("z", ZLoss<double>(), routing);
  check_adds("importance", ImportanceLoss<double>(), routing);
  check_adds("entropy", EntropyLoss<double>({.token = 0.3, .mean = -0.2}), routing);
  check_adds("second place", SecondPlaceLoss<double>(), routing);
  check_adds("similarity", SimilarityLoss<double>({.coefficient = 0.5}), routing);
  check_adds("global batch", GlobalBatchLoss<double>(), routing);
  check_adds("relu", ReluL1Loss<double>({.initial = 0.5}), routing);
  check_adds("load", LoadLoss<double>(), noisy_routing({level(6, 2)}));
  check_adds("hierarchical load", HierarchicalLoadLoss<double>(),
             noisy_routing({level(2, 3), level(6, 4)}));
}

}  // namespace weir::adding_up_test
