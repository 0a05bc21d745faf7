// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/hierarchical_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/around/rank_policy.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/hierarchical_top_k.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"

namespace weir::rank_policy_test {

static_assert(Selector<RankPolicy<SoftmaxTopK<float>>, float>);
static_assert(Selector<RankPolicy<SigmoidTopK<float>>, float>);
static_assert(BiasedSelector<RankPolicy<SigmoidTopK<float>>>);
static_assert(!BiasedSelector<RankPolicy<SoftmaxTopK<float>>>);
static_assert(RankPolicy<BiasedSoftmaxTopK<float>>::kBiasesLogits);
static_assert(!RankPolicy<SigmoidTopK<float>>::kBiasesLogits);

namespace {

using Kept = std::vector<std::uint8_t>;

/// Logits whose softmax is `p`.
Matrix<double> logits_of(const Matrix<double>& p) {
  return p.array().log();
}

/// Shares of three chosen experts: 0.6 0.3 0.1, 0.5 0.25 0.25, 0.8 0.15 0.05.
Matrix<double> three_tokens() {
  Matrix<double> p(3, 3);
  p << 0.6, 0.3, 0.1, 0.25, 0.5, 0.25, 0.05, 0.15, 0.8;
  return logits_of(p);
}

Kept kept_of(const RankPolicyConfig& config, const Matrix<double>& logits, Index k,
             const Pass& pass = {}) {
  return test::route(RankPolicy(TopKSoftmax<double>({.k = k}), config), logits, pass).kept;
}

RankPolicyConfig always(RankRule rule, const List<double>& threshold = {0.2}) {
  return {rule, rule, threshold, threshold};
}

}  // namespace

TEST_CASE("RankPolicy keeps all or none of the further experts", "[moe][selector][rank_policy]") {
  const Matrix<double> logits = three_tokens();
  CHECK(kept_of(always(RankRule::kAll), logits, 3) == Kept(9, 1));
  CHECK(kept_of(always(RankRule::kNone), logits, 3) == Kept{1, 0, 0, 1, 0, 0, 1, 0, 0});
  for (const RankRule rule : {RankRule::kAll, RankRule::kNone, RankRule::kThreshold}) {
    CHECK(kept_of(always(rule, {5.0}), logits, 1) == Kept(3, 1));
    CHECK(kept_of(always(rule), Matrix<double>(0, 3), 3).empty());
  }
}

TEST_CASE("RankPolicy keeps what is above a threshold", "[moe][selector][rank_policy]") {
  const Matrix<double> logits = three_tokens();
  CHECK(kept_of(always(RankRule::kThreshold), logits, 3) == Kept{1, 1, 0, 1, 1, 1, 1, 0, 0});
  CHECK(kept_of(always(RankRule::kThreshold, {0.28, 0.07}), logits, 3) ==
        Kept{1, 1, 1, 1, 0, 1, 1, 0, 0});
  CHECK(kept_of(always(RankRule::kThreshold, {0.1, 0.5, 0.0}), logits, 3) ==
        Kept{1, 1, 0, 1, 1, 0, 1, 1, 0});
  // Of the two best, the second ones have the shares 1/3, 1/3 and 3/19.
  CHECK(kept_of(always(RankRule::kThreshold, {0.32}), logits, 2) == Kept{1, 1, 1, 1, 1, 0});
  CHECK(kept_of(always(RankRule::kThreshold, {0.34}), logits, 2) == Kept{1, 0, 1, 0, 1, 0});
}

TEST_CASE("RankPolicy rejects what is just at the threshold", "[moe][selector][rank_policy]") {
  // Two equal logits have shares of exactly 1/2.
  const Matrix<double> logits = Matrix<double>::Zero(1, 2);
  CHECK(kept_of(always(RankRule::kThreshold, {0.5}), logits, 2) == Kept{1, 0});
  CHECK(kept_of(always(RankRule::kThreshold, {std::nextafter(0.5, 0.0)}), logits, 2) == Kept{1, 1});
}

TEST_CASE("RankPolicy takes shares whatever the scale of the weights, or the weights themselves",
          "[moe][selector][rank_policy]") {
  const Matrix<double> logits = three_tokens();
  RankPolicyConfig config = always(RankRule::kThreshold, {0.32});
  const SoftmaxTopK<double> raw({.k = 2});
  const SoftmaxTopK<double> scaled({.k = 2, .scale = 16.0});
  CHECK(test::route(RankPolicy(raw, config), logits).kept == Kept{1, 1, 1, 1, 1, 0});
  CHECK(test::route(RankPolicy(scaled, config), logits).kept == Kept{1, 1, 1, 1, 1, 0});
  config.of_weight = true;
  CHECK(test::route(RankPolicy(raw, config), logits).kept == Kept{1, 0, 1, 0, 1, 0});
  CHECK(test::route(RankPolicy(scaled, config), logits).kept == Kept(6, 1));
}

TEST_CASE("RankPolicy has one rule for training and one for the rest",
          "[moe][selector][rank_policy]") {
  const RankPolicyConfig config{RankRule::kThreshold, RankRule::kThreshold, {0.34}, {0.32}};
  CHECK(kept_of(config, three_tokens(), 2, {.training = true}) == Kept{1, 0, 1, 0, 1, 0});
  CHECK(kept_of(config, three_tokens(), 2) == Kept{1, 1, 1, 1, 1, 0});
}

TEST_CASE("RankPolicy keeps at random what the draws say", "[moe][selector][rank_policy]") {
  const Matrix<double> logits = three_tokens();
  const auto kept = [&](double threshold, const List<double>& draws) {
    const RankPolicy policy(TopKSoftmax<double>({.k = 2}), always(RankRule::kRandom, {threshold}));
    Routing<double> routing = test::route(policy.inner(), logits);
    policy.reject({}, routing, [&](Index a) { return draws[a]; });
    return routing.kept;
  };
  // GShard: 2 g_2 > u, with g_2 = 1/3, 1/3, 3/19.
  CHECK(kept(0.5, {9.0, 0.66, 9.0, 0.67, 9.0, 0.31}) == Kept{1, 1, 1, 0, 1, 1});
  CHECK(kept(0.5, {9.0, 0.0, 9.0, 0.99, 9.0, 0.32}) == Kept{1, 1, 1, 0, 1, 0});
  // Mesh TensorFlow: u < g_2 / 0.2; the third has 0.789.
  CHECK(kept(0.2, {9.0, 0.99, 9.0, 0.99, 9.0, 0.78}) == Kept{1, 1, 1, 1, 1, 1});
  CHECK(kept(0.2, {9.0, 0.99, 9.0, 0.99, 9.0, 0.80}) == Kept{1, 1, 1, 1, 1, 0});
  CHECK(kept(0.0, {9.0, 0.99, 9.0, 0.99, 9.0, 0.99}) == Kept(6, 1));
}

TEST_CASE("RankPolicy keeps with a chance of share / threshold", "[moe][selector][rank_policy]") {
  // 2000 tokens with the shares 0.9 and 0.1: half of the second ones; four deviations are 0.045.
  Matrix<double> p(1, 2);
  p << 0.9, 0.1;
  const Matrix<double> logits = logits_of(p).replicate(2000, 1);
  Rng rng(5);
  const Pass pass{.training = true, .rng = &rng};
  const auto count = [](const Kept& kept) {
    double sum = 0.0;
    for (const std::uint8_t one : kept) sum += one;
    return sum - 2000.0;
  };
  const Kept once = kept_of({}, logits, 2, pass);
  CHECK(count(once) / 2000.0 == Approx(0.5).margin(0.045));
  CHECK(kept_of({}, logits, 2, pass) != once);
  Rng same(5);
  CHECK(kept_of({}, logits, 2, {.training = true, .rng = &same}) == once);
}

TEST_CASE("RankPolicy decides for each token by itself", "[moe][selector][rank_policy]") {
  Matrix<double> logits = test::random_matrix(12, 5, 6);
  const auto kept = [&] {
    Rng rng(7);
    return kept_of({}, logits, 3, {.training = true, .rng = &rng});
  };
  const Kept before = kept();
  logits.bottomRows(4) = test::random_matrix(4, 5, 8);
  const Kept after = kept();
  CHECK(Kept(before.begin(), before.begin() + 24) == Kept(after.begin(), after.begin() + 24));
}

TEST_CASE("RankPolicy leaves weights alone and gives a rejected one no place",
          "[moe][selector][rank_policy]") {
  const Matrix<double> logits = three_tokens();
  const RankPolicy policy(TopKSoftmax<double>({.k = 2}), always(RankRule::kNone));
  Routing<double> routing = test::route(policy, logits);
  CHECK(routing.weight == test::route(policy.inner(), logits).weight);
  // Experts 0 1, 1 0, 2 1: expert 1 has room for its only first choice.
  test::limit(FixedCapacity({.capacity = 1, .order = DropOrder::kTokenMajor}), routing);
  CHECK(routing.kept == Kept{1, 0, 1, 0, 1, 0});
}

TEST_CASE("RankPolicy knows padding", "[moe][selector][rank_policy]") {
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  Matrix<double> logits = three_tokens();
  logits.row(1).setConstant(std::numeric_limits<double>::quiet_NaN());
  CHECK(kept_of(always(RankRule::kThreshold, {0.32}), logits, 2, {.mask = mask}) ==
        Kept{1, 1, 1, 0});
}

TEST_CASE("RankPolicy has the gradient of its inner selector", "[moe][selector][rank_policy]") {
  Rng rng(9);
  LinearRouter<double> router(4, 4, rng, {.init_scale = 5.0});
  MoELayer layer(
      router,
      RankPolicy(SigmoidTopK<double>(4, {.k = 3}), always(RankRule::kThreshold, {0.3, 0.2})),
      FixedCapacity({.capacity = 3}), GluBank<double>(4, 4, 3, rng));
  const Matrix<double> x = test::random_matrix(6, 4, 10);
  decltype(layer)::Cache cache;
  layer.forward(x, {}, cache);
  CHECK(layer.report(cache).dropped > 4);
  test::check_gradients(layer, x);
}

TEST_CASE("RankPolicy hands over the buffers of its inner selector",
          "[moe][selector][rank_policy]") {
  RankPolicy policy(SigmoidTopK<double>(4));
  const auto named = buffers(policy);
  REQUIRE(named.size() == 1);
  CHECK(named[0].name == "bias");
  CHECK(named[0].buffer == &policy.selection_bias());
  RankPolicy plain{SoftmaxTopK<double>()};
  CHECK(buffers(plain).empty());
}

TEST_CASE("RankPolicy asks its inner selector whether the router fits",
          "[moe][selector][rank_policy]") {
  const HierarchicalRouter router(LinearRouter<double>(Matrix<double>::Ones(3, 2)),
                                  LinearRouter<double>(Matrix<double>::Ones(6, 2)));
  const RankPolicy policy(HierarchicalTopK<double>({.groups = 2}));
  CHECK(test::message_of<ConfigError>([&] { policy.check_router(router); }) ==
        "HierarchicalTopK: groups = 2, expected 3 as the router");
}

TEST_CASE("RankPolicy names the setting that is wrong", "[moe][selector][rank_policy]") {
  const auto message = [](const RankPolicyConfig& config) {
    return test::message_of<ConfigError>([&] { RankPolicy(SoftmaxTopK<double>(), config); });
  };
  CHECK(message({.train_threshold = {}}) ==
        "RankPolicy: train_threshold is empty, expected at least one threshold");
  CHECK(message({.evaluate_threshold = {0.2, -0.5}}) ==
        "RankPolicy: evaluate_threshold[1] = -0.5, expected a finite number >= 0");
  CHECK(test::message_of<ConfigError>([] { kept_of({}, three_tokens(), 2, {.training = true}); }) ==
        "RankPolicy: pass.rng = null, expected a generator in training");
  CHECK(test::message_of<ConfigError>([] {
          kept_of(always(RankRule::kRandom), three_tokens(), 2);
        }) == "RankPolicy: pass.rng = null, expected a generator");
  CHECK(test::message_of<ConfigError>([] { kept_of({}, three_tokens(), 4); }) ==
        "TopKSoftmax: k = 4, expected 1 <= k <= experts = 3");
}

}  // namespace weir::rank_policy_test
