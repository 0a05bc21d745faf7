// SPDX-License-Identifier: MIT
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/around/rank_policy.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

using namespace weir;

static_assert(CapacityPolicy<RenormaliseKept<Dropless>, float>);
static_assert(CapacityPolicy<RenormaliseKept<CapacityFactor>, double>);

namespace {

/// Two tokens with the experts 0, 1, 2 and 1, 0, 2; some dropped.
Routing<double> small_routing() {
  Routing<double> routing;
  routing.begin("Test", Matrix<double>::Zero(2, 3), {});
  routing.assign_each(3);
  routing.expert = {0, 1, 2, 1, 0, 2};
  routing.weight = {0.5, 0.25, 0.125, 0.5, 0.3, 0.2};
  routing.kept = {1, 0, 1, 0, 0, 0};
  return routing;
}

template <class S, class C, class... L>
void check_layer_gradients(const S& selector, const C& capacity, const L&... losses) {
  Rng rng(1);
  LinearRouter<double> router(4, 4, rng, {.init_scale = 5.0});
  MoELayer layer(router, selector, capacity, GluBank<double>(4, 4, 3, rng, 1.0), losses...);
  const Matrix<double> x = test::random_matrix(8, 4, 2);
  typename decltype(layer)::Cache cache;
  layer.forward(x, cache);
  const MoEReport report = layer.report(cache);
  CHECK(report.dropped > report.dropped_tokens * 3);  // Some tokens have lost some experts only.
  test::check_gradients(layer, x);
}

}  // namespace

TEST_CASE("RenormaliseKept makes what is kept sum to one", "[moe][capacity][renormalise_kept]") {
  Routing<double> routing = small_routing();
  RenormaliseKept(Dropless{}).apply(routing);
  CHECK(routing.weight == std::vector<double>{0.8, 0.25, 0.2, 0.5, 0.3, 0.2});
  CHECK(routing.selector_weight == small_routing().weight);
  CHECK(routing.kept == small_routing().kept);

  routing = small_routing();
  RenormaliseKept(Dropless{}, 2.5).apply(routing);
  CHECK(routing.weight == std::vector<double>{2.0, 0.25, 0.5, 0.5, 0.3, 0.2});
}

TEST_CASE("RenormaliseKept divides by epsilon at least", "[moe][capacity][renormalise_kept]") {
  constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
  Routing<double> routing = small_routing();
  routing.weight = {0.25 * kEpsilon, 1.0, 0.5 * kEpsilon, 0.0, 0.0, 0.0};
  routing.kept = {1, 0, 1, 1, 1, 1};
  RenormaliseKept(Dropless{}).apply(routing);
  CHECK(routing.weight == std::vector<double>{0.25, 1.0, 0.5, 0.0, 0.0, 0.0});
}

TEST_CASE("RenormaliseKept comes after the drop, selectors normalise before",
          "[moe][capacity][renormalise_kept]") {
  Matrix<double> logits = test::random_matrix(20, 4, 3);
  const FixedCapacity full{.capacity = 4};
  Routing<double> before = test::route(SoftmaxTopK<double>{.k = 2, .renormalise = true}, logits);
  Routing<double> after = test::route(SoftmaxTopK<double>{.k = 2}, logits);
  full.apply(before);
  RenormaliseKept(full).apply(after);
  REQUIRE(before.kept == after.kept);
  int partly = 0;
  for (Index t = 0; t < 20; ++t) {
    double sum_before = 0.0;
    double sum_after = 0.0;
    int kept = 0;
    for (Index a = before.first(t); a < before.last(t); ++a) {
      const auto i = static_cast<std::size_t>(a);
      if (before.kept[i] == 0) continue;
      ++kept;
      sum_before += before.weight[i];
      sum_after += after.weight[i];
    }
    if (kept == 0) continue;
    partly += kept == 1 ? 1 : 0;
    CHECK(sum_after == Approx(1.0));
    if (kept == 1) CHECK(sum_before < 0.95);
    if (kept == 2) CHECK(sum_before == Approx(1.0));
  }
  CHECK(partly > 2);
}

TEST_CASE("RenormaliseKept without a drop is what a renormalising selector does",
          "[moe][capacity][renormalise_kept]") {
  const Matrix<double> logits = test::random_matrix(10, 5, 4);
  const SoftmaxTopK<double> normalising{.k = 3, .renormalise = true, .scale = 1.5};
  const SoftmaxTopK<double> raw{.k = 3};
  const Routing<double> expected = test::route(normalising, logits);
  Routing<double> routing = test::route(raw, logits);
  RenormaliseKept(Dropless{}, 1.5).apply(routing);
  RoutingGradient<double> gradient, expected_gradient;
  gradient.reset(routing);
  gradient.weights = test::random_matrix(1, 30, 5);
  expected_gradient.reset(routing);
  expected_gradient.weights = gradient.weights;
  select_backward(raw, routing, gradient);
  normalising.backward(expected, expected_gradient);
  CHECK(test::relative_error(gradient.logits, expected_gradient.logits) < 1e-13);
  for (std::size_t a = 0; a < 30; ++a) CHECK(routing.weight[a] == Approx(expected.weight[a]));
}

TEST_CASE("RenormaliseKept gives a token with one expert no gradient",
          "[moe][capacity][renormalise_kept]") {
  const SoftmaxTopK<double> raw{.k = 1};
  Routing<double> routing = test::route(raw, test::random_matrix(6, 3, 6));
  RenormaliseKept(Dropless{}).apply(routing);
  RoutingGradient<double> gradient;
  gradient.reset(routing);
  gradient.weights = test::random_matrix(1, 6, 7);
  select_backward(raw, routing, gradient);
  CHECK(gradient.logits.norm() < 1e-15);
}

TEST_CASE("RenormaliseKept gradients agree with finite differences",
          "[moe][capacity][renormalise_kept][gradient]") {
  const FixedCapacity capacity{.capacity = 4};
  const SigmoidTopK<double> sigmoid(4, {.k = 3, .renormalise = false});
  check_layer_gradients(SoftmaxTopK<double>{.k = 3}, RenormaliseKept(capacity));
  check_layer_gradients(SoftmaxTopK<double>{.k = 3}, RenormaliseKept(capacity, 2.5),
                        ImportanceLoss<double>{}, SwitchLoss<double>{});
  check_layer_gradients(TopKSoftmax<double>{.k = 3}, RenormaliseKept(capacity));
  check_layer_gradients(sigmoid, RenormaliseKept(capacity));
  check_layer_gradients(SigmoidTopK<double>(4, {.k = 3}), RenormaliseKept(capacity));
  check_layer_gradients(RankPolicy(sigmoid), RenormaliseKept(Dropless{}));
  check_layer_gradients(
      sigmoid, RenormaliseKept(FixedCapacity{.capacity = 4, .on_drop = OnDrop::kPass}, 1.5));
}

TEST_CASE("RenormaliseKept has a constant divisor below epsilon",
          "[moe][capacity][renormalise_kept][gradient]") {
  // Logits so far apart that the third expert, the only one kept, weighs some exp(-37), a third of
  // epsilon.
  Matrix<double> logits(1, 3);
  logits << 0.0, -1.0, -37.0;
  const SoftmaxTopK<double> raw{.k = 3};
  const auto routed = [&] {
    Routing<double> routing = test::route(raw, logits);
    routing.kept = {0, 0, 1};
    RenormaliseKept(Dropless{}).apply(routing);
    return routing;
  };
  Routing<double> routing = routed();
  RoutingGradient<double> gradient;
  gradient.reset(routing);
  gradient.weights[2] = 1.0;
  select_backward(raw, routing, gradient);
  const Matrix<double> numeric = test::numeric_gradient(logits, [&] { return routed().weight[2]; });
  CHECK(numeric.norm() > 0.1);
  CHECK(test::relative_error(gradient.logits, numeric) < 1e-6);
}

TEST_CASE("RenormaliseKept can be gone through backward twice",
          "[moe][capacity][renormalise_kept]") {
  Rng rng(1);
  MoELayer layer(LinearRouter<double>(4, 4, rng, {.init_scale = 5.0}), SoftmaxTopK<double>{.k = 3},
                 RenormaliseKept(FixedCapacity{.capacity = 3}), GluBank<double>(4, 4, 3, rng, 1.0));
  const Matrix<double> x = test::random_matrix(8, 4, 2);
  const Matrix<double> dy = test::random_matrix(8, 4, 3);
  decltype(layer)::Cache cache;
  layer.forward(x, cache);
  const Matrix<double> once = layer.backward(dy, cache);
  CHECK(layer.backward(dy, cache) == once);

  // And leaves nothing behind for a routing without it.
  cache.routing.begin("Test", Matrix<double>::Zero(2, 4), {});
  CHECK(cache.routing.renormalised_to == 0.0);
}

TEST_CASE("RenormaliseKept knows padding and no tokens", "[moe][capacity][renormalise_kept]") {
  const std::vector<std::uint8_t> mask = {0, 1};
  const SoftmaxTopK<double> raw{.k = 2};
  Routing<double> routing = test::route(raw, test::random_matrix(2, 3, 1), {.mask = mask});
  RenormaliseKept(Dropless{}).apply(routing);
  CHECK(routing.weight[0] + routing.weight[1] == Approx(1.0));
  routing = test::route(raw, Matrix<double>(0, 3));
  RenormaliseKept(Dropless{}).apply(routing);
  CHECK(routing.weight.empty());
}

TEST_CASE("RenormaliseKept is the same for any number of threads and allocates nothing",
          "[moe][capacity][renormalise_kept]") {
  const Matrix<double> logits = test::random_matrix(3000, 8, 1);
  const RenormaliseKept policy(CapacityFactor{.evaluate = 0.7});
  const SoftmaxTopK<double> raw{.k = 3};
  Routing<double> one;
  RoutingGradient<double> gradient;
  const auto run = [&](Routing<double>& routing) {
    raw.select(logits, {}, routing);
    policy.apply(routing);
    gradient.reset(routing);
    gradient.weights.setLinSpaced(routing.assignments(), -1.0, 2.0);
    select_backward(raw, routing, gradient);
  };
  run(one);
  if (test::allocations_are_counted()) CHECK(test::count_allocations([&] { run(one); }) == 0);
  const Matrix<double> d_logits = gradient.logits;
  const test::Threads threads(3);
  Routing<double> three;
  run(three);
  CHECK(three.weight == one.weight);
  CHECK(gradient.logits == d_logits);
}

TEST_CASE("RenormaliseKept names the setting that is wrong", "[moe][capacity][renormalise_kept]") {
  CHECK(test::message_of<ConfigError>([] { RenormaliseKept(Dropless{}, 0.0); }) ==
        "RenormaliseKept: scale = 0, expected > 0");
  const RenormaliseKept policy(FixedCapacity{.capacity = 0});
  CHECK(test::message_of<ConfigError>([&] { policy.check(); }) ==
        "FixedCapacity: capacity = 0, expected >= 1");
}
