// SPDX-License-Identifier: MIT
// Experts that a pass forbids: routed as if they were not there.
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <weir/moe/balance/entropy_loss.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/load_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/depths/mixture_of_depths.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/selector/balanced_assignment.hpp>
#include <weir/moe/selector/biased_probability_top_k.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/expert_choice.hpp>
#include <weir/moe/selector/relaxed_top_k.hpp>
#include <weir/moe/selector/relu_routing.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/sinkhorn.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/sparse_mixer.hpp>
#include <weir/moe/selector/straight_through.hpp>
#include <weir/moe/selector/threshold.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/moe/selector/top_p.hpp>
#include <weir/moe/soft_moe.hpp>
#include <weir/nn/linear.hpp>

#include "moe/selector/selected.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::allowed_experts_test {

namespace {

using Mask = std::vector<std::uint8_t>;

constexpr Index kExperts = 6;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
const Mask kSome = {1, 0, 1, 1, 0, 1};
const List<Index> kAllowed = {0, 2, 3, 5};

Matrix<double> allowed_columns(const Matrix<double>& all) {
  Matrix<double> some(all.rows(), 4);
  for (Index i = 0; i < 4; ++i) some.col(i) = all.col(kAllowed[i]);
  return some;
}

/// Calls `body(name, selector of all experts, selector of those allowed)`.
template <class Body>
void for_each_selector(Body&& body) {
  const auto same = [&](const std::string& name, const auto& selector) {
    body(name, selector, selector);
  };
  same("softmax", SoftmaxTopK<double>({.k = 3}));
  same("softmax, renormalised", SoftmaxTopK<double>({.k = 2, .renormalise = true, .norm = 2.0}));
  same("top-k softmax", TopKSoftmax<double>({.k = 3}));
  same("threshold", Threshold<double>({.k = 4, .threshold = 0.0, .renormalise = true}));
  same("top-p", TopP<double>({.threshold = 1.0}));
  same("relu", ReluRouting<double>());
  same("balanced", BalancedAssignment<double>());
  same("sinkhorn", Sinkhorn<double>({.k = 2}));
  same("mixer", SparseMixer<double>({.epsilon = 0.5}));
  for (const ScoresOver over : {ScoresOver::kExperts, ScoresOver::kTokens}) {
    same("expert choice", ExpertChoice<double>({.factor = 2.0, .over = over}));
  }
  const auto biased = [&](const std::string& name, auto all, auto some) {
    Matrix<double>& bias = all.selection_bias().value;
    bias << 0.1, 50.0, -0.2, 0.3, 70.0, 0.0;
    some.selection_bias().value = allowed_columns(bias);
    body(name, all, some);
  };
  for (const ScoreFunction score : {ScoreFunction::kSigmoid, ScoreFunction::kSqrtSoftplus}) {
    const SigmoidTopKConfig config{.k = 3, .scale = 2.5, .score = score};
    biased("sigmoid", SigmoidTopK<double>(6, config), SigmoidTopK<double>(4, config));
  }
  biased("biased softmax", BiasedSoftmaxTopK<double>(6), BiasedSoftmaxTopK<double>(4));
  biased("biased probability", BiasedProbabilityTopK<double>(6), BiasedProbabilityTopK<double>(4));
  same("straight-through", StraightThrough<double>({.k = 3}));
  same("relaxed", RelaxedTopK<double>({.k = 3, .descent = {.epsilon = 0.4}}));
}

/// Whether a routing of all experts is one of those allowed.
template <class All, class Some>
void check_same(const All& all, const Some& some, const Matrix<double>& logits, Pass pass) {
  auto of_some = test::select(some, allowed_columns(logits), pass);
  pass.allowed = kSome;
  auto of_all = test::select(all, logits, pass);
  const Routing<double>& expected = of_some.routing;
  const Routing<double>& routing = of_all.routing;
  CHECK(routing.offsets == expected.offsets);
  REQUIRE(routing.assignments() == expected.assignments());
  for (Index a = 0; a < routing.assignments(); ++a) {
    CHECK(routing.expert[a] == kAllowed[expected.expert[a]]);
    CHECK(routing.weight[a] == Approx(expected.weight[a]).epsilon(1e-12));
  }
  CHECK(test::relative_error(allowed_columns(routing.probabilities), expected.probabilities) <=
        1e-12);
  CHECK(routing.probabilities.col(1).isZero(0.0));
  CHECK(routing.probabilities.col(4).isZero(0.0));

  const auto objective = test::RoutingObjective<double>::random(routing, 7);
  const test::RoutingObjective<double> same{objective.c, allowed_columns(objective.d)};
  const Matrix<double> d_logits = objective.logit_gradient(all, of_all);
  CHECK(test::relative_error(allowed_columns(d_logits), same.logit_gradient(some, of_some)) <=
        1e-11);
  CHECK(d_logits.col(1).isZero(0.0));
  CHECK(d_logits.col(4).isZero(0.0));
}

GluBank<double> bank(const List<Index>& experts) {
  std::vector<Matrix<double>> gate, up, down;
  for (const Index e : experts) {
    const auto seed = static_cast<std::uint64_t>(10 * e);
    gate.push_back(test::random_matrix(3, 4, seed));
    up.push_back(test::random_matrix(3, 4, seed + 1));
    down.push_back(test::random_matrix(4, 3, seed + 2));
  }
  return GluBank<double>(gate, up, down);
}

template <class Action>
std::string config_message(Action&& action) {
  return test::message_of<ConfigError>(action);
}

}  // namespace

TEST_CASE("A forbidden expert is routed to as if it were not there", "[moe][allowed]") {
  for_each_selector([](const std::string& name, const auto& all, const auto& some) {
    INFO(name);
    for (const bool training : {false, true}) {
      if (training && name == "mixer") continue;  // It draws.
      for (const std::uint64_t seed : {1u, 2u, 3u}) {
        check_same(all, some, test::random_matrix(9, kExperts, seed), {.training = training});
      }
      const Mask mask = {1, 1, 0, 1, 0, 1, 1};
      check_same(all, some, test::random_matrix(7, kExperts, 4),
                 {.training = training, .mask = mask});
      check_same(all, some, Matrix<double>::Zero(0, kExperts), {.training = training});
    }
  });
}

TEST_CASE("A forbidden expert has no place in the plan of training", "[moe][allowed]") {
  Pass pass;
  pass.training = true;
  for (const Index k : {1, 2}) {
    const Sinkhorn<double> selector({.k = k});
    check_same(selector, selector, test::random_matrix(16, kExperts, 5), pass);
  }
  const Matrix<double> logits = test::random_matrix(16, kExperts, 6);
  const Matrix<double> expected = Sinkhorn<double>().plan(allowed_columns(logits));
  pass.allowed = kSome;
  const Matrix<double> plan = Sinkhorn<double>().plan(logits, pass);
  CHECK(test::relative_error(allowed_columns(plan), expected) <= 1e-12);
  CHECK(plan.col(1).isZero(0.0));
  CHECK(plan.col(4).isZero(0.0));
}

TEST_CASE("What the router makes of forbidden experts does not matter", "[moe][allowed]") {
  for_each_selector([](const std::string& name, const auto& all, const auto&) {
    INFO(name);
    Pass pass;
    pass.allowed = kSome;
    const Matrix<double> logits = test::random_matrix(5, kExperts, 6);
    const Routing<double> expected = test::route(all, logits, pass);
    for (const double made : {kNan, kInfinity, -kInfinity, 1e300, -1e300}) {
      Matrix<double> other = logits;
      other.col(1).setConstant(made);
      other(2, 4) = made;
      const Routing<double> routing = test::route(all, other, pass);
      CHECK(routing.expert == expected.expert);
      CHECK(routing.weight == expected.weight);
      CHECK(routing.probabilities == expected.probabilities);
    }
    Matrix<double> other = logits;
    other(3, 1) = kNan;
    other(3, 2) = kNan;
    CHECK_THROWS_AS(test::route(all, other, pass), NonFiniteError);
  });
}

TEST_CASE("A forbidden expert does not win where allowed ones lost all to underflow",
          "[moe][allowed]") {
  Matrix<double> logits(1, 4);
  logits << 0.0, 1000.0, 0.0, -1000.0;  // Probabilities 0, 1, 0, 0.
  const Mask allowed = {0, 1, 0, 1};
  Pass pass;
  pass.allowed = allowed;
  const std::vector<Index> expected = {1, 3};
  CHECK(test::route(SoftmaxTopK<double>({.k = 2}), logits, pass).expert == expected);
  CHECK(test::route(SoftmaxTopK<double>({.k = 2, .renormalise = true}), logits, pass).weight ==
        std::vector<double>{1.0, 0.0});
  CHECK(test::route(Threshold<double>({.k = 2, .threshold = 0.0}), logits, pass).expert ==
        expected);
  CHECK(test::route(SigmoidTopK<double>(4), logits, pass).expert == expected);
  CHECK(test::route(BiasedSoftmaxTopK<double>(4), logits, pass).expert == expected);
  CHECK(test::route(BiasedProbabilityTopK<double>(4), logits, pass).expert == expected);
  CHECK(
      test::route(SoftmaxTopK<double>({.k = 2, .groups = {.count = 2, .allowed = 2}}), logits, pass)
          .expert == expected);
}

TEST_CASE("Each token may have experts of its own", "[moe][allowed]") {
  for_each_selector([](const std::string& name, const auto& all, const auto&) {
    INFO(name);
    if (name == "expert choice") return;  // Its tokens contend.
    const Matrix<double> logits = test::random_matrix(5, kExperts, 9);
    const Mask rows[] = {kSome, {0, 1, 1, 1, 1, 0}, {1, 1, 1, 1, 1, 1}, {1, 1, 0, 0, 1, 1}, kSome};
    Mask allowed;
    for (const Mask& row : rows) allowed.insert(allowed.end(), row.begin(), row.end());
    Pass pass;
    pass.allowed = allowed;
    const Routing<double> routing = test::route(all, logits, pass);
    for (Index t = 0; t < 5; ++t) {
      Pass one;
      one.allowed = rows[t];
      const Routing<double> alone = test::route(all, logits.row(t), one);
      REQUIRE(routing.last(t) - routing.first(t) == alone.assignments());
      for (Index i = 0; i < alone.assignments(); ++i) {
        const Index a = routing.first(t) + i;
        CHECK(rows[t][static_cast<std::size_t>(routing.expert[a])] == 1);
        CHECK(routing.expert[a] == alone.expert[i]);
        CHECK(routing.weight[a] == alone.weight[i]);
      }
      CHECK(routing.probabilities.row(t) == alone.probabilities.row(0));
    }
    const test::Threads threads(3);
    CHECK(test::route(all, logits, pass).weight == routing.weight);
  });
}

TEST_CASE("Expert choice takes no token that is forbidden to it", "[moe][allowed]") {
  const Mask allowed = {1, 0, 1, 1, 0, 1, 1, 1};
  Pass pass;
  pass.allowed = allowed;
  for (const ScoresOver over : {ScoresOver::kExperts, ScoresOver::kTokens}) {
    const ExpertChoice<double> all({.factor = 8.0, .over = over});
    const Routing<double> routing = test::route(all, test::random_matrix(4, 2, 1), pass);
    CHECK(routing.offsets == std::vector<Index>{0, 1, 3, 4, 6});
    CHECK(routing.expert[0] == 0);
    CHECK(routing.expert[3] == 1);
  }
}

TEST_CASE("A layer with forbidden experts is the layer without their rows", "[moe][allowed]") {
  const Matrix<double> weight = test::random_matrix(kExperts, 4, 1);
  const auto check = [&](const auto& all_selector, const auto& some_selector) {
    MoELayer all(LinearRouter<double>(weight), all_selector, Dropless(), bank({0, 1, 2, 3, 4, 5}),
                 SwitchLoss<double>({.coefficient = 0.2}), ZLoss<double>({.coefficient = 0.1}),
                 EntropyLoss<double>({.token = 0.3, .mean = -0.2}));
    MoELayer some(LinearRouter<double>(allowed_columns(weight.transpose()).transpose()),
                  some_selector, Dropless(), bank(kAllowed),
                  SwitchLoss<double>({.coefficient = 0.2}), ZLoss<double>({.coefficient = 0.1}),
                  EntropyLoss<double>({.token = 0.3, .mean = -0.2}));
    const Matrix<double> x = test::random_matrix(8, 4, 2);
    const Matrix<double> dy = test::random_matrix(8, 4, 3);
    typename decltype(all)::Cache cache;
    typename decltype(some)::Cache expected;
    PassRecord record;
    PassRecord expected_record;
    const Pass pass{.training = true, .allowed = kSome, .record = &record};
    const Pass unrestricted{.training = true, .record = &expected_record};
    CHECK(test::relative_error(all.forward(x, pass, cache),
                               some.forward(x, unrestricted, expected)) <= 1e-12);
    CHECK(record.aux_loss() == Approx(expected_record.aux_loss()).epsilon(1e-12));
    CHECK(test::relative_error(all.backward(dy, cache), some.backward(dy, expected)) <= 1e-11);
    const auto of_all = parameters(all);
    const auto of_some = parameters(some);
    const Matrix<double> d_router = of_all[0].parameter->gradient();
    CHECK(test::relative_error(allowed_columns(d_router.transpose()),
                               of_some[0].parameter->gradient().transpose()) <= 1e-11);
    CHECK(d_router.row(1).isZero(0.0));
    CHECK(d_router.row(4).isZero(0.0));
    for (std::size_t i = 0; i < of_all.size() - 1; ++i) {
      const auto& d = of_all[i + 1].parameter->gradient();
      const std::string& name = of_all[i + 1].name;
      INFO(name);
      const bool forbidden =
          name.find(".1.") != std::string::npos || name.find(".4.") != std::string::npos;
      if (forbidden) CHECK(d.isZero(0.0));
    }
  };
  check(SoftmaxTopK<double>({.k = 2}), SoftmaxTopK<double>({.k = 2}));
  check(TopKSoftmax<double>({.k = 3}), TopKSoftmax<double>({.k = 3}));
  check(SigmoidTopK<double>(6), SigmoidTopK<double>(4));
}

TEST_CASE("A layer whose tokens have experts of their own has its exact gradient",
          "[moe][allowed]") {
  Mask allowed;
  for (Index t = 0; t < 5; ++t) {
    for (Index e = 0; e < kExperts; ++e) {
      allowed.push_back(static_cast<std::uint8_t>((e + t) % 3 != 0));
    }
  }
  Pass pass;
  pass.allowed = allowed;
  MoELayer layer(LinearRouter<double>(5.0 * test::random_matrix(kExperts, 4, 4)),
                 SoftmaxTopK<double>({.k = 2, .renormalise = true}), Dropless(),
                 bank({0, 1, 2, 3, 4, 5}), SwitchLoss<double>({.coefficient = 0.2}),
                 ZLoss<double>({.coefficient = 0.1}), ImportanceLoss<double>({.coefficient = 0.2}));
  test::check_gradients(layer, test::random_matrix(5, 4, 5), pass);
}

TEST_CASE("The load loss of a noisy router leaves forbidden experts out", "[moe][allowed]") {
  MoELayer layer(
      NoisyRouter<double>(test::random_matrix(kExperts, 4, 7), test::random_matrix(kExperts, 4, 8)),
      TopKSoftmax<double>({.k = 2}), Dropless(), bank({0, 1, 2, 3, 4, 5}), LoadLoss<double>());
  Rng draws(2);
  Pass pass;
  PassRecord record;
  pass.training = true;
  pass.rng = &draws;
  pass.allowed = kSome;
  pass.record = &record;
  typename decltype(layer)::Cache cache;
  const Matrix<double> x = test::random_matrix(8, 4, 6);
  layer.forward(x, pass, cache);
  REQUIRE(record.losses().size() == 1);
  CHECK(std::isfinite(record.aux_loss()));
  LoadLoss<double>::Cache of_load;
  LoadLoss<double>().forward(cache.routing, of_load);
  const RowVector<double>& load = of_load.load;
  CHECK(load[1] == 0.0);
  CHECK(load[4] == 0.0);
  CHECK(layer.backward(x, cache).allFinite());
  for (const auto& [name, parameter] : parameters(layer)) {
    INFO(name);
    CHECK(parameter->gradient().allFinite());
    if (name.find("router") != std::string::npos && parameter->value.rows() == kExperts) {
      CHECK(parameter->gradient().row(1).isZero(0.0));
    }
  }
}

TEST_CASE("Mixture of depths hands the experts of the chosen tokens on", "[moe][allowed]") {
  MoELayer inner(LinearRouter<double>(test::random_matrix(2, 4, 1)), SoftmaxTopK<double>({.k = 1}),
                 Dropless(), bank({0, 1}));
  Matrix<double> weight(1, 4);
  weight << 1.0, 0.0, 0.0, 0.0;
  MixtureOfDepths layer(inner, weight, {.capacity = 0.5});
  Matrix<double> x = test::random_matrix(4, 4, 2);
  x.col(0) << -1.0, 3.0, -2.0, 2.0;  // Tokens 1 and 3.
  typename decltype(layer)::Cache cache;
  Pass pass;
  const Mask each = {1, 1, 0, 1, 1, 1, 1, 0};
  pass.allowed = each;
  layer.forward(x, pass, cache);
  CHECK(cache.inner.routing.expert == std::vector<Index>{1, 0});
  const Mask one = {0, 1};
  pass.allowed = one;
  layer.forward(x, pass, cache);
  CHECK(cache.inner.routing.expert == std::vector<Index>{1, 1});
}

TEST_CASE("Forbidding too much is an error that names the token", "[moe][allowed]") {
  const Matrix<double> logits = test::random_matrix(3, 4, 1);
  const auto message = [&](const auto& selector, const Mask& allowed, const Mask& mask = {}) {
    Pass pass;
    pass.allowed = allowed;
    pass.mask = mask;
    return config_message([&] { test::route(selector, logits, pass); });
  };
  const Mask last = {1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0};
  CHECK(message(SoftmaxTopK<double>({.k = 2}), last) ==
        "SoftmaxTopK: token 2 is allowed 1 of 4 experts, expected at least k = 2");
  CHECK(message(SoftmaxTopK<double>({.k = 1}), last) == "no exception");
  CHECK(message(TopP<double>({.threshold = 0.9}), last) == "no exception");
  CHECK(message(SoftmaxTopK<double>({.k = 2}), last, {1, 1, 0}) == "no exception");
  CHECK(message(TopKSoftmax<double>({.k = 2}), {0, 0, 1, 0}) ==
        "TopKSoftmax: token 0 is allowed 1 of 4 experts, expected at least k = 2");
  CHECK(message(SigmoidTopK<double>(4, {.k = 3}), last) ==
        "SigmoidTopK: token 1 is allowed 2 of 4 experts, expected at least k = 3");
  CHECK(message(BiasedSoftmaxTopK<double>(4), last) ==
        "BiasedSoftmaxTopK: token 2 is allowed 1 of 4 experts, expected at least k = 2");
  CHECK(message(BiasedProbabilityTopK<double>(4), last) ==
        "BiasedProbabilityTopK: token 2 is allowed 1 of 4 experts, expected at least k = 2");
  CHECK(message(Threshold<double>({.k = 2}), last) ==
        "Threshold: token 2 is allowed 1 of 4 experts, expected at least k = 2");
  CHECK(message(Sinkhorn<double>({.k = 2}), last) ==
        "Sinkhorn: token 2 is allowed 1 of 4 experts, expected at least k = 2");
  CHECK(message(SparseMixer<double>(), last) ==
        "SparseMixer: token 2 is allowed 1 of 4 experts, expected at least k = 2");
  CHECK(message(TopP<double>(), last) == "no exception");
  CHECK(message(TopP<double>(), {0, 0, 0, 0}) ==
        "TopP: token 0 is allowed 0 of 4 experts, expected at least 1");
  CHECK(message(ReluRouting<double>(), {0, 0, 0, 0}) ==
        "ReluRouting: token 0 is allowed 0 of 4 experts, expected at least 1");

  // One group, of which one expert is left.
  Matrix<double> decided(1, 4);
  decided << 5.0, 4.0, 1.0, 0.0;
  Pass pass;
  const Mask allowed = {1, 0, 1, 1};
  pass.allowed = allowed;
  const GroupLimit groups{.count = 2, .allowed = 1};
  CHECK(config_message([&] {
          test::route(SoftmaxTopK<double>({.k = 2, .groups = groups}), decided, pass);
        }) == "SoftmaxTopK: token 0 is allowed 1 experts in its groups, expected at least k = 2");
  CHECK(config_message([&] {
          test::route(TopKSoftmax<double>({.k = 2, .groups = groups}), decided, pass);
        }) == "TopKSoftmax: token 0 is allowed 1 experts in its groups, expected at least k = 2");
  CHECK(config_message([&] {
          test::route(SigmoidTopK<double>(4, {.k = 2, .groups = groups}), decided, pass);
        }) == "SigmoidTopK: token 0 is allowed 1 experts in its groups, expected at least k = 2");
  // The sum of two looks for a group that has them.
  const GroupLimit summed{.count = 2, .allowed = 1, .summed = 2};
  CHECK(test::route(SoftmaxTopK<double>({.k = 2, .groups = summed}), decided, pass).expert ==
        std::vector<Index>{2, 3});
}

TEST_CASE("A mask that does not fit is an error", "[moe][allowed]") {
  Pass pass;
  const Mask five = {1, 1, 1, 1, 1};
  pass.allowed = five;
  CHECK(test::message_of<ShapeError>([&] {
          test::route(SoftmaxTopK<double>({.k = 1}), test::random_matrix(3, 4, 1), pass);
        }) ==
        "SoftmaxTopK: pass.allowed has 5 entries, expected 4 (one per expert) or 12 (for each "
        "token)");
  CHECK(test::message_of<NonFiniteError>([&] {
          Matrix<double> logits = Matrix<double>::Zero(2, 5);
          logits(1, 3) = -kInfinity;
          test::route(SoftmaxTopK<double>({.k = 1}), logits, pass);
        }) == "SoftmaxTopK: logits[1, 3] = -inf, expected a finite number");
}

TEST_CASE("Layers that cannot tell experts from tokens refuse a mask", "[moe][allowed]") {
  Pass pass;
  pass.allowed = kSome;
  Rng rng(1);
  MixtureOfDepths depths(Linear<double>(4, 4, rng), 4, rng);
  typename decltype(depths)::Cache cache;
  const Matrix<double> x = test::random_matrix(3, 4, 1);
  CHECK(config_message([&] { depths.forward(x, pass, cache); }) ==
        "MixtureOfDepths::forward: pass.allowed is set, expected none around a layer without "
        "experts()");
  SoftMoE<GluBank<double>> soft(bank({0, 1}), rng);
  typename decltype(soft)::Cache soft_cache;
  CHECK(config_message([&] { soft.forward(x, pass, soft_cache); }) ==
        "SoftMoE::forward: pass.allowed is set, expected none: slots mix tokens");
}

}  // namespace weir::allowed_experts_test
