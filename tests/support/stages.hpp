// SPDX-License-Identifier: MIT
/// \file
/// Every kind of stage of a mixture by name, wrapped and not, for tests of compositions.
#pragma once

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
#include <weir/moe/selector/biased_probability_top_k.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/relu_routing.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/threshold.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/moe/selector/top_p.hpp>
#include <weir/nn/linear.hpp>

#include "support/any_stage.hpp"

namespace weir::test {

inline constexpr Index kModel = 3;
inline constexpr Index kExperts = 4;
inline constexpr Index kTokens = 6;

template <class Stage>
struct Named {
  std::string name;
  std::function<Stage(Rng&)> make;
};

/// Weights large enough that a finite difference does not change a choice.
template <class T>
LinearRouter<T> linear(Rng& rng, Index experts = kExperts) {
  return LinearRouter<T>(kModel, experts, rng, {.init_scale = 8.0});
}

template <class T>
NoisyRouter<T> noisy(Rng& rng, Index experts = kExperts) {
  return {normal_init<T>(experts, kModel, 2.0, rng),
          normal_init<T>(experts, kModel, 0.5, rng),
          {.min_std = 0.3}};
}

template <class T>
std::vector<Named<AnyRouter<T>>> routers() {
  using R = AnyRouter<T>;
  return {
      {"linear", [](Rng& r) -> R { return linear<T>(r); }},
      {"noisy", [](Rng& r) -> R { return noisy<T>(r); }},
      {"cosine",
       [](Rng& r) -> R {
         return CosineRouter<T>(kModel, kExperts, r, {.d_projection = 3, .temperature = 0.1});
       }},
      {"layer(linear)",
       [](Rng& r) -> R {
         return LayerRouter(Linear<T>(kModel, kExperts, r, {.init_scale = 8.0}), kModel, kExperts);
       }},
      {"gumbel(linear)", [](Rng& r) -> R { return GumbelRouter(linear<T>(r)); }},
      {"jitter(linear)", [](Rng& r) -> R { return JitterRouter(linear<T>(r), {.epsilon = 0.1}); }},
      {"dropout(linear)", [](Rng& r) -> R { return InputDropoutRouter(linear<T>(r)); }},
      {"temperature(linear)",
       [](Rng& r) -> R {
         return TemperatureRouter(linear<T>(r), {.start = 2.0, .end = 0.5, .steps = 4});
       }},
      {"gumbel(noisy)", [](Rng& r) -> R { return GumbelRouter(noisy<T>(r)); }},
      {"layer(noisy)", [](Rng& r) -> R { return LayerRouter(noisy<T>(r), kModel, kExperts); }},
      {"jitter(gumbel(noisy))",
       [](Rng& r) -> R { return JitterRouter(GumbelRouter(noisy<T>(r)), {.epsilon = 0.1}); }},
      {"temperature(layer(noisy))",
       [](Rng& r) -> R {
         return TemperatureRouter(LayerRouter(noisy<T>(r), kModel, kExperts), {.start = 1.5});
       }},
      {"d_select_k",
       [](Rng& r) -> R {
         return DSelectKRouter<T>(kModel, kExperts, r, {.k = 2, .entropy = 0.1});
       }},
      {"hierarchical(linear, linear)",
       [](Rng& r) -> R { return HierarchicalRouter(linear<T>(r, 2), linear<T>(r)); }},
      {"hierarchical(noisy, noisy)",
       [](Rng& r) -> R { return HierarchicalRouter(noisy<T>(r, 2), noisy<T>(r)); }},
      {"hierarchical(linear, d_select_k)",
       [](Rng& r) -> R {
         return HierarchicalRouter(
             linear<T>(r, 2), DSelectKRouter<T>(kModel, kExperts, r, {.k = 2, .entropy = 0.1}));
       }},
      {"jitter(hierarchical(noisy, linear))",
       [](Rng& r) -> R {
         return JitterRouter(HierarchicalRouter(noisy<T>(r, 2), linear<T>(r)), {.epsilon = 0.1});
       }},
  };
}

template <class S>
S with_bias(S selector, Rng& rng) {
  selector.selection_bias().value = normal_init<typename S::Scalar>(1, kExperts, 0.2, rng);
  return selector;
}

template <class T>
std::vector<Named<AnySelector<T>>> selectors() {
  using S = AnySelector<T>;
  const auto sigmoid = [](Rng& r) {
    return with_bias(SigmoidTopK<T>(kExperts, {.k = 2, .scale = 1.5}), r);
  };
  return {
      {"top_k_softmax", [](Rng&) -> S { return TopKSoftmax<T>({.k = 2}); }},
      {"softmax_top_k", [](Rng&) -> S { return SoftmaxTopK<T>({.k = 2}); }},
      {"softmax_top_k renormalised",
       [](Rng&) -> S {
         return SoftmaxTopK<T>({.k = 3, .renormalise = true, .scale = 2.0, .norm = 2.0});
       }},
      {"sigmoid_top_k", [=](Rng& r) -> S { return sigmoid(r); }},
      {"biased_softmax_top_k",
       [](Rng& r) -> S { return with_bias(BiasedSoftmaxTopK<T>(kExperts, {.k = 2}), r); }},
      {"biased_probability_top_k",
       [](Rng& r) -> S { return with_bias(BiasedProbabilityTopK<T>(kExperts, {.k = 2}), r); }},
      {"threshold", [](Rng&) -> S { return Threshold<T>({.k = 3, .threshold = 0.1}); }},
      {"top_p", [](Rng&) -> S { return TopP<T>({.threshold = 0.7}); }},
      {"relu", [](Rng&) -> S { return ReluRouting<T>(); }},
      {"rank_policy(top_k_softmax)",
       [](Rng&) -> S { return RankPolicy(TopKSoftmax<T>({.k = 3})); }},
      {"replay(softmax_top_k)", [](Rng&) -> S { return Replay(SoftmaxTopK<T>({.k = 2})); }},
      {"sampled(top_k_softmax)",
       [](Rng&) -> S { return SampledChoice(TopKSoftmax<T>({.k = 2}), {.certain = 1}); }},
      {"rank_policy(replay(sigmoid_top_k))",
       [=](Rng& r) -> S { return RankPolicy(Replay(sigmoid(r))); }},
      {"rank_policy(sampled(biased))",
       [](Rng& r) -> S {
         return RankPolicy(SampledChoice(with_bias(BiasedSoftmaxTopK<T>(kExperts, {.k = 2}), r)));
       }},
  };
}

template <class T>
std::vector<Named<AnyCapacity<T>>> capacities() {
  using C = AnyCapacity<T>;
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
       [](Rng&) -> C { return AdaptiveCapacity<T>({.initial = 1.0, .least = 0.5, .minimum = 0}); }},
  };
}

template <class T>
GluBank<T> glu(Rng& rng, Index experts = kExperts) {
  return GluBank<T>(kModel, experts, 2, rng);
}

/// Experts that are mixtures themselves, with noise, a capacity, losses and a rule of their own.
template <class T>
auto mixtures(Rng& rng) {
  const auto one = [&] {
    return MoELayer(GumbelRouter(LinearRouter<T>(kModel, 2, rng, {.init_scale = 8.0})),
                    SigmoidTopK<T>(2, {.k = 1}), CapacityFactor({.train = 1.0, .minimum = 1}),
                    MlpBank<T, Silu>(kModel, 2, 2, rng), SwitchLoss<T>({.coefficient = 0.3}),
                    BiasBalance<T>({.rate = 0.1}));
  };
  std::vector<decltype(one())> experts;
  for (Index e = 0; e < kExperts; ++e) experts.push_back(one());
  return AnyBank(std::move(experts), kModel, kModel);
}

template <class T>
std::vector<Named<AnyExperts<T>>> banks() {
  using B = AnyExperts<T>;
  return {
      {"glu", [](Rng& r) -> B { return glu<T>(r); }},
      {"mlp with biases",
       [](Rng& r) -> B { return MlpBank<T, Silu>(kModel, kExperts, 2, r, {.bias = true}); }},
      {"input_weighted(glu)", [](Rng& r) -> B { return InputWeighted(glu<T>(r)); }},
      {"pass_dropped(glu)", [](Rng& r) -> B { return PassDropped(glu<T>(r)); }},
      {"masked(glu)", [](Rng& r) -> B { return OutputMasking(glu<T>(r), {.rate = 0.3}); }},
      {"with_zero(glu)",
       [](Rng& r) -> B {
         return WithZeroExperts(glu<T>(r, 1), r, {.zero = 1, .identity = 1, .constant = 1});
       }},
      {"mixtures", [](Rng& r) -> B { return mixtures<T>(r); }},
      {"pass_dropped(input_weighted(glu))",
       [](Rng& r) -> B { return PassDropped(InputWeighted(glu<T>(r))); }},
      {"pass_dropped(masked(mixtures))",
       [](Rng& r) -> B { return PassDropped(OutputMasking(mixtures<T>(r), {.rate = 0.3})); }},
  };
}

/// Balancers that fit the router and the selector of those names.
template <class T>
AnyBalancers<T> balancers(Index variant, const std::string& router, const std::string& selector) {
  AnyBalancers<T> all;
  const bool grouped = router.find("hierarchical") != std::string::npos;
  const bool has_noise = router.find("noisy") != std::string::npos;
  switch (variant % 4) {
    case 0:
      all.add(SwitchLoss<T>({.coefficient = 0.5})).add(ZLoss<T>({.coefficient = 0.1}));
      break;
    case 1:
      all.add(ImportanceLoss<T>({.coefficient = 0.4}));
      if (has_noise && !grouped) all.add(LoadLoss<T>({.coefficient = 0.6}));
      break;
    case 2:
      all.add(GlobalBatchLoss<T>({.coefficient = 0.5})).add(EntropyLoss<T>());
      break;
    default:
      break;
  }
  if (variant % 2 == 0 && (router == "linear" || router == "cosine" || router == "jitter(linear)" ||
                           router == "gumbel(noisy)")) {
    all.add(OrthogonalityLoss<T>({.coefficient = 0.3}));
  }
  if (selector == "relu") all.add(ReluL1Loss<T>({.k = 1, .initial = 0.1}));
  if (selector.find("sigmoid") != std::string::npos) all.add(BiasBalance<T>({.rate = 0.05}));
  if (selector.find("biased") != std::string::npos) all.add(QuantileBalance<T>());
  return all;
}

template <class T>
using AnyMoe =
    MoELayer<AnyRouter<T>, AnySelector<T>, AnyCapacity<T>, AnyExperts<T>, AnyBalancers<T>>;

template <class T>
struct Combination {
  std::string name;
  std::function<AnyMoe<T>()> make;
};

/// Every pair of router and selector, with the other parts in turn: each occurs with each.
template <class T>
std::vector<Combination<T>> combinations() {
  std::vector<Combination<T>> all;
  std::uint64_t number = 0;
  for (const auto& router : routers<T>()) {
    for (const auto& selector : selectors<T>()) {
      const auto every_capacity = capacities<T>();
      const auto every_bank = banks<T>();
      const auto& capacity = every_capacity[number % every_capacity.size()];
      const auto& bank = every_bank[number % every_bank.size()];
      const auto variant = static_cast<Index>(number / 3);
      const std::uint64_t seed = 1000 + number;
      all.push_back({router.name + ", " + selector.name + ", " + capacity.name + ", " + bank.name +
                         ", balancers " + std::to_string(variant % 4),
                     [=] {
                       Rng rng(seed);
                       return AnyMoe<T>(router.make(rng), selector.make(rng), capacity.make(rng),
                                        bank.make(rng),
                                        balancers<T>(variant, router.name, selector.name));
                     }});
      ++number;
    }
  }
  return all;
}

}  // namespace weir::test
