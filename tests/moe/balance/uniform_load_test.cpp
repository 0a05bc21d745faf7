// SPDX-License-Identifier: MIT
// Every loss has, at exactly uniform load, the value that its comment states.
#include <cmath>
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
#include <weir/moe/balance/orthogonality_loss.hpp>
#include <weir/moe/balance/relu_l1_loss.hpp>
#include <weir/moe/balance/second_place_loss.hpp>
#include <weir/moe/balance/similarity_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/hierarchical_top_k.hpp>
#include <weir/moe/selector/relu_routing.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/ops/logsumexp.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/noisy_routing.hpp"
#include "support/routing.hpp"

namespace weir::uniform_load_test {
using test::loss_of;
using test::route;

namespace {

constexpr Index kExperts = 8;
constexpr Index kTokens = 24;
constexpr double kC = 0.7;  // The coefficient of all losses.

/// [tokens, experts]: the scores of token 0, shifted by t for token t, so that each expert is in
/// each place equally often. The best is t, the second t + 2, in another group of two neighbours.
Matrix<double> shifted(double spread) {
  const std::vector<double> scores = {2.0, -0.5, 1.5, -1.0, 0.5, -2.0, 0.1, -0.2};
  Matrix<double> logits(kTokens, kExperts);
  for (Index t = 0; t < kTokens; ++t) {
    for (Index e = 0; e < kExperts; ++e) {
      logits(t, (t + e) % kExperts) = spread * scores[static_cast<std::size_t>(e)];
    }
  }
  return logits;
}

/// Uniform in load, rank by rank, in weights and in mean probabilities, whatever the spread.
Routing<double> uniform(Index k, double spread = 1.0) {
  Routing<double> routing = route(SoftmaxTopK<double>({.k = k}), shifted(spread));
  if (spread == 0.0) {  // All tie: the choice of the others.
    routing.expert = route(SoftmaxTopK<double>({.k = k}), shifted(1.0)).expert;
  }
  return routing;
}

}  // namespace

TEST_CASE("The load of this test is exactly uniform", "[moe][balance][uniform_load]") {
  const Index k = GENERATE(1, 2, 4);
  const double spread = GENERATE(0.0, 1.0, 60.0);
  const Routing<double> routing = uniform(k, spread);
  for (Index rank = 0; rank < k; ++rank) {
    RowVector<double> load = RowVector<double>::Zero(kExperts);
    for (Index t = 0; t < kTokens; ++t) {
      load[routing.expert[routing.first(t) + rank]] += 1.0;
    }
    CHECK(load == RowVector<double>::Constant(kExperts, 3.0));
  }
  CHECK(routing.probabilities.colwise().mean().isApprox(
      RowVector<double>::Constant(kExperts, 1.0 / 8.0)));
}

TEST_CASE("Every balancing loss has its documented value at uniform load",
          "[moe][balance][uniform_load]") {
  const Index k = GENERATE(1, 2, 4);
  const double spread = GENERATE(0.0, 1.0, 60.0);
  INFO("k " << k << ", logits spread " << spread);
  const Routing<double> routing = uniform(k, spread);
  const auto expect = [&](const auto& loss, double value) {
    INFO(loss.kName);
    CHECK(std::abs(loss_of(loss, routing) - value) <= 1e-8);
  };
  expect(SwitchLoss<double>({.coefficient = kC}), kC);
  expect(SwitchLoss<double>({.coefficient = kC, .fraction = LoadFraction::kOfTokens}),
         static_cast<double>(k) * kC);
  expect(GShardLoss<double>({.coefficient = kC}), kC);
  expect(GlobalBatchLoss<double>({.coefficient = kC}), kC);
  expect(DeviceLoss<double>(ExpertGroups::uniform(kExperts, 4), {.coefficient = kC}), kC);
  expect(ImportanceLoss<double>({.coefficient = kC}), 0.0);
  expect(LoadLoss<double>({.coefficient = kC}), 0.0);
  expect(HierarchicalLoadLoss<double>({.coefficient = kC}), 0.0);
  if (k == 1) {
    expect(CommunicationLoss<double>(ExpertGroups::uniform(kExperts, 4),
                                     {.devices_per_token = 1, .coefficient = kC}),
           kC);
  }
  if (k == 2) {  // Two devices to each token.
    expect(CommunicationLoss<double>(ExpertGroups::uniform(kExperts, 4),
                                     {.devices_per_token = 2, .coefficient = kC}),
           kC);
  }
  expect(HierarchicalLoss<double>({.groups = 4, .coefficient = kC}), 2.0 * kC);
  if (spread < 60.0)
    expect(SecondPlaceLoss<double>({.coefficient = kC}), kC);  // Beyond, the 1e-9 in it counts.
  const double ln = std::log(static_cast<double>(kExperts));
  expect(EntropyLoss<double>({.token = 0.0, .mean = kC}), kC * ln);
  if (spread == 0.0) {  // Uniform in each token.
    expect(ZLoss<double>({.coefficient = kC}), kC * ln * ln);
    expect(EntropyLoss<double>({.token = kC, .mean = 0.0}), kC * ln);
    expect(EntropyLoss<double>::mutual_information(kC), 0.0);
    expect(SimilarityLoss<double>({.coefficient = kC}), k > 1 ? kC : kC / 8.0);
  }
  if (spread == 60.0) {  // Sure of each token.
    expect(EntropyLoss<double>({.token = kC, .mean = 0.0}), 0.0);
    expect(EntropyLoss<double>::mutual_information(kC), -kC * ln);
  }
}

TEST_CASE("LoadLoss of noisy logits is zero at uniform expected load",
          "[moe][balance][uniform_load]") {
  const Routing<double> choice = uniform(2);
  const test::NoisyRouting<double> routing(
      choice, {{0.9 * choice.logits, Matrix<double>::Constant(kTokens, kExperts, 0.4)}});
  LoadLoss<double>::Cache cache;
  CHECK(LoadLoss<double>({.coefficient = kC}).forward(routing, cache) < 1e-20);
  CHECK(cache.load.isApprox(RowVector<double>::Constant(kExperts, cache.load[0])));
}

TEST_CASE("HierarchicalLoadLoss of noise at two levels is zero at uniform expected load",
          "[moe][balance][uniform_load]") {
  // Whole groups take turns, and the experts in each: 24 tokens, 4 groups of 2.
  Matrix<double> logits(kTokens, kExperts);
  for (Index t = 0; t < kTokens; ++t) {
    for (Index e = 0; e < kExperts; ++e) {
      logits(t, e) =
          0.5 * static_cast<double>((e / 2 + t) % 4) + ((e + t / 4) % 2 == 0 ? 0.3 : 0.0);
    }
  }
  const HierarchicalTopK<double> selector(
      {.groups = 4, .group_k = GENERATE(1, 2), .k = 1, .rest_k = 1});
  Matrix<double> groups(kTokens, 4);  // Their logits, without noise.
  for (Index t = 0; t < kTokens; ++t) {
    for (Index g = 0; g < 4; ++g) groups(t, g) = logsumexp<double>({&logits(t, 2 * g), 2}) - 0.2;
  }
  const test::NoisyRouting<double> routing(
      route(selector, logits),
      {{groups, Matrix<double>::Constant(kTokens, 4, 0.5)},
       {Matrix<double>(logits.array() - 0.1), Matrix<double>::Constant(kTokens, kExperts, 0.4)}});
  HierarchicalLoadLoss<double>::Cache cache;
  CHECK(HierarchicalLoadLoss<double>({.coefficient = kC}).forward(routing, cache) < 1e-20);
  CHECK(cache.load.isApprox(RowVector<double>::Constant(kExperts, cache.load[0])));
  CHECK(cache.load[0] > 0.5);
}

TEST_CASE("ReluL1Loss has its documented value at uniform load", "[moe][balance][uniform_load]") {
  // 0.1, 0.5, 1.5 and 2 are above zero: four experts to a token, whose weights add up to 4.1.
  const Routing<double> routing = route(ReluRouting<double>(), shifted(1.0));
  REQUIRE(routing.assignments() == 4 * kTokens);
  for (const bool load_balance : {false, true}) {
    const ReluL1Loss<double> loss({.k = 4, .initial = kC, .load_balance = load_balance});
    CHECK(loss_of(loss, routing) == Approx(kC * 4.1));
  }
}

TEST_CASE("OrthogonalityLoss is the same at any load", "[moe][balance][uniform_load]") {
  // It is not given one: 8 vectors at right angles, and 8 that are the same.
  const OrthogonalityLoss<double> loss({.coefficient = kC});
  OrthogonalityLoss<double>::Cache cache;
  const LinearRouter<double> apart(Matrix<double>::Identity(8, 9));
  const LinearRouter<double> alike(Matrix<double>::Ones(8, 9));
  CHECK(loss.forward(apart, cache) == 0.0);
  CHECK(loss.forward(alike, cache) == Approx(kC * 56.0 / 64.0));
}

}  // namespace weir::uniform_load_test
