// SPDX-License-Identifier: MIT
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/adaptive_capacity.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/capacity_wrapper.hpp>
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

namespace weir::renormalise_kept_test {

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

/// A selector and a policy behind it, forwards and backwards.
template <class S, class C>
struct Limited {
  const Routing<double>& forward(const Matrix<double>& logits, const Pass& pass = {}) {
    selector.forward(logits, pass, routing, selector_cache);
    capacity.forward(pass, routing, capacity_cache);
    return routing;
  }

  /// The gradient of the logits, from that of what was applied.
  const Matrix<double>& backward(const Matrix<double>& d_applied) {
    gradient.reset(routing);
    gradient.weights = d_applied;
    capacity.backward(routing, gradient, capacity_cache);
    selector.backward(routing, gradient, selector_cache);
    return gradient.logits;
  }

  S selector;
  C capacity;
  typename S::Cache selector_cache = {};
  typename C::template Cache<double> capacity_cache = {};
  Routing<double> routing = {};
  RoutingGradient<double> gradient = {};
};

template <class S, class C>
Limited(S, C) -> Limited<S, C>;

template <class S, class C, class... L>
void check_layer_gradients(const S& selector, const C& capacity, const L&... losses) {
  Rng rng(1);
  LinearRouter<double> router(4, 4, rng, {.init_scale = 5.0});
  MoELayer layer(router, selector, capacity, GluBank<double>(4, 4, 3, rng), losses...);
  const Matrix<double> x = test::random_matrix(8, 4, 2);
  typename decltype(layer)::Cache cache;
  layer.forward(x, {}, cache);
  const LayerReport report = layer.report(cache);
  CHECK(report.dropped > report.dropped_tokens * 3);  // Some tokens have lost some experts only.
  test::check_gradients(layer, x);
}

}  // namespace

TEST_CASE("RenormaliseKept makes what is kept sum to one", "[moe][capacity][renormalise_kept]") {
  Routing<double> routing = small_routing();
  test::limit(RenormaliseKept(Dropless()), routing);
  CHECK(routing.applied == List<double>{0.8, 0.25, 0.2, 0.5, 0.3, 0.2});
  CHECK(routing.weight == small_routing().weight);
  CHECK(routing.kept == small_routing().kept);

  test::limit(RenormaliseKept(Dropless(), {.scale = 2.5}), routing = small_routing());
  CHECK(routing.applied == List<double>{2.0, 0.25, 0.5, 0.5, 0.3, 0.2});
  CHECK(RenormaliseKept(Dropless(), {.scale = 2.5}).config().scale == 2.5);
}

TEST_CASE("RenormaliseKept divides by epsilon at least", "[moe][capacity][renormalise_kept]") {
  constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
  Routing<double> routing = small_routing();
  routing.weight = {0.25 * kEpsilon, 1.0, 0.5 * kEpsilon, 0.0, 0.0, 0.0};
  routing.kept = {1, 0, 1, 1, 1, 1};
  test::limit(RenormaliseKept(Dropless(), {.epsilon = kEpsilon}), routing);
  CHECK(routing.applied == List<double>{0.25, 1.0, 0.5, 0.0, 0.0, 0.0});
}

TEST_CASE("RenormaliseKept does not depend on the scale of the weights",
          "[moe][capacity][renormalise_kept]") {
  for (const double scale : {1.0, 1e-20, 1e-310, 1e300}) {
    Routing<double> routing = small_routing();
    routing.weight = {0.25 * scale, 1.0 * scale, 0.5 * scale, 0.0, 0.0, 0.0};
    routing.kept = {1, 0, 1, 1, 1, 1};
    test::limit(RenormaliseKept(Dropless(), {.scale = 3.0}), routing);
    CHECK(routing.applied[0] == Approx(1.0).epsilon(1e-12));
    CHECK(routing.applied[2] == Approx(2.0).epsilon(1e-12));
    CHECK(routing.applied[1] == 1.0 * scale);  // Dropped.
    CHECK(routing.applied[3] == 0.0);          // Nothing to divide by.
  }
  CHECK(test::message_of<ConfigError>([] { RenormaliseKept(Dropless(), {.epsilon = -1.0}); }) ==
        "RenormaliseKept: epsilon = -1, expected a finite number >= 0");
}

TEST_CASE("RenormaliseKept comes after the drop, selectors normalise before",
          "[moe][capacity][renormalise_kept]") {
  Matrix<double> logits = test::random_matrix(20, 4, 3);
  const FixedCapacity full({.capacity = 4});
  Routing<double> before = test::route(SoftmaxTopK<double>({.k = 2, .renormalise = true}), logits);
  Routing<double> after = test::route(SoftmaxTopK<double>({.k = 2}), logits);
  test::limit(full, before);
  test::limit(RenormaliseKept(full), after);
  REQUIRE(before.kept == after.kept);
  int partly = 0;
  for (Index t = 0; t < 20; ++t) {
    double sum_before = 0.0;
    double sum_after = 0.0;
    int kept = 0;
    for (Index a = before.first(t); a < before.last(t); ++a) {
      if (before.kept[a] == 0) continue;
      ++kept;
      sum_before += before.applied_weight(a);
      sum_after += after.applied_weight(a);
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
  Limited normalising{SoftmaxTopK<double>({.k = 3, .renormalise = true, .scale = 1.5}), Dropless()};
  Limited renormalising{SoftmaxTopK<double>({.k = 3}), RenormaliseKept(Dropless(), {.scale = 1.5})};
  const Routing<double>& expected = normalising.forward(logits);
  const Routing<double>& routing = renormalising.forward(logits);
  for (Index a = 0; a < 30; ++a) CHECK(routing.applied[a] == Approx(expected.weight[a]));
  const Matrix<double> d_applied = test::random_matrix(1, 30, 5);
  CHECK(test::relative_error(renormalising.backward(d_applied), normalising.backward(d_applied)) <
        1e-13);
}

TEST_CASE("RenormaliseKept gives a token with one expert no gradient",
          "[moe][capacity][renormalise_kept]") {
  Limited one{SoftmaxTopK<double>({.k = 1}), RenormaliseKept(Dropless())};
  one.forward(test::random_matrix(6, 3, 6));
  CHECK(one.backward(test::random_matrix(1, 6, 7)).norm() < 1e-15);
}

TEST_CASE("RenormaliseKept gradients agree with finite differences",
          "[moe][capacity][renormalise_kept][gradient]") {
  const FixedCapacity capacity({.capacity = 4});
  const SoftmaxTopK<double> softmax({.k = 3});
  const SigmoidTopK<double> sigmoid(4, {.k = 3, .renormalise = false});
  check_layer_gradients(softmax, RenormaliseKept(capacity));
  check_layer_gradients(softmax, RenormaliseKept(capacity, {.scale = 2.5}),
                        ImportanceLoss<double>(), SwitchLoss<double>());
  check_layer_gradients(TopKSoftmax<double>({.k = 3}), RenormaliseKept(capacity));
  check_layer_gradients(sigmoid, RenormaliseKept(capacity));
  check_layer_gradients(SigmoidTopK<double>(4, {.k = 3}), RenormaliseKept(capacity));
  check_layer_gradients(RankPolicy(sigmoid, {.train = RankRule::kThreshold}),
                        RenormaliseKept(Dropless()));
}

TEST_CASE("RenormaliseKept may be within another, whose gradient goes through it",
          "[moe][capacity][renormalise_kept][gradient]") {
  // What the inner one makes of the weights, the outer one makes of those: only its scale counts.
  using Inner = RenormaliseKept<FixedCapacity>;
  const Inner inner(FixedCapacity({.capacity = 4}), {.scale = 3.0});
  const RenormaliseKept<Inner> outer(inner, {.scale = 0.5});
  const SoftmaxTopK<double> selector({.k = 3});
  check_layer_gradients(selector, outer);

  const Matrix<double> logits = test::random_matrix(8, 4, 3);
  const Matrix<double> d_applied = test::random_matrix(1, 24, 4);
  Limited twice{selector, outer};
  Limited once{selector, RenormaliseKept(FixedCapacity({.capacity = 4}), {.scale = 0.5})};
  const List<double> applied = once.forward(logits).applied;
  twice.forward(logits);
  for (Index a = 0; a < 24; ++a) CHECK(twice.routing.applied[a] == Approx(applied[a]));
  CHECK(test::relative_error(twice.backward(d_applied), once.backward(d_applied)) < 1e-13);
}

TEST_CASE("RenormaliseKept leaves the selector's weights to the balancers",
          "[moe][capacity][renormalise_kept]") {
  const Matrix<double> logits = test::random_matrix(20, 4, 3);
  Routing<double> routing = test::route(SoftmaxTopK<double>({.k = 2}), logits);
  const ImportanceLoss<double> importance({.coefficient = 0.3});
  test::limit(FixedCapacity({.capacity = 4}), routing);
  const double expected = test::loss_of(importance, routing);
  test::limit(RenormaliseKept(Dropless()), routing);
  CHECK(routing.applied != routing.weight);
  CHECK(test::loss_of(importance, routing) == expected);
}

TEST_CASE("RenormaliseKept has a constant divisor below epsilon",
          "[moe][capacity][renormalise_kept][gradient]") {
  // Logits so far apart that the third expert, the only one kept, weighs some exp(-37), a third of
  // epsilon.
  Matrix<double> logits(1, 3);
  logits << 0.0, -1.0, -37.0;
  struct KeepsTheThird : CapacityBase {
    void forward(const Pass& /*pass*/, Routing<double>& routing, Cache<double>& /*cache*/) const {
      routing.kept = {0, 0, 1};
    }
  };
  Limited limited{SoftmaxTopK<double>({.k = 3}),
                  RenormaliseKept(KeepsTheThird(), {.epsilon = 2.2e-16})};
  limited.forward(logits);
  Matrix<double> d_applied = Matrix<double>::Zero(1, 3);
  d_applied(0, 2) = 1.0;
  const Matrix<double> d_logits = limited.backward(d_applied);
  const Matrix<double> numeric =
      test::numeric_gradient(logits, [&] { return limited.forward(logits).applied[2]; });
  CHECK(numeric.norm() > 0.1);
  CHECK(test::relative_error(d_logits, numeric) < 1e-6);
}

TEST_CASE("RenormaliseKept leaves nothing behind for another pass",
          "[moe][capacity][renormalise_kept]") {
  Rng rng(1);
  MoELayer layer(LinearRouter<double>(4, 4, rng, {.init_scale = 5.0}),
                 SoftmaxTopK<double>({.k = 3}), RenormaliseKept(FixedCapacity({.capacity = 3})),
                 GluBank<double>(4, 4, 3, rng));
  const Matrix<double> x = test::random_matrix(8, 4, 2);
  const Matrix<double> dy = test::random_matrix(8, 4, 3);
  decltype(layer)::Cache cache;
  layer.forward(x, kTraining, cache);
  const Matrix<double> once = layer.backward(dy, cache);
  layer.forward(x, kTraining, cache);
  CHECK(layer.backward(dy, cache) == once);
  cache.routing.begin("Test", Matrix<double>::Zero(2, 4), {});
  CHECK(cache.routing.applied.empty());
}

TEST_CASE("RenormaliseKept knows padding and no tokens", "[moe][capacity][renormalise_kept]") {
  const std::vector<std::uint8_t> mask = {0, 1};
  Limited limited{SoftmaxTopK<double>({.k = 2}), RenormaliseKept(Dropless())};
  limited.forward(test::random_matrix(2, 3, 1), {.mask = mask});
  CHECK(limited.routing.applied[0] + limited.routing.applied[1] == Approx(1.0));
  CHECK(limited.forward(Matrix<double>(0, 3)).applied.empty());
  CHECK(limited.backward(Matrix<double>(1, 0)).rows() == 0);
}

TEST_CASE("RenormaliseKept is the same for any number of threads and allocates nothing",
          "[moe][capacity][renormalise_kept]") {
  const Matrix<double> logits = test::random_matrix(3000, 8, 1);
  const Matrix<double> d_applied = RowVector<double>::LinSpaced(9000, -1.0, 2.0);
  Limited limited{SoftmaxTopK<double>({.k = 3}),
                  RenormaliseKept(CapacityFactor({.evaluate = 0.7}))};
  const auto run = [&] {
    limited.forward(logits);
    limited.backward(d_applied);
  };
  run();
  if (test::allocations_are_counted()) CHECK(test::count_allocations(run) == 0);
  const List<double> applied = limited.routing.applied;
  const Matrix<double> d_logits = limited.gradient.logits;
  const test::Threads threads(3);
  run();
  CHECK(limited.routing.applied == applied);
  CHECK(limited.gradient.logits == d_logits);
}

TEST_CASE("CapacityWrapper does what the policy inside does", "[moe][capacity][renormalise_kept]") {
  struct Around : CapacityWrapper<AdaptiveCapacity<double>> {
    using Scalar = double;
    explicit Around(AdaptiveCapacity<double> inner) : CapacityWrapper(std::move(inner)) {}
  };
  static_assert(CapacityPolicy<Around, double>);
  const AdaptiveCapacity<double> inner(
      {.initial = 1.0, .tolerated = 0.0, .rate = 1.0, .minimum = 0});
  Around around(inner);
  const Matrix<double> logits = test::random_matrix(20, 4, 3);
  Routing<double> expected = test::route(SoftmaxTopK<double>({.k = 2}), logits);
  Routing<double> routing = expected;
  test::limit(inner, expected);
  test::limit(around, routing);
  CHECK(routing.kept == expected.kept);
  around.observe(routing);
  update(around);
  CHECK(around.inner().factor() > 1.0);
  REQUIRE(buffers(around).size() == 1);
  CHECK(buffers(around)[0].name == "factor");
  buffers(around)[0].buffer->value(0, 0) = 9.0;
  CHECK(test::message_of<ConfigError>([&] { around.check(); }) ==
        "AdaptiveCapacity: factor = 9, expected 1 <= factor <= 4");

  // And backward: through a RenormaliseKept inside.
  struct AroundKept : CapacityWrapper<RenormaliseKept<Dropless>> {
    AroundKept() : CapacityWrapper(RenormaliseKept(Dropless())) {}
  };
  Limited wrapped{SoftmaxTopK<double>({.k = 2}), AroundKept()};
  Limited plain{SoftmaxTopK<double>({.k = 2}), RenormaliseKept(Dropless())};
  plain.forward(logits);
  wrapped.forward(logits);
  const Matrix<double> d_applied = test::random_matrix(1, 40, 4);
  CHECK(wrapped.backward(d_applied) == plain.backward(d_applied));
}

TEST_CASE("RenormaliseKept names the setting that is wrong", "[moe][capacity][renormalise_kept]") {
  CHECK(test::message_of<ConfigError>([] { RenormaliseKept(Dropless(), {.scale = 0.0}); }) ==
        "RenormaliseKept: scale = 0, expected a finite number > 0");
  RenormaliseKept policy(AdaptiveCapacity<double>{});
  policy.check();
  buffers(policy.inner())[0].buffer->value(0, 0) = 0.0;
  CHECK(test::message_of<ConfigError>([&] { policy.check(); }) ==
        "AdaptiveCapacity: factor = 0, expected 1 <= factor <= 4");
}

}  // namespace weir::renormalise_kept_test
