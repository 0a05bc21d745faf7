// SPDX-License-Identifier: MIT
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/verbs.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/tuning/training_parts.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::training_parts_test {

namespace {

auto mixture() {
  Rng rng(3);
  return MoELayer(LinearRouter<double>(4, 5, rng, {.init_scale = 4.0}),
                  TopKSoftmax<double>({.k = 2}), Dropless(), GluBank<double>(4, 5, 3, rng));
}

std::vector<std::string> trained(auto& layer) {
  std::vector<std::string> names;
  for (const auto& [name, parameter] : parameters(layer)) {
    if (!parameter->frozen) names.push_back(name);
  }
  return names;
}

}  // namespace

TEST_CASE("Relevance is averaged over samples, whatever their lengths", "[tuning][golden]") {
  // Two samples of 2 and 4 tokens, each token with 2 experts.
  LayerReport a;
  a.tokens = 2;
  a.assignments = 4;
  a.load = {2, 2, 0};
  a.weight = {1.5, 0.5, 0.0};
  LayerReport b;
  b.tokens = 4;
  b.assignments = 8;
  b.load = {1, 3, 4};
  b.weight = {0.4, 1.6, 2.0};
  ExpertRelevance relevance;
  relevance.add(a);
  relevance.add(b);
  relevance.add(LayerReport{});
  // 1/2 (2/4 + 1/8) and so on; 1/2 (1.5/2 + 0.4/4) and so on.
  CHECK(relevance.token_ratios() == std::vector<double>{0.3125, 0.4375, 0.25});
  const std::vector<double> scores = relevance.gate_scores();
  CHECK(scores[0] == Approx(0.425));
  CHECK(scores[1] == Approx(0.325));
  CHECK(scores[2] == Approx(0.25));
  b.load.pop_back();
  CHECK(test::message_of<ShapeError>([&] { relevance.add(b); }) ==
        "ExpertRelevance::add: the report has 3 weights, expected 2 (one per expert)");
  b.weight.pop_back();
  CHECK(test::message_of<ShapeError>([&] { relevance.add(b); }) ==
        "ExpertRelevance::add: the report has 2 experts, expected 3 as those before");
  CHECK(ExpertRelevance().gate_scores().empty());
}

TEST_CASE("The fewest experts that make up the share are chosen", "[tuning]") {
  const std::vector<double> relevance = {0.1, 0.4, 0.1, 0.3, 0.1};
  CHECK(relevant_experts(relevance, 0.3) == std::vector<Index>{1});
  CHECK(relevant_experts(relevance, 0.4) == std::vector<Index>{1});
  CHECK(relevant_experts(relevance, 0.41) == std::vector<Index>{1, 3});
  CHECK(relevant_experts(relevance, 0.75) == std::vector<Index>{0, 1, 3});
  CHECK(relevant_experts(relevance, 1.0) == std::vector<Index>{0, 1, 2, 3, 4});
  const std::vector<double> unused = {1.0, 0.0};
  CHECK(relevant_experts(unused, 1.0) == std::vector<Index>{0});
  const auto message = [](const std::vector<double>& r, double share) {
    return test::message_of<ConfigError>([&] { relevant_experts(r, share); });
  };
  CHECK(message(relevance, 0.0) == "relevant_experts: share = 0, expected 0 < share <= 1");
  CHECK(message({0.0, 0.0}, 0.5) ==
        "relevant_experts: the sum of relevance = 0, expected a finite number > 0");
  CHECK(message({0.5, -0.1}, 0.5) ==
        "relevant_experts: relevance = -0.1, expected a finite number >= 0");
}

TEST_CASE("Only the chosen experts are trained", "[tuning]") {
  auto layer = mixture();
  const std::vector<Index> experts = {1, 4};
  CHECK(train_only(layer, expert_patterns("experts", experts)) == 6);
  CHECK(trained(layer) == std::vector<std::string>{"experts.1.gate", "experts.1.up",
                                                   "experts.1.down", "experts.4.gate",
                                                   "experts.4.up", "experts.4.down"});
  auto before = layer;
  AdamW<double> optimizer;
  decltype(layer)::Cache cache;
  const Matrix<double> x = test::random_matrix<double>(20, 4, 1);
  layer.backward(layer.forward(x, kTraining, cache), cache);
  optimizer.step(layer);
  const auto then = parameters(before);
  const auto now = parameters(layer);
  for (std::size_t i = 0; i < now.size(); ++i) {
    INFO(now[i].name);
    CHECK((now[i].parameter->value == then[i].parameter->value) == now[i].parameter->frozen);
  }
  CHECK(test::message_of<ConfigError>([&] {
          train_only(layer, {"*", "experts.7.*"});
        }) == "train_only: no parameter matches 'experts.7.*', expected at least one");
  CHECK(trained(layer).size() == 6);
}

TEST_CASE("Frozen weights get no gradient, and all others have the bits they had", "[tuning]") {
  const auto check = [](auto layer, Index d_in) {
    auto frozen = layer;
    const Index all = static_cast<Index>(linear_weights(frozen).size());
    for (const auto& [name, weight] : linear_weights(frozen)) weight->frozen = true;
    CHECK(all > 0);
    const Matrix<double> x = test::random_matrix<double>(20, d_in, 1);
    typename decltype(layer)::Cache cache;
    const Matrix<double> dy = layer.forward(x, kTraining, cache);
    const Matrix<double> dx = layer.backward(dy, cache);
    frozen.forward(x, kTraining, cache);
    CHECK(frozen.backward(dy, cache) == dx);
    const auto trained = parameters(layer);
    const auto now = parameters(frozen);
    for (std::size_t i = 0; i < now.size(); ++i) {
      INFO(now[i].name);
      if (now[i].parameter->frozen) {
        CHECK(now[i].parameter->grad.size() == 0);
      } else {
        CHECK(now[i].parameter->grad == trained[i].parameter->grad);
      }
    }
  };
  Rng rng(1);
  SECTION("a mixture with biases") {
    check(MoELayer(LinearRouter<double>(4, 5, rng, {.bias = true}), TopKSoftmax<double>({.k = 2}),
                   Dropless(), MlpBank<double, Silu>(4, 5, 3, rng, {.bias = true})),
          4);
  }
  SECTION("a mixture") {
    check(mixture(), 4);
  }
  SECTION("Glu") {
    check(Glu<double>(4, 6, rng), 4);
  }
  SECTION("Mlp") {
    check(Mlp<double, Silu>(4, 6, rng, {.bias = true}), 4);
  }
  SECTION("attention") {
    check(GroupedQueryAttention<double>(
              rng, {.d_model = 8, .heads = 2, .kv_heads = 1, .qkv_bias = true}),
          8);
  }
}

TEST_CASE("More and more of a model is trained", "[tuning]") {
  auto layer = mixture();
  const UnfreezeSchedule schedule({{"router.*", 0}, {"experts.0.*", 10}, {"*", 20}});
  CHECK(schedule.apply(layer, 0) == 1);
  CHECK(trained(layer) == std::vector<std::string>{"router.weight"});
  CHECK(schedule.apply(layer, 9) == 1);
  CHECK(schedule.apply(layer, 10) == 4);
  CHECK(schedule.apply(layer, 20) == 16);
  CHECK(schedule.apply(layer, 3) == 1);  // A function of the step alone.
  CHECK(test::message_of<ConfigError>([&] {
          UnfreezeSchedule({{"x", 0}}).apply(layer, 0);
        }) == "UnfreezeSchedule: no parameter matches 'x', expected at least one");
  CHECK(test::message_of<ConfigError>([] { UnfreezeSchedule({}); }) ==
        "UnfreezeSchedule: stages = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([] {
          UnfreezeSchedule({{"*", -1}});
        }) == "UnfreezeSchedule: step = -1, expected >= 0");
}

TEST_CASE("Parameters are pulled towards the base by the gradient of the loss", "[tuning]") {
  auto base = mixture();
  auto layer = base;
  for (auto& [name, parameter] : parameters(layer)) {
    parameter->value.array() += 0.1;
    parameter->gradient();
  }
  const TowardsBase<double> pull(base, "experts.*", 0.5);
  const double loss = pull.add_gradient(layer, 2.0);
  CHECK(loss == Approx(0.5 * 2.0 * 0.5 * 0.01 * 15 * 12));
  for (auto& [name, parameter] : parameters(layer)) {
    const Matrix<double> gradient = parameter->grad;
    zero_gradients(layer);
    const Matrix<double> numeric = test::numeric_gradient(parameter->value, [&] {
      auto copy = layer;
      return pull.add_gradient(copy, 2.0);
    });
    CHECK(test::relative_error(gradient, numeric) < 1e-7);
    pull.add_gradient(layer, 2.0);
  }
  // Frozen parameters, and those that no backward pass has reached, are left alone.
  zero_gradients(layer);
  freeze(layer, "experts.0.*");
  pull.add_gradient(layer);
  for (const auto& [name, parameter] : parameters(layer)) {
    CHECK((parameter->grad.norm() > 0.0) ==
          (matches_pattern("experts.*", name) && !parameter->frozen));
  }
  auto fresh = base;
  pull.add_gradient(fresh);
  for (const auto& [name, parameter] : parameters(fresh)) CHECK(parameter->grad.size() == 0);

  CHECK(test::message_of<ConfigError>([&] { TowardsBase<double>(base, "x", 1.0); }) ==
        "TowardsBase: no parameter matches 'x', expected at least one");
  CHECK(test::message_of<ConfigError>([&] { TowardsBase<double>(base, "*", -1.0); }) ==
        "TowardsBase: strength = -1, expected a finite number >= 0");
  Rng rng(1);
  GluBank<double> other(4, 5, 3, rng);
  CHECK(test::message_of<ConfigError>([&] { pull.add_gradient(other); }) ==
        "TowardsBase: the model has no parameter experts.0.gate, expected those of the base");
}

}  // namespace weir::training_parts_test
