// SPDX-License-Identifier: MIT
// A layer with experts that are switched off for all tokens is the layer that never had them.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include <weir/core/verbs.hpp>
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
#include <weir/moe/balance/relu_l1_loss.hpp>
#include <weir/moe/balance/second_place_loss.hpp>
#include <weir/moe/balance/similarity_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/adaptive_capacity.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/device_capacity.hpp>
#include <weir/moe/capacity/dynamic_capacity.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/report.hpp>
#include <weir/moe/selector/balanced_assignment.hpp>
#include <weir/moe/selector/biased_probability_top_k.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/expert_choice.hpp>
#include <weir/moe/selector/relu_routing.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/sinkhorn.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/moe/selector/top_p.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::open_experts_test {

namespace {

using Mask = std::vector<std::uint8_t>;

const Mask kSome = {1, 0, 1, 1, 0, 1};
const List<Index> kOpen = {0, 2, 3, 5};

Matrix<double> open_columns(const Matrix<double>& all) {
  Matrix<double> some(all.rows(), 4);
  for (Index i = 0; i < 4; ++i) some.col(i) = all.col(kOpen[i]);
  return some;
}

/// kSome for each of the tokens, which has to have the same meaning.
Mask token_by_token(Index tokens) {
  Mask allowed;
  for (Index t = 0; t < tokens; ++t) allowed.insert(allowed.end(), kSome.begin(), kSome.end());
  return allowed;
}

/// Calls `body(name, loss of six experts, loss of the four that are open)`.
template <class Body>
void for_each_loss(Body&& body) {
  const auto same = [&](const std::string& name, const auto& loss) { body(name, loss, loss); };
  const ExpertGroups devices({0, 0, 1, 1, 2, 1});
  const ExpertGroups open_devices({0, 1, 1, 1});  // No device 2: expert 4 is all it has.
  for (const Scope scope : {Scope::kBatch, Scope::kSequence}) {
    for (const LoadFraction f : {LoadFraction::kOfAssignments, LoadFraction::kOfTokens}) {
      same("switch", SwitchLoss<double>({.coefficient = 0.3, .fraction = f, .scope = scope}));
    }
    same("gshard", GShardLoss<double>({.coefficient = 0.2, .scope = scope}));
    same("hierarchical",
         HierarchicalLoss<double>({.groups = 2, .coefficient = 0.2, .scope = scope}));
    body("device", DeviceLoss<double>(devices, {.coefficient = 0.6, .scope = scope}),
         DeviceLoss<double>(open_devices, {.coefficient = 0.6, .scope = scope}));
    const CommunicationLossConfig config{
        .devices_per_token = 2, .coefficient = 0.7, .scope = scope};
    body("communication", CommunicationLoss<double>(devices, config),
         CommunicationLoss<double>(open_devices, config));
  }
  same("z", ZLoss<double>({.coefficient = 0.1}));
  for (const Variance variance : {Variance::kPopulation, Variance::kSample}) {
    same("importance", ImportanceLoss<double>({.coefficient = 0.4, .variance = variance}));
    same("load", LoadLoss<double>({.coefficient = 0.4, .variance = variance}));
  }
  same("hierarchical load", HierarchicalLoadLoss<double>({.coefficient = 0.4}));
  same("entropy", EntropyLoss<double>({.token = 0.3, .mean = -0.2}));
  same("second place", SecondPlaceLoss<double>({.coefficient = 0.5}));
  same("similarity", SimilarityLoss<double>({.coefficient = 0.5}));
  same("global batch", GlobalBatchLoss<double>({.coefficient = 0.5}));
  same("relu", ReluL1Loss<double>({.initial = 0.5}));
}

template <class Body>
void for_each_selector(Body&& body) {
  const auto same = [&](const std::string& name, const auto& selector) {
    body(name, selector, selector);
  };
  same("softmax", SoftmaxTopK<double>({.k = 2}));
  same("top-k softmax", TopKSoftmax<double>({.k = 2}));
  same("top-p", TopP<double>({.threshold = 0.7}));
  same("relu", ReluRouting<double>());
  same("sinkhorn", Sinkhorn<double>({.k = 2}));
  same("balanced", BalancedAssignment<double>());
  for (const ScoresOver over : {ScoresOver::kExperts, ScoresOver::kTokens}) {
    same("expert choice", ExpertChoice<double>({.factor = 2.0, .over = over}));
  }
  body("sigmoid", SigmoidTopK<double>(6), SigmoidTopK<double>(4));
  body("biased softmax", BiasedSoftmaxTopK<double>(6), BiasedSoftmaxTopK<double>(4));
  body("biased probability", BiasedProbabilityTopK<double>(6), BiasedProbabilityTopK<double>(4));
}

template <class Body>
void for_each_capacity(Body&& body) {
  const auto same = [&](const std::string& name, const auto& capacity) {
    body(name, capacity, capacity);
  };
  for (const bool count_k : {true, false}) {
    for (const DropOrder order : {DropOrder::kRankMajor, DropOrder::kProbability}) {
      same("factor",
           CapacityFactor({.train = 0.8, .count_k = count_k, .minimum = 1, .order = order}));
    }
  }
  same("adaptive", AdaptiveCapacity<double>({.initial = 0.8, .least = 0.1, .minimum = 1}));
  same("dynamic", DynamicCapacity({.factor = 0.6}));
  same("dynamic, limited", DynamicCapacity({.factor = -0.6}));
  same("fixed", FixedCapacity({.capacity = 2}));
  same("renormalised", RenormaliseKept(CapacityFactor({.train = 0.8, .minimum = 1})));
  same("device", DeviceCapacity({.devices = 2, .factor = 0.7, .protected_share = 0.0}));
}

/// Checks that the columns of all experts are zero, except for those of the open ones.
void check_columns(const Matrix<double>& all, const Matrix<double>& some) {
  CHECK((open_columns(all) - some).norm() <= 1e-12 * some.norm() + 1e-15);
  CHECK(all.col(1).isZero(0.0));
  CHECK(all.col(4).isZero(0.0));
}

}  // namespace

TEST_CASE("A routing knows which experts the pass leaves open", "[moe][allowed]") {
  Routing<double> routing;
  const Matrix<double> logits = test::random_matrix(3, 6, 1);
  const auto open = [&](const Pass& pass) {
    routing.begin("Test", logits, pass);
    CHECK(routing.open_experts() == routing.open.count());
    return routing.open;
  };
  CHECK(open({}) == List<Index>{0, 1, 2, 3, 4, 5});
  CHECK(open({.allowed = kSome}) == kOpen);
  CHECK(open({.allowed = token_by_token(3)}) == kOpen);
  Mask scattered = token_by_token(3);
  scattered[1] = 1;  // Token 0 may go to expert 1.
  CHECK(open({.allowed = scattered}) == List<Index>{0, 1, 2, 3, 5});
  const Mask padding = {0, 1, 1};  // But it is padding.
  CHECK(open({.mask = padding, .allowed = scattered}) == kOpen);
  routing.begin("Test", Matrix<double>(0, 6), {.allowed = kSome});
  CHECK(routing.open == kOpen);
}

TEST_CASE("Every loss is that of a layer without the experts that are switched off",
          "[moe][allowed][balance]") {
  const Mask padding = {1, 1, 1, 0, 1, 1, 1, 1, 1};
  const Sequences sequences({4, 5});
  const Mask each = token_by_token(9);
  for (const Mask& allowed : {kSome, each}) {
    const Pass without{.training = true, .sequences = &sequences, .mask = padding};
    Pass pass = without;
    pass.allowed = allowed;
    for_each_selector([&](const std::string& selector_name, const auto& all, const auto& some) {
      INFO(selector_name);
      for_each_loss([&](const std::string& name, const auto& loss, const auto& expected) {
        INFO(name);
        const Matrix<double> logits = test::random_matrix(9, 6, 31);
        const Matrix<double> open = open_columns(logits);
        CHECK(test::loss_of(loss, test::route(all, logits, pass)) ==
              Approx(test::loss_of(expected, test::route(some, open, without))).epsilon(1e-12));
        check_columns(test::logit_gradient(all, loss, logits, pass),
                      test::logit_gradient(some, expected, open, without));
      });
    });
  }
}

TEST_CASE("Every loss of noise is that of a layer without the experts that are switched off",
          "[moe][allowed][balance]") {
  std::vector<NoiseLevel<double>> levels(2), open_levels(2);
  levels[0] = {test::random_matrix(9, 2, 1), Matrix<double>::Constant(9, 2, 0.7)};
  levels[1] = {test::random_matrix(9, 6, 2), Matrix<double>::Constant(9, 6, 0.6)};
  open_levels[0] = levels[0];
  open_levels[1] = {open_columns(levels[1].clean), open_columns(levels[1].deviation)};
  const Matrix<double> logits = test::random_matrix(9, 6, 33);
  const TopKSoftmax<double> selector({.k = 2});
  Routing<double> all = test::route(selector, logits, {.allowed = kSome});
  Routing<double> some = test::route(selector, open_columns(logits));
  all.noise = levels;
  some.noise = open_levels;
  const auto check = [&](const auto& loss) {
    CHECK(test::loss_of(loss, all) == Approx(test::loss_of(loss, some)).epsilon(1e-12));
    const RoutingGradient<double> d = test::gradient_of(loss, all);
    const RoutingGradient<double> expected = test::gradient_of(loss, some);
    check_columns(d.logits, expected.logits);
    check_columns(d.noise[1].clean, expected.noise[1].clean);
    check_columns(d.noise[1].deviation, expected.noise[1].deviation);
    CHECK(test::relative_error(d.noise[0].clean, expected.noise[0].clean) <= 1e-12);
  };
  check(LoadLoss<double>({.coefficient = 0.4}));
  check(HierarchicalLoadLoss<double>({.coefficient = 0.4}));
  // A group without visitors: its share is divided among its open experts.
  for (Index a = 0; a < all.assignments(); ++a) all.expert[a] = a % 2 == 0 ? 0 : 2;
  for (Index a = 0; a < some.assignments(); ++a) some.expert[a] = a % 2 == 0 ? 0 : 1;
  check(HierarchicalLoadLoss<double>({.coefficient = 0.4}));
}

TEST_CASE("Every capacity is that of a layer without the experts that are switched off",
          "[moe][allowed][capacity]") {
  const Mask padding = {1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  const Sequences sequences({5, 7});
  const Pass without{.training = true, .sequences = &sequences, .mask = padding};
  Pass pass = without;
  pass.allowed = kSome;
  Matrix<double> logits = test::random_matrix(12, 6, 35);
  logits.col(2).array() += 1.0;
  for_each_selector([&](const std::string& selector_name, const auto& all, const auto& some) {
    INFO(selector_name);
    for_each_capacity([&](const std::string& name, auto capacity, auto expected) {
      INFO(name);
      Routing<double> of_all = test::route(all, logits, pass);
      Routing<double> of_some = test::route(some, open_columns(logits), without);
      test::limit(capacity, of_all, pass);
      test::limit(expected, of_some, without);
      CHECK(of_all.kept == of_some.kept);
      capacity.observe(of_all);
      expected.observe(of_some);
      if constexpr (requires { capacity.update_self(); }) {
        capacity.update_self();
        expected.update_self();
        CHECK(capacity.factor() == Approx(expected.factor()).epsilon(1e-12));
      }
      const LayerReport report = report_of(of_all);
      const LayerReport expected_report = report_of(of_some);
      CHECK(report.switched_off == 2);
      CHECK(report.imbalance() == Approx(expected_report.imbalance()).epsilon(1e-12));
      CHECK(report.dropped == expected_report.dropped);
    });
  });
}

TEST_CASE("A device whose experts are all switched off has no share of the budget",
          "[moe][allowed][capacity]") {
  // Devices {0, 1}, {2, 3}, {4, 5}; the last is off. 8 assignments, 4 to a device.
  Matrix<double> logits = Matrix<double>::Zero(8, 6);
  logits.col(0).setConstant(1.0);
  const Mask allowed = {1, 1, 1, 1, 0, 0};
  const Pass pass{.training = true, .allowed = allowed};
  Routing<double> routing = test::route(SoftmaxTopK<double>({.k = 1}), logits, pass);
  test::limit(DeviceCapacity({.devices = 3, .factor = 1.0, .protected_share = 0.0}), routing, pass);
  CHECK(std::count(routing.kept.begin(), routing.kept.end(), 1) == 4);
}

TEST_CASE("Every rule moves the bias as in a layer without the experts that are switched off",
          "[moe][allowed][balance]") {
  const Matrix<double> logits = test::random_matrix(16, 6, 36);
  const auto check = [&](auto all, auto some, auto rule) {
    auto expected = rule;
    for (int step = 0; step < 3; ++step) {
      rule.observe(test::route(all, logits, {.allowed = kSome}));
      expected.observe(test::route(some, open_columns(logits)));
      rule.update(all);
      expected.update(some);
    }
    check_columns(all.selection_bias().value, some.selection_bias().value);
    CHECK(all.selection_bias().value.cwiseAbs().maxCoeff() > 0.0);
  };
  check(SigmoidTopK<double>(6), SigmoidTopK<double>(4), BiasBalance<double>({.rate = 0.1}));
  check(SigmoidTopK<double>(6), SigmoidTopK<double>(4),
        BiasBalance<double>({.rate = 0.1, .rule = BiasRule::kProportional, .recentre = true}));
  check(BiasedSoftmaxTopK<double>(6), BiasedSoftmaxTopK<double>(4), QuantileBalance<double>());
  check(BiasedProbabilityTopK<double>(6), BiasedProbabilityTopK<double>(4),
        BiasBalance<double>({.rate = 0.1}));
}

}  // namespace weir::open_experts_test
