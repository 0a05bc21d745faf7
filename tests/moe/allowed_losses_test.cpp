// SPDX-License-Identifier: MIT
// Experts that a pass forbids, in every balancing loss and under every capacity policy.
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/communication_loss.hpp>
#include <weir/moe/balance/device_loss.hpp>
#include <weir/moe/balance/entropy_loss.hpp>
#include <weir/moe/balance/global_batch_loss.hpp>
#include <weir/moe/balance/gshard_loss.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/load_loss.hpp>
#include <weir/moe/balance/quantile_balance.hpp>
#include <weir/moe/balance/relu_l1_loss.hpp>
#include <weir/moe/balance/second_place_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/adaptive_capacity.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/device_capacity.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/dynamic_capacity.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/pass_dropped.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/selector/around/rank_policy.hpp>
#include <weir/moe/selector/around/sampled_choice.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/relaxed_top_k.hpp>
#include <weir/moe/selector/relu_routing.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/straight_through.hpp>
#include <weir/moe/selector/threshold.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/moe/selector/top_p.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"

namespace weir::allowed_losses_test {

namespace {

using Mask = std::vector<std::uint8_t>;

constexpr Index kExperts = 6;
constexpr Index kTokens = 8;

/// Each token its own experts: some have one, some all; expert 4 is forbidden to all.
Mask scattered() {
  Mask allowed;
  for (Index t = 0; t < kTokens; ++t) {
    for (Index e = 0; e < kExperts; ++e) {
      const bool one = t == 2 && e == 3;
      const bool some = t != 2 && e != 4 && ((e + t) % 3 != 0 || t == 5);
      allowed.push_back(one || some ? 1 : 0);
    }
  }
  return allowed;
}

/// The same experts for all.
const Mask kSame = {1, 0, 1, 1, 0, 1};

bool is_allowed(const Mask& allowed, Index t, Index e) {
  const Index row = allowed.size() == kExperts ? 0 : t;
  return allowed[static_cast<std::size_t>(row * kExperts + e)] != 0;
}

template <class Body>
void for_each_loss(Body&& body) {
  for (const Scope scope : {Scope::kBatch, Scope::kSequence}) {
    body("switch",
         SwitchLoss<double>(
             {.coefficient = 0.3, .fraction = LoadFraction::kOfAssignments, .scope = scope}));
    body("switch, of tokens",
         SwitchLoss<double>(
             {.coefficient = 0.3, .fraction = LoadFraction::kOfTokens, .scope = scope}));
    body("gshard", GShardLoss<double>({.coefficient = 0.2, .scope = scope}));
    body("device",
         DeviceLoss<double>(ExpertGroups::uniform(6, 3), {.coefficient = 0.6, .scope = scope}));
    body("communication",
         CommunicationLoss<double>(ExpertGroups::uniform(6, 3),
                                   {.devices_per_token = 2, .coefficient = 0.7, .scope = scope}));
  }
  body("z", ZLoss<double>({.coefficient = 0.1}));
  body("importance", ImportanceLoss<double>({.coefficient = 0.4}));
  body("importance, sample",
       ImportanceLoss<double>({.coefficient = 0.4, .variance = Variance::kSample}));
  body("entropy", EntropyLoss<double>({.token = 0.3, .mean = -0.2}));
  body("second place", SecondPlaceLoss<double>({.coefficient = 0.5}));
  body("global batch", GlobalBatchLoss<double>({.coefficient = 0.5}));
}

template <class Body>
void for_each_selector(Body&& body) {
  body("softmax", SoftmaxTopK<double>({.k = 1}));
  body("softmax, renormalised", SoftmaxTopK<double>({.k = 1, .renormalise = true}));
  body("top-k softmax", TopKSoftmax<double>({.k = 1}));
  body("sigmoid", SigmoidTopK<double>(6, {.k = 1}));
  body("biased softmax", BiasedSoftmaxTopK<double>(6, {.k = 1}));
  body("relaxed", RelaxedTopK<double>({.k = 1, .descent = {.epsilon = 0.4}}));
  body("top-p", TopP<double>({.threshold = 0.7}));
  body("relu", ReluRouting<double>());
}

template <class L>
bool all_finite(L& layer) {
  bool finite = true;
  for (const auto& [name, parameter] : parameters(layer)) {
    finite = finite && parameter->grad.allFinite();
  }
  return finite;
}

/// A step of a layer of six experts under `capacity`, with masks and padding.
template <class R, class S, class C, class B, class... L>
void check_layer_of(const R& router, const S& selector, const C& capacity, const B& bank,
                    const Mask& allowed, const L&... losses) {
  MoELayer layer(router, selector, capacity, bank, losses...);
  Rng draws(5);
  const Mask mask = {1, 1, 1, 0, 1, 1, 1, 1};
  const Sequences sequences({5, 3});
  PassRecord record;
  const Pass pass{.training = true,
                  .sequences = &sequences,
                  .mask = mask,
                  .allowed = allowed,
                  .rng = &draws,
                  .record = &record};
  const Matrix<double> x = test::random_matrix(kTokens, 4, 22);
  typename decltype(layer)::Cache cache;
  for (int step = 0; step < 2; ++step) {
    record.clear();
    CHECK(layer.forward(x, pass, cache).allFinite());
    CHECK(std::isfinite(record.aux_loss()));
    for (Index t = 0; t < kTokens; ++t) {
      for (Index a = cache.routing.first(t); a < cache.routing.last(t); ++a) {
        CHECK(is_allowed(allowed, t, cache.routing.expert[a]));
      }
    }
    CHECK(layer.backward(x, cache).allFinite());
    CHECK(all_finite(layer));
    for (Index t = 0; t < kTokens; ++t) {
      for (Index e = 0; e < kExperts; ++e) {
        if (!is_allowed(allowed, t, e)) CHECK(cache.gradient.logits(t, e) == 0.0);
      }
    }
    for (const auto& [name, parameter] : parameters(layer)) {
      INFO(name);
      if (name == "router.weight") CHECK(parameter->grad.row(4).isZero(0.0));
      if (name.find(".4.") != std::string::npos && parameter->grad.size() > 0) {
        CHECK(parameter->grad.isZero(0.0));
      }
    }
    update(layer);
  }
}

template <class R, class S, class C, class... L>
void check_layer(const R& router, const S& selector, const C& capacity, const Mask& allowed,
                 const L&... losses) {
  Rng rng(21);
  const GluBank<double> bank(4, 6, 3, rng);
  check_layer_of(router, selector, capacity, bank, allowed, losses...);
  check_layer_of(router, selector, capacity, PassDropped(bank), allowed, losses...);
}

template <class Body>
void for_each_capacity(Body&& body) {
  body("dropless", Dropless());
  body("fixed", FixedCapacity({.capacity = 1}));
  body("factor", CapacityFactor({.train = 0.5, .minimum = 1}));
  body("device", DeviceCapacity({.devices = 3, .factor = 0.5, .protected_share = 0.5}));
  body("dynamic", DynamicCapacity({.factor = -0.5}));
  body("adaptive", AdaptiveCapacity<double>({.initial = 0.5, .least = 0.1, .minimum = 1}));
  for (const DropOrder order : {DropOrder::kTokenMajor, DropOrder::kProbability}) {
    body("fixed, ordered", FixedCapacity({.capacity = 1, .order = order}));
  }
  body("renormalised", RenormaliseKept(FixedCapacity({.capacity = 1})));
}

}  // namespace

TEST_CASE("Every balancing loss is finite with forbidden experts, and gives them no gradient",
          "[moe][allowed][balance]") {
  const Mask padding = {1, 1, 1, 0, 1, 1, 1, 1};
  const Sequences sequences({3, 0, 5});
  for (const Mask& allowed : {kSame, scattered()}) {
    const Pass pass{.sequences = &sequences, .mask = padding, .allowed = allowed};
    for_each_selector([&](const std::string& selector_name, const auto& selector) {
      INFO(selector_name);
      for_each_loss([&](const std::string& name, const auto& loss) {
        INFO(name);
        Matrix<double> logits = test::random_matrix(kTokens, kExperts, 31);
        CHECK(std::isfinite(test::loss_of(loss, test::route(selector, logits, pass))));
        const Matrix<double> d = test::logit_gradient(selector, loss, logits, pass);
        CHECK(d.allFinite());
        for (Index t = 0; t < kTokens; ++t) {
          for (Index e = 0; e < kExperts; ++e) {
            if (!is_allowed(allowed, t, e)) CHECK(d(t, e) == 0.0);
          }
        }
      });
    });
  }
}

TEST_CASE("Every balancing loss has its exact gradient with forbidden experts",
          "[moe][allowed][balance][gradient]") {
  const Mask allowed = scattered();
  const Sequences sequences({3, 5});
  const Pass pass{.sequences = &sequences, .allowed = allowed};
  const auto check = [&](const std::string& selector_name, const auto& selector) {
    INFO(selector_name);
    for_each_loss([&](const std::string& name, const auto& loss) {
      INFO(name);
      Matrix<double> logits = test::random_matrix(kTokens, kExperts, 32);
      const Matrix<double> analytic = test::logit_gradient(selector, loss, logits, pass);
      const Matrix<double> numeric = test::numeric_gradient(
          logits, [&] { return test::loss_of(loss, test::route(selector, logits, pass)); });
      CHECK((analytic - numeric).norm() <= 1e-7 * (1.0 + numeric.norm()));
    });
  };
  check("softmax", SoftmaxTopK<double>({.k = 1}));
  check("sigmoid", SigmoidTopK<double>(6, {.k = 1}));
}

TEST_CASE("The loss of ReLU routing is finite with forbidden experts", "[moe][allowed][balance]") {
  for (const Mask& allowed : {kSame, scattered()}) {
    check_layer(LinearRouter<double>(test::random_matrix(kExperts, 4, 41)), ReluRouting<double>(),
                Dropless(), allowed, ReluL1Loss<double>({.initial = 0.1}));
  }
}

TEST_CASE("The load loss is finite with experts that are forbidden to some tokens",
          "[moe][allowed][balance]") {
  const NoisyRouter<double> router(test::random_matrix(kExperts, 4, 42),
                                   test::random_matrix(kExperts, 4, 43));
  for (const Mask& allowed : {kSame, scattered()}) {
    check_layer(router, TopKSoftmax<double>({.k = 1}), Dropless(), allowed, LoadLoss<double>(),
                ImportanceLoss<double>());
  }
}

TEST_CASE("Balancing rules leave a finite bias with forbidden experts", "[moe][allowed][balance]") {
  const LinearRouter<double> router(test::random_matrix(kExperts, 4, 44));
  for (const Mask& allowed : {kSame, scattered()}) {
    check_layer(router, SigmoidTopK<double>(6, {.k = 1}), Dropless(), allowed,
                BiasBalance<double>({.rate = 0.1}));
    check_layer(router, BiasedSoftmaxTopK<double>(6, {.k = 1}), Dropless(), allowed,
                QuantileBalance<double>());
  }
}

TEST_CASE("Every capacity policy serves only allowed experts", "[moe][allowed][capacity]") {
  const LinearRouter<double> router(5.0 * test::random_matrix(kExperts, 4, 45));
  for_each_capacity([&](const std::string& name, const auto& capacity) {
    INFO(name);
    const auto check = [&](const auto& selector, const Mask& allowed) {
      check_layer(router, selector, capacity, allowed, SwitchLoss<double>({.coefficient = 0.2}));
    };
    check(SoftmaxTopK<double>({.k = 1}), scattered());
    check(SoftmaxTopK<double>({.k = 3, .renormalise = true}), kSame);
    check(RankPolicy(SigmoidTopK<double>(6, {.k = 3})), kSame);
  });
}

TEST_CASE("Every selector keeps to allowed experts in training under a capacity",
          "[moe][allowed][capacity]") {
  const LinearRouter<double> router(5.0 * test::random_matrix(kExperts, 4, 46));
  const auto check = [&](const auto& selector, const Mask& allowed) {
    check_layer(router, selector, FixedCapacity({.capacity = 1}), allowed,
                ZLoss<double>({.coefficient = 0.1}), SecondPlaceLoss<double>({.coefficient = 0.3}));
  };
  check(TopP<double>({.threshold = 0.9}), scattered());
  check(SampledChoice(SoftmaxTopK<double>({.k = 1})), scattered());
  check(SampledChoice(TopKSoftmax<double>({.k = 2}), {.certain = 1}), kSame);
  check(StraightThrough<double>({.k = 2}), kSame);
  check(RelaxedTopK<double>({.k = 3}), kSame);
  check(Threshold<double>({.k = 3, .threshold = 0.1}), kSame);
}

}  // namespace weir::allowed_losses_test
