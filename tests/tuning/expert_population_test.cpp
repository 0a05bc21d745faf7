// SPDX-License-Identifier: MIT
#include <cstdint>
#include <string>
#include <vector>

#include <weir/core/verbs.hpp>
#include <weir/io/checkpoint.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/tuning/active_experts.hpp>
#include <weir/tuning/expert_population.hpp>
#include <weir/tuning/surgery.hpp>

#include "io/folder.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::expert_population_test {

namespace {

auto mixture(Index experts) {
  Rng rng(3);
  return MoELayer(LinearRouter<float>(6, experts, rng, {.init_scale = 4.0}),
                  SigmoidTopK<float>(experts, {.k = 2}), Dropless(),
                  GluBank<float>(6, experts, 5, rng), BiasBalance<float>());
}
using Moe = decltype(mixture(1));

Matrix<float> batch(Index step) {
  return test::random_matrix<float>(30, 6, 100 + static_cast<std::uint64_t>(step));
}

/// A training whose mixture gains and loses experts at steps 4 and 8, with k annealed.
struct Run {
  Moe layer = mixture(6);
  AdamW<float> optimizer;
  Rng rng = Rng(9);
  Index changes = 0;

  void go(Index first, Index last) {
    Moe::Cache cache;
    const AnnealedExperts k = {.first = 4, .last = 2, .steps = 8};
    for (Index step = first; step < last; ++step) {
      set_active_experts(layer, "*", k(step));
      if (step % 4 == 0 && step > 0) {
        ExpertSurgery surgery(layer, batch(step), optimizer, "");
        const PopulationPlan plan = plan_population(
            surgery.use(), {.overloaded = 1.01, .starved = 0.9, .least = 4, .most = 8});
        change_population(surgery, plan, rng);
        changes += plan.changes() ? 1 : 0;
      }
      const Matrix<float>& y = layer.forward(batch(step), kTraining, cache);
      layer.backward(y, cache);
      optimizer.step(layer);
    }
  }
};

}  // namespace

TEST_CASE("The starved are retired and the overloaded split, within bounds", "[tuning]") {
  const std::vector<double> use = {10, 0, 50, 1, 29, 0.5};  // The mean is 15.08.
  const auto plan = plan_population(use);
  CHECK(plan.retired == std::vector<Index>{1, 3, 5});
  CHECK(plan.split == std::vector<Index>{2});
  CHECK(plan_population(use, {.overloaded = 1.5}).split == std::vector<Index>{2, 4});
  CHECK(plan_population(use, {.least = 4}).retired == std::vector<Index>{1, 5});
  CHECK(plan_population(use, {.least = 6, .most = 6}).changes() == false);
  CHECK(plan_population(use, {.overloaded = 1.5, .least = 3, .most = 4}).split ==
        std::vector<Index>{2});
  const std::vector<double> none = {0, 0};
  CHECK_FALSE(plan_population(none).changes());
  const auto message = [](const std::vector<double>& u, const PopulationConfig& config) {
    return test::message_of<ConfigError>([&] { plan_population(u, config); });
  };
  CHECK(message({}, {}) == "plan_population: experts = 0, expected >= 1");
  CHECK(message({1, 2}, {.overloaded = 0.5}) ==
        "plan_population: overloaded = 0.5, expected a "
        "finite number >= 1");
  CHECK(message({1, 2}, {.least = 4, .most = 3}) == "plan_population: most = 3, expected >= 4");
  CHECK(message({1, 2}, {.least = 0}) == "plan_population: least = 0, expected >= 1");
  CHECK(message({1, 2}, {.starved = 1.5}) ==
        "plan_population: starved = 1.5, expected 0 <= starved <= 1");
  CHECK(message({1, -2}, {}) == "plan_population: use = -2, expected a finite number >= 0");
}

TEST_CASE("A plan is carried out, and the change is that of all of it", "[tuning]") {
  Run run;
  ExpertSurgery surgery(run.layer, batch(0));
  const Matrix<float> y = infer(run.layer, batch(0));
  const OutputChange change =
      change_population(surgery, {.split = {2}, .retired = {0, 5}}, run.rng);
  CHECK(surgery.experts() == 5);
  CHECK(change.relative ==
        Approx(test::relative_error(infer(run.layer, batch(0)), y)).epsilon(1e-4));
}

TEST_CASE("A run whose experts come and go is resumed to the bit", "[tuning]") {
  Run whole;
  whole.go(0, 12);
  CHECK(whole.changes == 2);

  for (const Index stop : {Index{4}, Index{6}, Index{9}}) {
    Run first;
    first.go(0, stop);
    const test::Folder folder;
    io::save(folder.path(), first.layer, first.optimizer,
             {.rng = first.rng, .position = stop, .notes = {}});
    Run second;
    second.layer = mixture(first.layer.experts());
    const auto state = io::load(folder.path(), second.layer, second.optimizer);
    second.rng = state.rng;
    second.go(stop, 12);
    const auto expected = parameters(whole.layer);
    const auto resumed = parameters(second.layer);
    REQUIRE(resumed.size() == expected.size());
    for (std::size_t i = 0; i < resumed.size(); ++i) {
      INFO(resumed[i].name << ", stopped before step " << stop);
      CHECK(resumed[i].parameter->value == expected[i].parameter->value);
    }
    CHECK(second.layer.selector().selection_bias().value ==
          whole.layer.selector().selection_bias().value);
  }
}

}  // namespace weir::expert_population_test
