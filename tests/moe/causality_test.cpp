// SPDX-License-Identifier: MIT
// What an earlier token's output depends on: every selector, router, capacity policy and layer does
// what its comment says, which is nothing where it names no other token.
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/decoding.hpp>
#include <weir/moe/beside/residual_moe.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/adaptive_capacity.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/device_capacity.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/dynamic_capacity.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/depths/mixture_of_depths.hpp>
#include <weir/moe/depths/token_predictor.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/output_masking.hpp>
#include <weir/moe/experts/pass_dropped.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/cosine_router.hpp>
#include <weir/moe/router/d_select_k_router.hpp>
#include <weir/moe/router/gumbel_router.hpp>
#include <weir/moe/router/hash_router.hpp>
#include <weir/moe/router/hash_tables.hpp>
#include <weir/moe/router/hierarchical_router.hpp>
#include <weir/moe/router/input_dropout_router.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/router/temperature_router.hpp>
#include <weir/moe/selector/around/rank_policy.hpp>
#include <weir/moe/selector/around/replay.hpp>
#include <weir/moe/selector/around/sampled_choice.hpp>
#include <weir/moe/selector/balanced_assignment.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/expert_choice.hpp>
#include <weir/moe/selector/hierarchical_top_k.hpp>
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

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::causality_test {

namespace {

constexpr Index kModel = 3;
constexpr Index kExperts = 4;
constexpr Index kEarlier = 6;
constexpr Index kCount = 10;

/// What of the later tokens an earlier one's output depends on.
enum class Sees {
  kNothing,
  kNumber,  ///< How many they are, not what they are.
  kContent,
};

/// By many random inputs, the later tokens of which are replaced, and left out. Random draws are
/// the same in all passes. Whether an expert has few rows or many makes a difference to rounding.
template <class L>
Sees what_is_seen(const L& layer, bool training) {
  Rng rng(1);
  Sees seen = Sees::kNothing;
  for (int trial = 0; trial < 40; ++trial) {
    std::vector<Index> ids;
    for (Index t = 0; t < kCount; ++t) ids.push_back(rng.below(20));
    Matrix<double> x = normal_init<double>(kCount, kModel, 1.0, rng);
    const auto earlier = [&](Index tokens) {
      Rng draws(static_cast<std::uint64_t>(trial));
      const Pass pass{.training = training,
                      .token_ids = std::span(ids).first(static_cast<std::size_t>(tokens)),
                      .rng = &draws};
      return Matrix<double>(infer(layer, x.topRows(tokens), pass).topRows(kEarlier));
    };
    const Matrix<double> expected = earlier(kCount);
    const auto differs = [&](const Matrix<double>& y) {
      return test::relative_error(y, expected) > 1e-12;
    };
    if (differs(earlier(kEarlier))) seen = std::max(seen, Sees::kNumber);
    for (Index t = kEarlier; t < kCount; ++t) ids[static_cast<std::size_t>(t)] = rng.below(20);
    x.bottomRows(kCount - kEarlier) = normal_init<double>(kCount - kEarlier, kModel, 1.0, rng);
    if (differs(earlier(kCount))) return Sees::kContent;
  }
  return seen;
}

LinearRouter<double> router() {
  return LinearRouter<double>(2.0 * test::random_matrix(kExperts, kModel, 1));
}

GluBank<double> bank() {
  Rng rng(2);
  return GluBank<double>(kModel, kExperts, 2, rng);
}

template <class R, class S, class C, class B>
auto layer(R router, S selector, C capacity, B bank) {
  return MoELayer(std::move(router), std::move(selector), std::move(capacity), std::move(bank));
}

template <class R, class S, class C>
auto layer(R router, S selector, C capacity) {
  return layer(std::move(router), std::move(selector), std::move(capacity), bank());
}

template <class S>
Sees seen_by_selector(S selector, bool training) {
  return what_is_seen(layer(router(), std::move(selector), Dropless()), training);
}

template <class R>
Sees seen_by_router(R router, bool training) {
  return what_is_seen(layer(std::move(router), SoftmaxTopK<double>({.k = 2}), Dropless()),
                      training);
}

template <class C, class B>
Sees seen_by_capacity(C capacity, Index k, bool training, B bank) {
  const SoftmaxTopK<double> selector({.k = k});
  return what_is_seen(layer(router(), selector, std::move(capacity), std::move(bank)), training);
}

template <class C>
Sees seen_by_capacity(C capacity, Index k, bool training = false) {
  return seen_by_capacity(std::move(capacity), k, training, bank());
}

/// A layer whose forward pass is a `decode` of all tokens at once.
template <class L>
struct Decoded {
  using Scalar = double;
  using Cache = typename L::Cache;
  const Matrix<double>& forward(MatrixIn<double> x, const Pass& /*pass*/, Cache& cache) const {
    typename L::State state;
    return decode(layer, x, state, cache);
  }
  const Matrix<double>& backward(MatrixIn<double> dy, Cache& cache) {
    return layer.backward(dy, cache);
  }
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.layer);
  }

  L layer;
};

constexpr DropOrder kOrders[] = {DropOrder::kRankMajor,           DropOrder::kTokenMajor,
                                 DropOrder::kProbability,         DropOrder::kBatchPrioritised,
                                 DropOrder::kBatchPrioritisedSum, DropOrder::kRandom};

/// What DropOrder says of an order, in training, where the capacity itself depends on nothing.
Sees seen_by_order(DropOrder order, Index k) {
  const bool causal = order == DropOrder::kTokenMajor || (order == DropOrder::kRankMajor && k == 1);
  return causal ? Sees::kNothing : Sees::kContent;
}

/// The same where the capacity depends on the number of tokens.
Sees seen_with_number(DropOrder order, Index k) {
  return std::max(seen_by_order(order, k), Sees::kNumber);
}

}  // namespace

TEST_CASE("Selectors that look at one token are causal", "[moe][causality]") {
  const bool training = GENERATE(false, true);
  const auto check = [&](auto selector) {
    CHECK(seen_by_selector(std::move(selector), training) == Sees::kNothing);
  };
  check(SoftmaxTopK<double>({.k = 2}));
  check(SoftmaxTopK<double>({.k = 2, .groups = {.count = 2, .allowed = 1}}));
  check(TopKSoftmax<double>({.k = 2}));
  check(SigmoidTopK<double>(kExperts, {.k = 2}));
  check(BiasedSoftmaxTopK<double>(kExperts, {.k = 2}));
  check(Threshold<double>({.k = 3, .threshold = 0.2}));
  check(TopP<double>({.threshold = 0.6}));
  check(ReluRouting<double>());
  check(SparseMixer<double>());
  check(StraightThrough<double>({.k = 2}));
  check(StraightThrough<double>({.k = 2, .renormalise = true}));
  check(RelaxedTopK<double>({.k = 2, .descent = {.epsilon = 0.1}}));
  check(RelaxedTopK<double>({.k = 2, .weight = RelaxedWeight::kStraightThrough}));
  check(SampledChoice(SoftmaxTopK<double>({.k = 2})));
  check(SampledChoice(TopKSoftmax<double>({.k = 2}), {.certain = 1, .evaluate = true}));
  check(HierarchicalTopK<double>({.groups = 2}));
  check(RankPolicy(SoftmaxTopK<double>({.k = 2})));
  check(Replay(SoftmaxTopK<double>({.k = 2})));
}

TEST_CASE("Selectors that look at the batch are not causal", "[moe][causality]") {
  for (const bool training : {false, true}) {
    CHECK(seen_by_selector(ExpertChoice<double>(), training) == Sees::kContent);
    CHECK(seen_by_selector(ExpertChoice<double>({.over = ScoresOver::kTokens}), training) ==
          Sees::kContent);
  }
  CHECK(seen_by_selector(Sinkhorn<double>(), true) == Sees::kContent);
  CHECK(seen_by_selector(Sinkhorn<double>(), false) == Sees::kNothing);
  CHECK(seen_by_selector(BalancedAssignment<double>(), true) == Sees::kContent);
  CHECK(seen_by_selector(BalancedAssignment<double>(), false) == Sees::kNothing);
}

TEST_CASE("Replay of a trace is causal if the trace is", "[moe][causality]") {
  // One trace for all inputs; the later tokens can only be replaced, not left out.
  auto moe = layer(router(), Replay(SoftmaxTopK<double>({.k = 2})), Dropless());
  Matrix<double> x = test::random_matrix(kCount, kModel, 3);
  decltype(moe)::Cache cache;
  moe.forward(x, {}, cache);
  RoutingTrace trace;
  trace.record(cache.routing);
  moe.selector().impose(trace);
  x = test::random_matrix(kCount, kModel, 4);
  const Matrix<double> expected = infer(moe, x).topRows(kEarlier);
  x.bottomRows(kCount - kEarlier) = test::random_matrix(kCount - kEarlier, kModel, 5);
  CHECK(test::relative_error(infer(moe, x).topRows(kEarlier), expected) <= 1e-12);
}

TEST_CASE("Routers are causal, whatever they draw", "[moe][causality]") {
  const bool training = GENERATE(false, true);
  const auto check = [&](auto router) {
    CHECK(seen_by_router(std::move(router), training) == Sees::kNothing);
  };
  Rng rng(3);
  const Matrix<double> weight = test::random_matrix(kExperts, kModel, 4);
  check(router());
  check(CosineRouter<double>(kModel, kExperts, rng, {.d_projection = 4}));
  check(NoisyRouter<double>(weight, weight));
  check(JitterRouter(router(), {.epsilon = 0.5}));
  check(InputDropoutRouter(router(), {.rate = 0.5}));
  check(TemperatureRouter(router(), {.start = 2.0}));
  check(GumbelRouter(router()));
  check(HashRouter<double>(kModel, kExperts, modulo_hash_table(20, kExperts)));
  check(HierarchicalRouter(NoisyRouter<double>(weight.topRows(2), weight.topRows(2)), router()));
  const DSelectKRouter<double> selectors(kModel, kExperts, rng);
  check(selectors);
  CHECK(what_is_seen(layer(selectors, ReluRouting<double>(), Dropless()), training) ==
        Sees::kNothing);
}

TEST_CASE("Capacities that depend on nothing are as causal as their order", "[moe][causality]") {
  for (const Index k : {1, 2}) {
    CHECK(seen_by_capacity(Dropless(), k) == Sees::kNothing);
    for (const DropOrder order : kOrders) {
      INFO("k " << k << ", order " << static_cast<int>(order));
      const Sees expected = seen_by_order(order, k);
      const FixedCapacity fixed({.capacity = 2, .order = order});
      CHECK(seen_by_capacity(fixed, k, true) == expected);
      CHECK(seen_by_capacity(fixed, k, true, PassDropped(bank())) == expected);
      CHECK(seen_by_capacity(fixed, k, true, OutputMasking(bank())) == expected);
      if (k == 1) continue;  // One weight that always is 1.
      CHECK(seen_by_capacity(RenormaliseKept(fixed), k, true) == expected);
      CHECK(seen_by_capacity(RenormaliseKept(fixed), k, true, PassDropped(bank())) == expected);
    }
    // In evaluation nothing is drawn.
    CHECK(seen_by_capacity(FixedCapacity({.capacity = 2, .order = DropOrder::kRandom}), k) ==
          seen_by_order(DropOrder::kRankMajor, k));
    CHECK(seen_by_capacity(DynamicCapacity({.factor = 0.0}), k) == Sees::kNothing);
  }
}

TEST_CASE("Capacities in proportion to the tokens depend on their number", "[moe][causality]") {
  for (const Index k : {1, 2}) {
    for (const DropOrder order : kOrders) {
      INFO("k " << k << ", order " << static_cast<int>(order));
      const Sees expected = seen_with_number(order, k);
      CHECK(seen_by_capacity(CapacityFactor({.train = 1.0, .minimum = 0, .order = order}), k,
                             true) == expected);
      CHECK(seen_by_capacity(DynamicCapacity({.factor = 1.0, .order = order}), k, true) ==
            expected);
      CHECK(seen_by_capacity(DynamicCapacity({.factor = -1.0, .order = order}), k, true) ==
            expected);
      CHECK(
          seen_by_capacity(AdaptiveCapacity<double>({.initial = 1.0, .minimum = 0, .order = order}),
                           k, true) == expected);
    }
    const DeviceCapacity device({.devices = 2, .protected_share = 0.0});
    CHECK(seen_by_capacity(device, k, true) == Sees::kContent);
    CHECK(seen_by_capacity(device, k, false) == Sees::kNothing);
  }
}

TEST_CASE("Layers around a mixture of experts are as causal as it is", "[moe][causality]") {
  Rng rng(4);
  const Linear<double> dense(kModel, kModel, rng);
  const Linear<double> mix(kModel, 2, rng);
  const auto check = [&](auto capacity, Sees expected) {
    const auto moe = layer(router(), SoftmaxTopK<double>({.k = 2}), capacity);
    CHECK(what_is_seen(moe, false) == expected);
    CHECK(what_is_seen(SharedExperts(moe, dense), false) == expected);
    CHECK(what_is_seen(ResidualMoE(moe, dense, mix), false) == expected);
  };
  check(Dropless(), Sees::kNothing);
  check(FixedCapacity({.capacity = 2, .order = DropOrder::kTokenMajor}), Sees::kNothing);
  check(FixedCapacity({.capacity = 2, .order = DropOrder::kRankMajor}), Sees::kContent);
}

TEST_CASE("SoftMoE and MixtureOfDepths look at the whole sequence", "[moe][causality]") {
  Rng rng(5);
  const Linear<double> dense(kModel, kModel, rng);
  for (const bool training : {false, true}) {
    CHECK(what_is_seen(SoftMoE<GluBank<double>>(bank(), rng), training) == Sees::kContent);
    const MixtureOfDepths depths(dense, kModel, rng, {.capacity = 0.5});
    CHECK(what_is_seen(depths, training) == Sees::kContent);
    const MixtureOfDepths sampling(dense, kModel, rng,
                                   {.capacity = 0.5, .causal_evaluation = true});
    CHECK(what_is_seen(sampling, training) == (training ? Sees::kContent : Sees::kNothing));
  }
}

TEST_CASE("Decoding a MixtureOfDepths looks at no later token", "[moe][causality]") {
  Rng rng(7);
  const MixtureOfDepthsConfig config{.capacity = 0.5, .causal_evaluation = true};
  const GroupedQueryAttention<double> attention(
      rng, {.d_model = kModel, .heads = 1, .kv_heads = 1, .head_dim = 2});
  const auto check = [](const auto& layer) {
    using L = std::remove_cvref_t<decltype(layer)>;
    CHECK(what_is_seen(Decoded<L>{layer}, false) == Sees::kNothing);
  };
  check(MixtureOfDepths(Linear<double>(kModel, kModel, rng), kModel, rng, config));
  check(MixtureOfDepths(attention, kModel, rng, config));
  check(MixtureOfDepths(attention, kModel, rng, config, TokenPredictor<double>(kModel, 2, rng)));
  check(MixtureOfDepths(layer(router(), SoftmaxTopK<double>({.k = 2}), Dropless()), kModel, rng,
                        config));
}

TEST_CASE("No token sees another sequence where the scope is the sequence", "[moe][causality]") {
  const Sequences two({kEarlier, kCount - kEarlier});
  const Pass pass{.training = true, .sequences = &two};
  Rng rng(6);
  const auto check = [&](const auto& any) {
    typename std::remove_cvref_t<decltype(any)>::Cache cache;
    Matrix<double> x = test::random_matrix(kCount, kModel, 3);
    const Matrix<double> expected = any.forward(x, pass, cache).topRows(kEarlier);
    x.bottomRows(kCount - kEarlier) = test::random_matrix(kCount - kEarlier, kModel, 5);
    const Matrix<double> actual = any.forward(x, pass, cache).topRows(kEarlier);
    CHECK(test::relative_error(actual, expected) <= 1e-12);
  };
  const auto order = GENERATE(DropOrder::kRankMajor, DropOrder::kProbability,
                              DropOrder::kBatchPrioritised, DropOrder::kBatchPrioritisedSum);
  const SoftmaxTopK<double> selector({.k = 2});
  check(layer(router(), selector, FixedCapacity({.capacity = 2, .order = order})));
  check(layer(
      router(), selector,
      CapacityFactor({.train = 1.0, .minimum = 0, .order = order, .scope = Scope::kSequence})));
  check(layer(router(), selector,
              DynamicCapacity({.factor = 1.0, .order = order, .scope = Scope::kSequence})));
  check(layer(router(), ExpertChoice<double>({.scope = Scope::kSequence}), Dropless()));
  check(SoftMoE<GluBank<double>>(bank(), rng));
  check(MixtureOfDepths(Linear<double>(kModel, kModel, rng), kModel, rng, {.capacity = 0.5}));
}

}  // namespace weir::causality_test
