// SPDX-License-Identifier: MIT
// Whether balancing brings a collapsed router back. All tokens have a direction in common, and the
// router begins by liking it: every token goes to expert 0, which alone learns, and so on.
#include <algorithm>
#include <utility>

#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/communication_loss.hpp>
#include <weir/moe/balance/device_loss.hpp>
#include <weir/moe/balance/entropy_loss.hpp>
#include <weir/moe/balance/global_batch_loss.hpp>
#include <weir/moe/balance/gshard_loss.hpp>
#include <weir/moe/balance/hierarchical_load_loss.hpp>
#include <weir/moe/balance/hierarchical_loss.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/load_loss.hpp>
#include <weir/moe/balance/quantile_balance.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/hierarchical_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/selector/balanced_assignment.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/expert_choice.hpp>
#include <weir/moe/selector/hierarchical_top_k.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/sinkhorn.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::collapse_test {

namespace {

constexpr Index kTokens = 64;
constexpr Index kWidth = 6;
constexpr Index kExperts = 4;

/// Small weights, except for expert 0, which likes the first feature.
Matrix<double> collapsed() {
  Matrix<double> weight = 0.1 * test::random_matrix(kExperts, kWidth, 1);
  weight(0, 0) += 1.0;
  return weight;
}

GluBank<double> bank() {
  Rng rng(2);
  return {kWidth, kExperts, 8, rng, {.init_scale = 0.1}};
}

/// Trains a layer made of the parts for a regression, and returns the largest load over the mean
/// one in the last pass.
template <class Router, class Selector, class... Balancers>
double imbalance_after_training(Router router, Selector selector, Balancers... balancers) {
  MoELayer moe(std::move(router), std::move(selector), Dropless(), bank(), std::move(balancers)...);
  AdamW<double> optimizer({.learning_rate = 1e-2});
  Matrix<double> x = test::random_matrix(kTokens, kWidth, 3);
  x.col(0).array() += 4.0;
  const Matrix<double> target = test::random_matrix(kTokens, kWidth, 4);
  Rng noise(5);
  typename decltype(moe)::Cache cache;
  for (int step = 0; step < 250; ++step) {
    const Matrix<double> error = moe.forward(x, {.training = true, .rng = &noise}, cache) - target;
    moe.backward(error / static_cast<double>(kTokens), cache);
    optimizer.step(moe);
  }
  return moe.report(cache).imbalance();
}

double with_switch_routing(auto... balancers) {
  return imbalance_after_training(LinearRouter<double>(collapsed()), SoftmaxTopK<double>({.k = 1}),
                                  std::move(balancers)...);
}

double with_bias(BiasBalance<double> rule) {
  return imbalance_after_training(LinearRouter<double>(collapsed()),
                                  SigmoidTopK<double>(kExperts, {.k = 1}), std::move(rule));
}

const double kLevel = 1.7;      ///< The busiest expert has less than this times the mean,
const double kCollapsed = 3.0;  ///< without any balancing more than this, of at most 4.

}  // namespace

TEST_CASE("Without balancing, a collapsed router stays so", "[moe][balance][collapse]") {
  CHECK(with_switch_routing() > kCollapsed);
  CHECK(imbalance_after_training(LinearRouter<double>(collapsed()), TopKSoftmax<double>({.k = 1})) >
        kCollapsed);
  CHECK(with_bias(BiasBalance<double>({.rate = 0.0})) > kCollapsed);
}

TEST_CASE("Each balancing loss brings a collapsed router back", "[moe][balance][collapse]") {
  const auto each = ExpertGroups::uniform(kExperts, kExperts);
  CHECK(with_switch_routing(SwitchLoss<double>({.coefficient = 0.3})) < kLevel);
  CHECK(with_switch_routing(SwitchLoss<double>({.coefficient = 0.3, .scope = Scope::kSequence})) <
        kLevel);
  CHECK(with_switch_routing(GShardLoss<double>({.coefficient = 0.3})) < kLevel);
  CHECK(with_switch_routing(GlobalBatchLoss<double>({.coefficient = 0.3})) < kLevel);
  CHECK(with_switch_routing(EntropyLoss<double>::mutual_information(1.0)) < kLevel);
  CHECK(with_switch_routing(DeviceLoss<double>(each, {.coefficient = 0.3})) < kLevel);
  CHECK(with_switch_routing(CommunicationLoss<double>(
            each, {.devices_per_token = 1, .coefficient = 0.3})) < kLevel);
}

TEST_CASE("The importance loss levels weights, and so loads nearly", "[moe][balance][collapse]") {
  CHECK(with_switch_routing(ImportanceLoss<double>({.coefficient = 1.0})) < 2.5);
}

TEST_CASE("The load loss brings a collapsed noisy router back", "[moe][balance][collapse]") {
  const Matrix<double> quiet = Matrix<double>::Zero(kExperts, kWidth);
  const auto train = [&](auto... losses) {
    return imbalance_after_training(NoisyRouter<double>(collapsed(), quiet),
                                    TopKSoftmax<double>({.k = 1}), losses...);
  };
  CHECK(train(LoadLoss<double>({.coefficient = 0.3}),
              ImportanceLoss<double>({.coefficient = 0.3})) < kLevel);
  CHECK(train(LoadLoss<double>({.coefficient = 0.3})) < kLevel);
}

TEST_CASE("The losses of two levels bring a collapsed two-level router back",
          "[moe][balance][collapse]") {
  // Both levels like the first feature: all tokens go to the first expert of the first group.
  const HierarchicalTopK<double> one({.groups = 2, .group_k = 1, .k = 1, .renormalise = false});
  const auto train = [&](auto... losses) {
    return imbalance_after_training(HierarchicalRouter(LinearRouter<double>(collapsed().topRows(2)),
                                                       LinearRouter<double>(collapsed())),
                                    one, losses...);
  };
  CHECK(train() > kCollapsed);
  CHECK(train(HierarchicalLoss<double>({.groups = 2, .coefficient = 0.3})) < kLevel);

  const auto with_noise = [&](auto... losses) {
    return imbalance_after_training(
        HierarchicalRouter(
            NoisyRouter<double>(collapsed().topRows(2), Matrix<double>::Zero(2, kWidth)),
            NoisyRouter<double>(collapsed(), Matrix<double>::Zero(kExperts, kWidth))),
        one, losses...);
  };
  CHECK(with_noise(HierarchicalLoadLoss<double>({.coefficient = 0.0})) > kCollapsed);
  CHECK(with_noise(HierarchicalLoadLoss<double>({.coefficient = 0.3})) < kLevel);
}

TEST_CASE("Quantiles bring a collapsed router back without a loss", "[moe][balance][collapse]") {
  const auto train = [](auto... rule) {
    return imbalance_after_training(LinearRouter<double>(collapsed()),
                                    BiasedSoftmaxTopK<double>(kExperts, {.k = 1}), rule...);
  };
  CHECK(train() > kCollapsed);
  CHECK(train(QuantileBalance<double>()) < kLevel);
}

TEST_CASE("A selection bias brings a collapsed router back without a loss",
          "[moe][balance][collapse]") {
  CHECK(with_bias(BiasBalance<double>({.rate = 0.01})) < kLevel);
  CHECK(with_bias(BiasBalance<double>({.rate = 0.01, .rule = BiasRule::kProportional})) < kLevel);
}

TEST_CASE("Selectors that balance by themselves cannot collapse", "[moe][balance][collapse]") {
  const auto train = [](auto selector) {
    return imbalance_after_training(LinearRouter<double>(collapsed()), std::move(selector));
  };
  CHECK(train(ExpertChoice<double>({.factor = 1.0})) == 1.0);
  CHECK(train(BalancedAssignment<double>()) == 1.0);
  CHECK(train(Sinkhorn<double>({.k = 1})) < kLevel);
}

}  // namespace weir::collapse_test
