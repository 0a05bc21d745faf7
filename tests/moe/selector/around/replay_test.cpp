// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/around/replay.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/relaxed_top_k.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/sinkhorn.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/straight_through.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/moe/selector/top_p.hpp>

#include "moe/selector/selected.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::replay_test {

static_assert(Selector<Replay<SoftmaxTopK<float>>, float>);
static_assert(BiasedSelector<Replay<SigmoidTopK<float>>>);
static_assert(ImposableSelector<StraightThrough<float>>);
static_assert(ImposableSelector<RelaxedTopK<float>>);
static_assert(!ImposableSelector<TopP<float>>);
static_assert(Replay<BiasedSoftmaxTopK<float>>::kBiasesLogits);
static_assert(!Replay<SigmoidTopK<float>>::kBiasesLogits);

namespace {

/// A selector that makes weights which are no numbers of a choice that is not its own.
struct MakesNan : SoftmaxTopK<double> {
  using SoftmaxTopK<double>::SoftmaxTopK;
  void forward_imposed(MatrixIn<double> logits, const Pass& pass, const RoutingTrace& imposed,
                       Routing<double>& routing, Cache& cache) const {
    SoftmaxTopK<double>::forward_imposed(logits, pass, imposed, routing, cache);
    routing.weight[1] = std::numeric_limits<double>::quiet_NaN();
  }
};

constexpr Index kExperts = 6;

/// Calls `body(selector)` for each selector of two experts that takes an imposed choice.
template <class Body>
void for_each_selector(Body&& body) {
  const auto run = [&](const std::string& name, const auto& selector) {
    INFO(name);
    body(selector);
  };
  const GroupLimit groups{.count = 3, .allowed = 2};
  run("softmax", SoftmaxTopK<double>({.k = 2, .scale = 3.0}));
  run("softmax, renormalised", SoftmaxTopK<double>({.k = 2, .renormalise = true}));
  run("softmax, norm 3", SoftmaxTopK<double>({.k = 2, .renormalise = true, .norm = 3.0}));
  run("softmax, groups", SoftmaxTopK<double>({.k = 2, .groups = groups}));
  run("top-k softmax", TopKSoftmax<double>({.k = 2}));
  run("top-k softmax, groups", TopKSoftmax<double>({.k = 2, .groups = groups}));
  run("sinkhorn", Sinkhorn<double>({.k = 2}));
  SigmoidTopK<double> sigmoid(kExperts, {.k = 2, .groups = groups});
  sigmoid.selection_bias().value = 0.3 * test::random_matrix(1, kExperts, 99);
  run("sigmoid, biased", sigmoid);
  run("sigmoid, raw", SigmoidTopK<double>(kExperts, {.k = 2, .renormalise = false}));
  BiasedSoftmaxTopK<double> biased(kExperts);
  biased.selection_bias().value = 0.3 * test::random_matrix(1, kExperts, 98);
  run("biased softmax", biased);
  run("relaxed", RelaxedTopK<double>({.k = 2, .descent = {.epsilon = 0.3}}));
}

RoutingTrace trace_of(const Routing<double>& routing) {
  RoutingTrace trace;
  trace.record(routing);
  return trace;
}

template <class S>
Replay<S> replay(const S& inner, RoutingTrace trace, ReplayConfig config = {}) {
  Replay<S> result(inner, config);
  result.impose(std::move(trace));
  return result;
}

/// The experts of a token, in ascending order.
template <class R>
List<Index> experts_of(const R& routing, const List<Index>& expert, Index t) {
  List<Index> result;
  result.assign(expert.begin() + routing.first(t), expert.begin() + routing.last(t));
  std::sort(result.begin(), result.end());
  return result;
}

GluBank<double> bank() {
  Rng rng(2);
  return GluBank<double>(4, kExperts, 3, rng);
}

LinearRouter<double> router(std::uint64_t seed) {
  return LinearRouter<double>(2.0 * test::random_matrix(kExperts, 4, seed));
}

}  // namespace

TEST_CASE("A trace holds who went where", "[moe][replay]") {
  Matrix<double> logits(2, 3);
  logits << 0.0, 2.0, 1.0, 3.0, 0.0, 1.0;
  Routing<double> routing = test::route(TopKSoftmax<double>({.k = 2}), logits);
  routing.kept[1] = 0;
  const RoutingTrace trace = trace_of(routing);
  CHECK(trace.tokens() == 2);
  CHECK(trace.experts() == 3);
  CHECK(trace.assignments() == 4);
  CHECK(trace.experts_chosen() == std::vector<Index>{1, 2, 0, 2});
  CHECK(trace.kept(0));
  CHECK(!trace.kept(1));
  CHECK(trace == RoutingTrace(3, {0, 2, 4}, {1, 2, 0, 2}, {1, 0, 1, 1}));
  CHECK(RoutingTrace().tokens() == 0);
}

TEST_CASE("A new trace has no tokens and no experts", "[moe][replay]") {
  const RoutingTrace none;
  CHECK(none.tokens() == 0);
  CHECK(none.experts() == 0);
  CHECK(none.assignments() == 0);
  CHECK(none.offsets() == List<Index>{0});
}

TEST_CASE("Replaying a pass's own trace gives the same bits", "[moe][replay]") {
  for_each_selector([](const auto& selector) {
    const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1};
    for (const std::uint64_t seed : {1u, 2u, 3u}) {
      for (const bool training : {false, true}) {
        Pass pass;
        pass.mask = mask;
        pass.training = training;
        Matrix<double> logits = test::random_matrix(7, kExperts, seed);
        logits.row(4).setConstant(0.5);  // Ties.
        const Routing<double> expected = test::route(selector, logits, pass);
        const Routing<double> routing =
            test::route(replay(selector, trace_of(expected)), logits, pass);
        CHECK(routing.offsets == expected.offsets);
        CHECK(routing.expert == expected.expert);
        CHECK(routing.weight == expected.weight);
        CHECK(routing.probabilities == expected.probabilities);
        CHECK(routing.kept == expected.kept);
      }
    }
  });
}

TEST_CASE("A trace imposed on other logits keeps the choice", "[moe][replay]") {
  for_each_selector([](const auto& selector) {
    const RoutingTrace trace = trace_of(test::route(selector, test::random_matrix(9, kExperts, 1)));
    const Matrix<double> logits = test::random_matrix(9, kExperts, 2);
    const auto imposed = replay(selector, trace);
    const Routing<double> routing = test::route(imposed, logits);
    CHECK(routing.offsets == trace.offsets());
    CHECK(routing.probabilities == test::route(selector, logits).probabilities);
    for (Index t = 0; t < 9; ++t) {
      CHECK(experts_of(routing, routing.expert, t) == experts_of(trace, trace.experts_chosen(), t));
    }
    CHECK(routing.expert != test::route(selector, logits).expert);
    const test::Threads threads(3);
    CHECK(test::route(imposed, logits).weight == routing.weight);
  });
}

TEST_CASE("Replayed weights match those worked out by hand", "[moe][replay]") {
  // exp(z) = (1, 2, 3, 4); the trace has experts 0 and 1, neither of them a best one.
  Matrix<double> logits(1, 4);
  logits << 0.0, std::log(2.0), std::log(3.0), std::log(4.0);
  const RoutingTrace trace(4, {0, 2}, {0, 1});
  const auto check = [&](const auto& selector, double of_1, double of_0) {
    const Routing<double> routing = test::route(replay(selector, trace), logits);
    CHECK(routing.expert == std::vector<Index>{1, 0});
    CHECK(routing.weight[0] == Approx(of_1));
    CHECK(routing.weight[1] == Approx(of_0));
    CHECK(routing.probabilities.row(0).sum() == Approx(1.0));
  };
  check(SoftmaxTopK<double>({.k = 2}), 0.2, 0.1);
  check(SoftmaxTopK<double>({.k = 2, .renormalise = true}), 2.0 / 3.0, 1.0 / 3.0);
  check(TopKSoftmax<double>({.k = 2}), 2.0 / 3.0, 1.0 / 3.0);
  check(BiasedSoftmaxTopK<double>(4), 0.2, 0.1);
  check(Sinkhorn<double>({.k = 2}), 0.2, 0.1);
  // Sigmoids 2/3 and 1/2.
  check(SigmoidTopK<double>(4, {.renormalise = false}), 2.0 / 3.0, 0.5);
  check(SigmoidTopK<double>(4), 4.0 / 7.0, 3.0 / 7.0);
  // Not in the group that the logits would have chosen.
  check(SoftmaxTopK<double>({.k = 2, .groups = {.count = 2}}), 0.2, 0.1);
}

TEST_CASE("Replay has the exact gradient of an imposed choice", "[moe][replay][gradient]") {
  for_each_selector([](const auto& selector) {
    const auto imposed =
        replay(selector, trace_of(test::route(selector, test::random_matrix(5, kExperts, 1))));
    test::check_selector_gradient(imposed, test::random_matrix(5, kExperts, 3));
  });
}

TEST_CASE("A choice imposed on StraightThrough has its hard weights and its soft gradient",
          "[moe][replay][gradient]") {
  const StraightThroughConfig config{.k = 2, .renormalise = true, .scale = 3.0};
  const SoftmaxTopK<double> soft({.k = 2, .renormalise = true, .scale = 3.0});
  const Matrix<double> logits = test::random_matrix(5, kExperts, 3);
  const RoutingTrace trace = trace_of(test::route(soft, test::random_matrix(5, kExperts, 1)));
  const auto hard_replay = replay(StraightThrough<double>(config), trace);
  const auto soft_replay = replay(soft, trace);
  auto hard = test::select(hard_replay, logits);
  auto expected = test::select(soft_replay, logits);
  CHECK(hard.routing.expert == expected.routing.expert);
  CHECK(hard.routing.weight == List<double>(10, 1.5));
  const auto objective = test::RoutingObjective<double>::random(hard.routing, 4);
  CHECK(objective.logit_gradient(hard_replay, hard) ==
        objective.logit_gradient(soft_replay, expected));
}

TEST_CASE("A layer replays what another one chose and dropped", "[moe][replay]") {
  const auto layer = [](std::uint64_t seed) {
    return MoELayer(router(seed), Replay(TopKSoftmax<double>({.k = 2})),
                    FixedCapacity({.capacity = 2}), bank(),
                    SwitchLoss<double>({.coefficient = 0.1}), ZLoss<double>({.coefficient = 0.1}));
  };
  auto before = layer(1);
  auto after = layer(2);
  const Matrix<double> x = test::random_matrix(9, 4, 3);
  typename decltype(before)::Cache cache;
  const Matrix<double> y = before.forward(x, kTraining, cache);
  const RoutingTrace trace = trace_of(cache.routing);
  REQUIRE(std::count(trace.all_kept().begin(), trace.all_kept().end(), 0) > 0);
  const Matrix<double> dx = before.backward(x, cache);

  before.selector().impose(trace);
  CHECK(before.forward(x, kTraining, cache) == y);
  CHECK(cache.routing.kept == trace.all_kept());
  CHECK(before.backward(x, cache) == dx);

  after.selector().impose(trace);
  after.forward(x, kTraining, cache);
  for (Index t = 0; t < 9; ++t) {
    for (Index a = trace.first(t); a < trace.last(t); ++a) {
      const auto begin = cache.routing.expert.begin() + cache.routing.first(t);
      const auto found = std::find(begin, begin + 2, trace.expert(a));
      REQUIRE(found != begin + 2);
      const Index i = found - cache.routing.expert.begin();
      CHECK((cache.routing.kept[i] != 0) == trace.kept(a));
    }
  }
  test::check_gradients(after, x);

  after.selector().release();
  const auto unimposed = layer(2);
  typename decltype(after)::Cache own;
  CHECK(after.forward(x, kTraining, cache) == unimposed.forward(x, kTraining, own));
}

TEST_CASE("Replay can leave drops to the capacity", "[moe][replay]") {
  const RoutingTrace trace(3, {0, 1, 2}, {2, 0}, {0, 1});
  const Matrix<double> logits = test::random_matrix(2, 3, 1);
  const SoftmaxTopK<double> inner({.k = 1});
  CHECK(test::route(replay(inner, trace), logits).kept == std::vector<std::uint8_t>{0, 1});
  CHECK(test::route(replay(inner, trace, {.kept = false}), logits).kept ==
        std::vector<std::uint8_t>{1, 1});
}

TEST_CASE("Replay allocates nothing once it is warm", "[moe][replay]") {
  const Matrix<double> logits = test::random_matrix(9, kExperts, 1);
  const SoftmaxTopK<double> inner({.k = 2});
  const Routing<double> routing = test::route(inner, logits);
  RoutingTrace trace = trace_of(routing);
  CHECK(test::count_step_allocations(replay(inner, trace), logits) == 0);
  CHECK(test::count_allocations([&] { trace.record(routing); }) == 0);
}

TEST_CASE("Replay's buffers are those of the inner selector", "[moe][replay]") {
  Replay selector{SigmoidTopK<double>(4)};
  const auto named = buffers(selector);
  REQUIRE(named.size() == 1);
  CHECK(named[0].name == "bias");
  CHECK(named[0].buffer == &selector.selection_bias());
}

TEST_CASE("Replay names what does not fit", "[moe][replay]") {
  const Matrix<double> logits = test::random_matrix(2, 4, 1);
  const SoftmaxTopK<double> inner({.k = 2});
  const RoutingTrace trace(4, {0, 2, 4}, {0, 1, 2, 3});
  const auto shape = [&](const RoutingTrace& imposed) {
    return test::message_of<ShapeError>([&] { test::route(replay(inner, imposed), logits); });
  };
  CHECK(shape(trace) == "no exception");
  CHECK(shape(RoutingTrace()) == "Replay: the trace has 0 tokens, expected 2");
  CHECK(shape(RoutingTrace(4, {0, 2, 4, 6}, {0, 1, 0, 1, 0, 1})) ==
        "Replay: the trace has 3 tokens, expected 2");
  CHECK(shape(RoutingTrace(5, {0, 2, 4}, {0, 1, 2, 3})) ==
        "Replay: the trace has 5 experts, expected 4");

  const auto config = [&](const RoutingTrace& imposed, const Pass& pass = {}) {
    return test::message_of<ConfigError>(
        [&] { test::route(replay(inner, imposed), logits, pass); });
  };
  CHECK(config(RoutingTrace(4, {0, 2, 3}, {0, 1, 2})) ==
        "Replay: token 1 has 1 experts in the trace, expected k = 2");
  CHECK(config(RoutingTrace(4, {0, 0, 2}, {0, 1})) ==
        "Replay: token 0 has 0 experts in the trace, expected k = 2");
  const std::vector<std::uint8_t> mask = {1, 0};
  Pass padded;
  padded.mask = mask;
  CHECK(config(trace, padded) ==
        "Replay: token 1 has 2 experts in the trace, expected none for "
        "padding");
  const std::vector<std::uint8_t> allowed = {1, 1, 1, 0};
  Pass restricted;
  restricted.allowed = allowed;
  CHECK(config(trace, restricted) ==
        "Replay: token 1 has expert 3 in the trace, expected one that pass.allowed allows");
  CHECK(test::message_of<ConfigError>([&] {
          replay(SoftmaxTopK<double>({.k = 5}), trace).check(4);
        }) == "SoftmaxTopK: k = 5, expected 1 <= k <= experts = 4");

  const auto imposed = replay(inner, trace);
  test::Selected<Replay<SoftmaxTopK<double>>> selected;
  CHECK_THROWS_AS(imposed.forward(logits, padded, selected.routing, selected.cache), ConfigError);
  imposed.forward(logits, {}, selected.routing, selected.cache);  // As if nothing had been.
  CHECK(selected.routing.assignments() == 4);

  Matrix<double> apart(1, 4);
  apart << 0.0, 0.0, 2000.0, 0.0;
  const RoutingTrace others(4, {0, 2}, {0, 1});  // Their probabilities are 0 to rounding.
  CHECK(test::route(replay(SoftmaxTopK<double>({.k = 2, .renormalise = true}), others), apart)
            .weight == std::vector<double>{0.5, 0.5});
  CHECK(test::message_of<NonFiniteError>([&] {
          test::route(replay(MakesNan({.k = 2}), others), apart);
        }) == "Replay: the weight of token 0 for expert 1 is nan, expected a finite number");
}

TEST_CASE("A trace names what is wrong with it", "[moe][replay]") {
  const auto message = [](Index experts, List<Index> offsets, List<Index> expert,
                          List<std::uint8_t> kept = {}) {
    return test::message_of<ConfigError>(
        [&] { RoutingTrace(experts, std::move(offsets), std::move(expert), std::move(kept)); });
  };
  CHECK(message(0, {0}, {}) == "RoutingTrace: experts = 0, expected >= 1");
  const std::string ascend = "RoutingTrace: the offsets do not ascend from 0 to the 2 assignments";
  CHECK(message(3, {}, {0, 1}) == ascend);
  CHECK(message(3, {0, 1}, {0, 1}) == ascend);
  CHECK(message(3, {1, 2}, {0, 1}) == ascend);
  CHECK(message(3, {0, 3, 1, 2}, {0, 1}) == ascend);
  CHECK(message(3, {0, 2}, {0, 1}, {1}) ==
        "RoutingTrace: kept has 1 entries, expected 2 (one per assignment)");
  CHECK(message(3, {0, 2}, {0, 3}) ==
        "RoutingTrace: token 0 has expert 3, expected 0 <= expert < experts = 3");
  CHECK(message(3, {0, 2}, {-1, 1}) ==
        "RoutingTrace: token 0 has expert -1, expected 0 <= expert < experts = 3");
  CHECK(message(3, {0, 1, 3}, {1, 1, 1}) ==
        "RoutingTrace: token 1 has expert 1 twice, expected it once");
  CHECK(message(3, {0, 1, 2}, {1, 1}) == "no exception");
}

}  // namespace weir::replay_test
