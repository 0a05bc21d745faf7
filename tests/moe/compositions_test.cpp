// SPDX-License-Identifier: MIT
// Compositions as compositions: every kind of stage together with every other. What travels between
// them (noise, losses, the pass, updates, saved state) must not get lost on the way.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/entropy_loss.hpp>
#include <weir/moe/balance/global_batch_loss.hpp>
#include <weir/moe/balance/hierarchical_load_loss.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/load_loss.hpp>
#include <weir/moe/balance/orthogonality_loss.hpp>
#include <weir/moe/balance/quantile_balance.hpp>
#include <weir/moe/balance/relu_l1_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/adaptive_capacity.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/experts/any_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/input_weighted.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/experts/output_masking.hpp>
#include <weir/moe/experts/pass_dropped.hpp>
#include <weir/moe/experts/with_zero_experts.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/cosine_router.hpp>
#include <weir/moe/router/d_select_k_router.hpp>
#include <weir/moe/router/gumbel_router.hpp>
#include <weir/moe/router/hierarchical_router.hpp>
#include <weir/moe/router/input_dropout_router.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/layer_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/router/temperature_router.hpp>
#include <weir/moe/selector/around/rank_policy.hpp>
#include <weir/moe/selector/around/replay.hpp>
#include <weir/moe/selector/around/sampled_choice.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/relu_routing.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/threshold.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/moe/selector/top_p.hpp>
#include <weir/nn/linear.hpp>
#include <weir/optim/adamw.hpp>

#include "support/any_stage.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/same_draws.hpp"

using namespace weir;

namespace {

constexpr Index kModel = 3;
constexpr Index kExperts = 4;
constexpr Index kTokens = 6;

template <class Stage>
struct Named {
  std::string name;
  std::function<Stage(Rng&)> make;
};

/// Weights large enough that a finite difference does not change a choice.
LinearRouter<double> linear(Rng& rng, Index experts = kExperts) {
  return LinearRouter<double>(kModel, experts, rng, {.init_scale = 8.0});
}

NoisyRouter<double> noisy(Rng& rng, Index experts = kExperts) {
  return {normal_init<double>(experts, kModel, 2.0, rng),
          normal_init<double>(experts, kModel, 0.5, rng),
          {.min_std = 0.3}};
}

std::vector<Named<test::AnyRouter>> routers() {
  using R = test::AnyRouter;
  return {
      {"linear", [](Rng& r) -> R { return linear(r); }},
      {"noisy", [](Rng& r) -> R { return noisy(r); }},
      {"cosine",
       [](Rng& r) -> R {
         return CosineRouter<double>(kModel, kExperts, r, {.d_projection = 3, .temperature = 0.1});
       }},
      {"layer(linear)",
       [](Rng& r) -> R {
         return LayerRouter(Linear<double>(kModel, kExperts, r, {.init_scale = 8.0}), kModel,
                            kExperts);
       }},
      {"gumbel(linear)", [](Rng& r) -> R { return GumbelRouter(linear(r)); }},
      {"jitter(linear)", [](Rng& r) -> R { return JitterRouter(linear(r), {.epsilon = 0.1}); }},
      {"dropout(linear)", [](Rng& r) -> R { return InputDropoutRouter(linear(r)); }},
      {"temperature(linear)",
       [](Rng& r) -> R {
         return TemperatureRouter(linear(r), {.start = 2.0, .end = 0.5, .steps = 4});
       }},
      {"gumbel(noisy)", [](Rng& r) -> R { return GumbelRouter(noisy(r)); }},
      {"layer(noisy)", [](Rng& r) -> R { return LayerRouter(noisy(r), kModel, kExperts); }},
      {"jitter(gumbel(noisy))",
       [](Rng& r) -> R { return JitterRouter(GumbelRouter(noisy(r)), {.epsilon = 0.1}); }},
      {"temperature(layer(noisy))",
       [](Rng& r) -> R {
         return TemperatureRouter(LayerRouter(noisy(r), kModel, kExperts), {.start = 1.5});
       }},
      {"d_select_k",
       [](Rng& r) -> R {
         return DSelectKRouter<double>(kModel, kExperts, r, {.k = 2, .entropy = 0.1});
       }},
      {"hierarchical(linear, linear)",
       [](Rng& r) -> R { return HierarchicalRouter(linear(r, 2), linear(r)); }},
      {"hierarchical(noisy, noisy)",
       [](Rng& r) -> R { return HierarchicalRouter(noisy(r, 2), noisy(r)); }},
      {"hierarchical(linear, d_select_k)",
       [](Rng& r) -> R {
         return HierarchicalRouter(
             linear(r, 2), DSelectKRouter<double>(kModel, kExperts, r, {.k = 2, .entropy = 0.1}));
       }},
      {"jitter(hierarchical(noisy, linear))",
       [](Rng& r) -> R {
         return JitterRouter(HierarchicalRouter(noisy(r, 2), linear(r)), {.epsilon = 0.1});
       }},
  };
}

template <class S>
S with_bias(S selector, Rng& rng) {
  selector.selection_bias().value = normal_init<double>(1, kExperts, 0.2, rng);
  return selector;
}

std::vector<Named<test::AnySelector>> selectors() {
  using S = test::AnySelector;
  const auto sigmoid = [](Rng& r) {
    return with_bias(SigmoidTopK<double>(kExperts, {.k = 2, .scale = 1.5}), r);
  };
  return {
      {"top_k_softmax", [](Rng&) -> S { return TopKSoftmax<double>({.k = 2}); }},
      {"softmax_top_k", [](Rng&) -> S { return SoftmaxTopK<double>({.k = 2}); }},
      {"softmax_top_k renormalised",
       [](Rng&) -> S {
         return SoftmaxTopK<double>({.k = 3, .renormalise = true, .scale = 2.0, .norm = 2.0});
       }},
      {"sigmoid_top_k", [=](Rng& r) -> S { return sigmoid(r); }},
      {"biased_softmax_top_k",
       [](Rng& r) -> S { return with_bias(BiasedSoftmaxTopK<double>(kExperts, {.k = 2}), r); }},
      {"threshold", [](Rng&) -> S { return Threshold<double>({.k = 3, .threshold = 0.1}); }},
      {"top_p", [](Rng&) -> S { return TopP<double>({.threshold = 0.7}); }},
      {"relu", [](Rng&) -> S { return ReluRouting<double>(); }},
      {"rank_policy(top_k_softmax)",
       [](Rng&) -> S { return RankPolicy(TopKSoftmax<double>({.k = 3})); }},
      {"replay(softmax_top_k)", [](Rng&) -> S { return Replay(SoftmaxTopK<double>({.k = 2})); }},
      {"sampled(top_k_softmax)",
       [](Rng&) -> S { return SampledChoice(TopKSoftmax<double>({.k = 2}), {.certain = 1}); }},
      {"rank_policy(replay(sigmoid_top_k))",
       [=](Rng& r) -> S { return RankPolicy(Replay(sigmoid(r))); }},
      {"rank_policy(sampled(biased))",
       [](Rng& r) -> S {
         return RankPolicy(
             SampledChoice(with_bias(BiasedSoftmaxTopK<double>(kExperts, {.k = 2}), r)));
       }},
  };
}

std::vector<Named<test::AnyCapacity>> capacities() {
  using C = test::AnyCapacity;
  return {
      {"dropless", [](Rng&) -> C { return Dropless(); }},
      {"capacity_factor",
       [](Rng&) -> C {
         return CapacityFactor({.train = 0.7, .minimum = 1, .scope = Scope::kSequence});
       }},
      {"fixed", [](Rng&) -> C { return FixedCapacity({.capacity = 2}); }},
      {"renormalise(fixed)",
       [](Rng&) -> C { return RenormaliseKept(FixedCapacity({.capacity = 2}), {.scale = 1.5}); }},
      {"renormalise(factor)",
       [](Rng&) -> C {
         return RenormaliseKept(
             CapacityFactor({.train = 0.6, .minimum = 1, .order = DropOrder::kProbability}));
       }},
      {"adaptive",
       [](Rng&) -> C {
         return AdaptiveCapacity<double>({.initial = 1.0, .least = 0.5, .minimum = 0});
       }},
  };
}

GluBank<double> glu(Rng& rng, Index experts = kExperts) {
  return GluBank<double>(kModel, experts, 2, rng);
}

/// Experts that are mixtures themselves, with noise, a capacity, losses and a rule of their own.
auto mixtures(Rng& rng) {
  const auto one = [&] {
    return MoELayer(GumbelRouter(LinearRouter<double>(kModel, 2, rng, {.init_scale = 8.0})),
                    SigmoidTopK<double>(2, {.k = 1}), CapacityFactor({.train = 1.0, .minimum = 1}),
                    MlpBank<double, Silu>(kModel, 2, 2, rng),
                    SwitchLoss<double>({.coefficient = 0.3}), BiasBalance<double>({.rate = 0.1}));
  };
  std::vector<decltype(one())> experts;
  for (Index e = 0; e < kExperts; ++e) experts.push_back(one());
  return AnyBank(std::move(experts), kModel, kModel);
}

std::vector<Named<test::AnyExperts>> banks() {
  using B = test::AnyExperts;
  return {
      {"glu", [](Rng& r) -> B { return glu(r); }},
      {"mlp with biases",
       [](Rng& r) -> B { return MlpBank<double, Silu>(kModel, kExperts, 2, r, {.bias = true}); }},
      {"input_weighted(glu)", [](Rng& r) -> B { return InputWeighted(glu(r)); }},
      {"pass_dropped(glu)", [](Rng& r) -> B { return PassDropped(glu(r)); }},
      {"masked(glu)", [](Rng& r) -> B { return OutputMasking(glu(r), {.rate = 0.3}); }},
      {"with_zero(glu)",
       [](Rng& r) -> B {
         return WithZeroExperts(glu(r, 1), r, {.zero = 1, .identity = 1, .constant = 1});
       }},
      {"mixtures", [](Rng& r) -> B { return mixtures(r); }},
      {"pass_dropped(input_weighted(glu))",
       [](Rng& r) -> B { return PassDropped(InputWeighted(glu(r))); }},
      {"pass_dropped(masked(mixtures))",
       [](Rng& r) -> B { return PassDropped(OutputMasking(mixtures(r), {.rate = 0.3})); }},
  };
}

/// Balancers that fit the router and the selector of those names.
test::AnyBalancers balancers(Index variant, const std::string& router,
                             const std::string& selector) {
  test::AnyBalancers all;
  const bool grouped = router.find("hierarchical") != std::string::npos;
  const bool has_noise = router.find("noisy") != std::string::npos;
  switch (variant % 4) {
    case 0:
      all.add(SwitchLoss<double>({.coefficient = 0.5})).add(ZLoss<double>({.coefficient = 0.1}));
      break;
    case 1:
      all.add(ImportanceLoss<double>({.coefficient = 0.4}));
      if (has_noise && !grouped) all.add(LoadLoss<double>({.coefficient = 0.6}));
      break;
    case 2:
      all.add(GlobalBatchLoss<double>({.coefficient = 0.5})).add(EntropyLoss<double>());
      break;
    default:
      break;
  }
  if (variant % 2 == 0 && (router == "linear" || router == "cosine" || router == "jitter(linear)" ||
                           router == "gumbel(noisy)")) {
    all.add(OrthogonalityLoss<double>({.coefficient = 0.3}));
  }
  if (selector == "relu") all.add(ReluL1Loss<double>({.k = 1, .initial = 0.1}));
  if (selector.find("sigmoid") != std::string::npos) all.add(BiasBalance<double>({.rate = 0.05}));
  if (selector.find("biased") != std::string::npos) all.add(QuantileBalance<double>());
  return all;
}

using Moe = MoELayer<test::AnyRouter, test::AnySelector, test::AnyCapacity, test::AnyExperts,
                     test::AnyBalancers>;

struct Combination {
  std::string name;
  std::function<Moe()> make;
};

/// Every pair of router and selector, with the other parts in turn: each occurs with each.
std::vector<Combination> combinations() {
  std::vector<Combination> all;
  std::uint64_t number = 0;
  for (const auto& router : routers()) {
    for (const auto& selector : selectors()) {
      const auto every_capacity = capacities();
      const auto every_bank = banks();
      const auto& capacity = every_capacity[number % every_capacity.size()];
      const auto& bank = every_bank[number % every_bank.size()];
      const auto variant = static_cast<Index>(number / 3);
      const std::uint64_t seed = 1000 + number;
      all.push_back({router.name + ", " + selector.name + ", " + capacity.name + ", " + bank.name +
                         ", balancers " + std::to_string(variant % 4),
                     [=] {
                       Rng rng(seed);
                       return Moe(router.make(rng), selector.make(rng), capacity.make(rng),
                                  bank.make(rng), balancers(variant, router.name, selector.name));
                     }});
      ++number;
    }
  }
  return all;
}

Matrix<double> input(std::uint64_t seed) {
  return test::random_matrix(kTokens, kModel, seed);
}

const Sequences kSequences({4, 2});
const std::vector<std::uint8_t> kMask = {1, 1, 0, 1, 1, 1};

/// One step of training; returns the objective.
double train(Moe& moe, AdamW<double>& optimizer, std::uint64_t step) {
  Rng rng(50 + step);
  PassRecord record;
  Moe::Cache cache;
  const Matrix<double> target = input(200 + step);
  const Matrix<double>& y = moe.forward(
      input(100 + step),
      {.training = true, .sequences = &kSequences, .mask = kMask, .rng = &rng, .record = &record},
      cache);
  const Matrix<double> error = y - target;
  moe.backward(error, cache);
  double reported = 0.0;
  for (const auto& [name, loss] : moe.report(cache).losses) reported += loss;
  CHECK(reported == Approx(record.aux_loss()));
  optimizer.step(moe);
  return 0.5 * error.squaredNorm() + record.aux_loss();
}

/// Copies parameters and buffers by name, as loading a checkpoint does.
void copy_state(Moe& from, Moe& to) {
  const auto values = parameters(from);
  const auto places = parameters(to);
  REQUIRE(values.size() == places.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    REQUIRE(values[i].name == places[i].name);
    places[i].parameter->value = values[i].parameter->value;
    places[i].parameter->grad = values[i].parameter->grad;
  }
  const auto states = buffers(from);
  const auto state_places = buffers(to);
  REQUIRE(states.size() == state_places.size());
  for (std::size_t i = 0; i < states.size(); ++i) {
    REQUIRE(states[i].name == state_places[i].name);
    state_places[i].buffer->value = states[i].buffer->value;
  }
}

/// The gradient that is farthest from finite differences, relative to its size.
struct Mismatch {
  std::string name;
  double error = 0.0;
};

constexpr double kTolerance = 5e-5;

/// Checks the gradients of sum(y * weight) + auxiliary losses, for the input and each parameter. A
/// gradient below 1e-3 is compared as if it were 1e-3.
Mismatch worst_mismatch(test::SameDraws<Moe>& moe, Matrix<double> x) {
  PassRecord record;
  const Pass pass{.training = true,
                  .sequences = &kSequences,
                  .mask = kMask,
                  .aux_scale = 0.7,
                  .record = &record};
  const Matrix<double> weight = test::random_matrix(kTokens, kModel, 12345);
  Moe::Cache space;
  const auto objective = [&] {
    record.clear();
    return moe.forward(x, pass, space).cwiseProduct(weight).sum() + record.aux_loss();
  };
  Mismatch worst;
  const auto compare = [&](const std::string& name, const Matrix<double>& analytic,
                           Matrix<double>& at) {
    const Matrix<double> numeric = test::numeric_gradient(at, objective);
    const double error = (analytic - numeric).norm() / std::max(numeric.norm(), 1e-3);
    if (!(error <= worst.error)) worst = {name, error};
  };
  zero_gradients(moe);
  Moe::Cache cache;
  moe.forward(x, pass, cache);
  compare("the input", moe.backward(weight, cache), x);
  for (auto& [name, parameter] : parameters(moe)) {
    compare(name, parameter->gradient(), parameter->value);
  }
  return worst;
}

}  // namespace

TEST_CASE("Compositions have the gradients of what they report", "[moe][compositions][gradient]") {
  const auto all = combinations();
  REQUIRE(all.size() >= 200);
  for (const Combination& combination : all) {
    INFO(combination.name);
    test::SameDraws<Moe> moe{combination.make()};
    // Where a finite difference changes a choice, another input is tried.
    Mismatch best = worst_mismatch(moe, input(1));
    for (std::uint64_t seed = 2; seed < 8 && best.error > kTolerance; ++seed) {
      const Mismatch other = worst_mismatch(moe, input(seed));
      if (other.error < best.error) best = other;
    }
    INFO("gradient of " << best.name);
    CHECK(best.error <= kTolerance);
  }
}

TEST_CASE("Compositions resume from their parameters and buffers", "[moe][compositions]") {
  for (const Combination& combination : combinations()) {
    INFO(combination.name);
    Moe moe = combination.make();
    AdamW<double> optimizer({.learning_rate = 0.05});
    for (std::uint64_t step = 0; step < 2; ++step) train(moe, optimizer, step);

    Moe resumed = combination.make();
    copy_state(moe, resumed);
    AdamW<double> resumed_optimizer({.learning_rate = 0.05});
    for (const auto& [name, moments] : optimizer.moments()) {
      resumed_optimizer.moments(name) = *moments;
    }
    resumed_optimizer.set_steps(optimizer.steps());
    for (std::uint64_t step = 2; step < 4; ++step) {
      CHECK(train(moe, optimizer, step) == train(resumed, resumed_optimizer, step));
    }
    const auto expected = parameters(moe);
    const auto actual = parameters(resumed);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      INFO(expected[i].name);
      CHECK(actual[i].parameter->value == expected[i].parameter->value);
    }
  }
}
