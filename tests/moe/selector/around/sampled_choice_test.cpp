// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/around/rank_policy.hpp>
#include <weir/moe/selector/around/replay.hpp>
#include <weir/moe/selector/around/sampled_choice.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/relaxed_top_k.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/straight_through.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/ops/softmax.hpp>

#include "moe/selector/selected.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/threads.hpp"

namespace weir::sampled_choice_test {

static_assert(Selector<SampledChoice<SoftmaxTopK<float>>, float>);
static_assert(BiasedSelector<SampledChoice<SigmoidTopK<float>>>);
static_assert(!BiasedSelector<SampledChoice<SoftmaxTopK<float>>>);

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

struct FixedNoise {
  Matrix<double> values;

  template <class T>
  void fill(const Pass& /*pass*/, MatrixOut<T> noise) const {
    noise = values;
  }
};

constexpr Index kTokens = 4000;

/// One token's logits, many times.
Matrix<double> many() {
  Matrix<double> z(1, 4);
  z << 1.0, 0.0, -1.0, 0.5;
  return z.replicate(kTokens, 1);
}

/// The share of tokens with each expert at rank `rank`, [1, experts].
Matrix<double> shares(const Routing<double>& routing, Index rank) {
  Matrix<double> share = Matrix<double>::Zero(1, routing.experts());
  for (Index t = 0; t < routing.tokens(); ++t) {
    share(0, routing.expert[routing.first(t) + rank]) +=
        1.0 / static_cast<double>(routing.tokens());
  }
  return share;
}

template <class S>
Routing<double> sampled(const S& selector, const Matrix<double>& logits, std::uint64_t seed = 1,
                        std::span<const std::uint8_t> allowed = {}) {
  Rng rng(seed);
  return test::route(selector, logits, {.training = true, .allowed = allowed, .rng = &rng});
}

}  // namespace

TEST_CASE("SampledChoice draws one expert from the softmax, with its clean weight",
          "[moe][selector][sampled_choice]") {
  const Matrix<double> z = many();
  const Matrix<double> p = softmax<double>(z.row(0));
  const Routing<double> routing = sampled(SampledChoice(SoftmaxTopK<double>({.k = 1})), z);
  CHECK((shares(routing, 0) - p).cwiseAbs().maxCoeff() < 0.03);
  for (Index a = 0; a < kTokens; ++a) {
    CHECK(routing.weight[a] == Approx(p(0, routing.expert[a])));
  }
  CHECK(routing.logits == z);
  CHECK(routing.noise.empty());
}

TEST_CASE("SampledChoice draws without replacement", "[moe][selector][sampled_choice]") {
  const Matrix<double> z = many();
  const Matrix<double> p = softmax<double>(z.row(0));
  const auto check = [&](const auto& selector) {
    const Routing<double> routing = sampled(SampledChoice(selector), z, 2);
    Matrix<double> pair = Matrix<double>::Zero(4, 4);
    for (Index t = 0; t < kTokens; ++t) {
      const Index a = routing.first(t);
      // Listed by the clean logits.
      CHECK(z(0, routing.expert[a]) > z(0, routing.expert[a + 1]));
      pair(routing.expert[a], routing.expert[a + 1]) += 1.0 / kTokens;
    }
    for (Index i = 0; i < 4; ++i) {
      for (Index j = 0; j < 4; ++j) {
        const double either = p(0, i) * p(0, j) * (1.0 / (1.0 - p(0, i)) + 1.0 / (1.0 - p(0, j)));
        CHECK(pair(i, j) == Approx(z(0, i) > z(0, j) ? either : 0.0).margin(0.03));
      }
    }
  };
  check(SoftmaxTopK<double>({.k = 2, .renormalise = true}));
  check(TopKSoftmax<double>({.k = 2}));
  check(SigmoidTopK<double>(4, {.k = 2}));
}

TEST_CASE("SampledChoice leaves certain experts their place and draws the others",
          "[moe][selector][sampled_choice]") {
  // NLLB's "sampling": the best, and one of the others by their softmax.
  const Matrix<double> z = many();
  const Matrix<double> p = softmax<double>(z.row(0));
  const auto check = [&](const auto& selector) {
    const Routing<double> routing = sampled(SampledChoice(selector, {.certain = 1}), z, 3);
    CHECK(shares(routing, 0)(0, 0) == Approx(1.0));
    Matrix<double> expected = p / (1.0 - p(0, 0));
    expected(0, 0) = 0.0;
    CHECK((shares(routing, 1) - expected).cwiseAbs().maxCoeff() < 0.03);
  };
  check(SoftmaxTopK<double>({.k = 2}));
  check(TopKSoftmax<double>({.k = 2}));
  check(StraightThrough<double>({.k = 2}));
  check(RelaxedTopK<double>({.k = 2}));
  // All certain: no draw changes anything.
  const SoftmaxTopK<double> all({.k = 2});
  CHECK(sampled(SampledChoice(all, {.certain = 2}), z).expert == test::route(all, z).expert);
  CHECK(sampled(SampledChoice(all, {.certain = 7}), z).expert == test::route(all, z).expert);
}

TEST_CASE("SampledChoice has the weights and probabilities of clean logits",
          "[moe][selector][sampled_choice]") {
  // p = (0.1, 0.4, 0.2, 0.3); the noise brings experts 0 and 2 to the top.
  Matrix<double> z(1, 4);
  z << std::log(1.0), std::log(4.0), std::log(2.0), std::log(3.0);
  Matrix<double> noise(1, 4);
  noise << 4.0, 0.0, 3.0, 0.0;
  const auto routing = [&](const auto& inner, SampledChoiceConfig config) {
    return test::route(SampledChoice<std::remove_cvref_t<decltype(inner)>, FixedNoise>(
                           inner, config, FixedNoise{noise}),
                       z, {.training = true});
  };
  const auto raw = routing(SoftmaxTopK<double>({.k = 2}), {});
  CHECK(raw.expert == std::vector<Index>{2, 0});
  CHECK(raw.weight[0] == Approx(0.2));
  CHECK(raw.weight[1] == Approx(0.1));
  CHECK(raw.probabilities(0, 1) == Approx(0.4));
  const auto normed = routing(TopKSoftmax<double>({.k = 2}), {});
  CHECK(normed.weight[0] == Approx(2.0 / 3.0));
  const auto nllb = routing(SoftmaxTopK<double>({.k = 2, .renormalise = true}), {.certain = 1});
  CHECK(nllb.expert == std::vector<Index>{1, 0});
  CHECK(nllb.weight[0] == Approx(0.8));
  // Noise times 0.1 changes nothing.
  CHECK(routing(SoftmaxTopK<double>({.k = 2}), {.scale = 0.1}).expert == std::vector<Index>{1, 3});
}

TEST_CASE("SampledChoice keeps to the inner selector's groups and bias",
          "[moe][selector][sampled_choice]") {
  const Matrix<double> z = test::random_matrix(300, 8, 4);
  const GroupLimit groups{.count = 4, .allowed = 1};
  const Routing<double> grouped =
      sampled(SampledChoice(SoftmaxTopK<double>({.k = 2, .groups = groups})), z, 5);
  for (Index a = 0; a < grouped.assignments(); a += 2) {
    CHECK(grouped.expert[a] / 2 == grouped.expert[a + 1] / 2);
  }
  SampledChoice biased(BiasedSoftmaxTopK<double>(8, {.k = 1}));
  biased.selection_bias().value(0, 3) = 100.0;
  CHECK(sampled(biased, z, 6).expert == std::vector<Index>(300, 3));
}

TEST_CASE("SampledChoice draws no forbidden expert and none for padding",
          "[moe][selector][sampled_choice]") {
  const std::vector<std::uint8_t> allowed = {1, 0, 1, 1};
  for (const Index certain : {0, 1}) {
    const SampledChoice selector(TopKSoftmax<double>({.k = 2}), {.certain = certain});
    const Routing<double> routing = sampled(selector, many(), 7, allowed);
    CHECK(std::count(routing.expert.begin(), routing.expert.end(), 1) == 0);
    Rng rng(8);
    const std::vector<std::uint8_t> mask = {1, 0, 1};
    const Routing<double> padded = test::route(selector, test::random_matrix(3, 4, 9),
                                               {.training = true, .mask = mask, .rng = &rng});
    CHECK(padded.offsets == std::vector<Index>{0, 2, 2, 4});
    CHECK(test::route(selector, Matrix<double>(0, 4), {.training = true, .rng = &rng})
              .assignments() == 0);
  }
}

TEST_CASE("SampledChoice is its inner selector outside of training, unless told otherwise",
          "[moe][selector][sampled_choice]") {
  const Matrix<double> z = many();
  const SoftmaxTopK<double> inner({.k = 2});
  const List<Index> expected = test::route(inner, z).expert;
  Rng rng(10);
  CHECK(test::route(SampledChoice(inner), z, {.rng = &rng}).expert == expected);
  CHECK(rng.position() == 0);
  CHECK(sampled(SampledChoice(inner, {.scale = 0.0}), z).expert == expected);
  CHECK(test::route(SampledChoice(inner, {.evaluate = true}), z, {.rng = &rng}).expert != expected);
}

TEST_CASE("SampledChoice holds for extreme logits", "[moe][selector][sampled_choice]") {
  Matrix<double> z(2, 3);
  z << 1e6, 1e6 - 1.0, -1e6, 1e300, -1e300, 0.0;
  const Routing<double> routing =
      sampled(SampledChoice(TopKSoftmax<double>({.k = 2}), {.certain = 1}), z);
  CHECK(routing.expert == std::vector<Index>{0, 1, 0, 2});
}

TEST_CASE("SampledChoice has the gradient of clean weights",
          "[moe][selector][sampled_choice][gradient]") {
  Rng rng(11);
  const FixedNoise noise{3.0 * test::random_matrix(6, 5, 12)};
  const auto check = [&](const auto& inner, Index certain) {
    using Inner = std::remove_cvref_t<decltype(inner)>;
    MoELayer layer(LinearRouter<double>(4, 5, rng, {.init_scale = 4.0}),
                   SampledChoice<Inner, FixedNoise>(inner, {.certain = certain}, noise), Dropless(),
                   GluBank<double>(4, 5, 3, rng));
    test::check_gradients(layer, test::random_matrix(6, 4, 13));
  };
  check(SoftmaxTopK<double>({.k = 2}), 0);
  check(TopKSoftmax<double>({.k = 3}), 1);
  check(SigmoidTopK<double>(5, {.k = 2}), 0);
  check(RelaxedTopK<double>({.k = 2, .descent = {.epsilon = 0.3}}), 1);
}

TEST_CASE("SampledChoice draws the same on any number of threads, and allocates nothing",
          "[moe][selector][sampled_choice]") {
  const SampledChoice selector(SoftmaxTopK<double>({.k = 2}), {.certain = 1});
  const Matrix<double> z = test::random_matrix(800, 6, 14);
  test::Selected<SampledChoice<SoftmaxTopK<double>>> selected;
  const Routing<double>& routing = selected.routing;
  const auto run = [&] {
    Rng rng(15);
    selector.forward(z, {.training = true, .rng = &rng}, selected.routing, selected.cache);
  };
  run();
  run();
  CHECK(test::count_allocations(run) == 0);
  const List<Index> expert = routing.expert;
  const List<double> weight = routing.weight;
  const test::Threads threads(3);
  run();
  CHECK(routing.expert == expert);
  CHECK(routing.weight == weight);
}

TEST_CASE("RankPolicy over SampledChoice is NLLB's random second expert of sampled ones",
          "[moe][selector][sampled_choice]") {
  // 2 p_2 > u on raw probabilities: threshold 1/2.
  const RankPolicy policy(
      SampledChoice(SoftmaxTopK<double>({.k = 2}), {.certain = 1}),
      {.train = RankRule::kRandom, .train_threshold = {0.5}, .of_weight = true});
  const Routing<double> routing = sampled(policy, many(), 16);
  const Matrix<double> p = softmax<double>(many().row(0));
  double kept = 0.0;
  for (Index a = 1; a < routing.assignments(); a += 2) kept += routing.kept[a];
  double expected = 0.0;
  for (const Index e : {1, 2, 3}) {
    expected += p(0, e) / (1.0 - p(0, 0)) * std::min(1.0, 2.0 * p(0, e));
  }
  CHECK(kept / kTokens == Approx(expected).margin(0.03));
}

TEST_CASE("What SampledChoice drew can be replayed", "[moe][selector][sampled_choice]") {
  const Matrix<double> z = test::random_matrix(40, 6, 19);
  Replay replay(SampledChoice(TopKSoftmax<double>({.k = 2})));
  const Routing<double> drawn = sampled(replay, z, 20);
  CHECK(drawn.expert != test::route(TopKSoftmax<double>({.k = 2}), z).expert);
  RoutingTrace trace;
  trace.record(drawn);
  replay.impose(trace);
  const Routing<double> again = test::route(replay, z, {.training = true});
  CHECK(again.expert == drawn.expert);
  CHECK(again.weight == drawn.weight);
}

TEST_CASE("SampledChoice says what does not fit", "[moe][selector][sampled_choice]") {
  const SoftmaxTopK<double> inner({.k = 2});
  CHECK(test::message_of<ConfigError>([&] { SampledChoice(inner, {.scale = -1.0}); }) ==
        "SampledChoice: scale = -1, expected a finite number >= 0");
  CHECK(test::message_of<ConfigError>([&] { SampledChoice(inner, {.certain = -1}); }) ==
        "SampledChoice: certain = -1, expected >= 0");
  const Matrix<double> logits = test::random_matrix(2, 4, 17);
  CHECK(test::message_of<ConfigError>([&] {
          test::route(SampledChoice(inner), logits, {.training = true});
        }) == "GumbelNoise: pass.rng = null, expected a generator in training");
  Rng rng(18);
  CHECK(test::message_of<ConfigError>([&] {
          test::route(SampledChoice(inner), logits.leftCols(1), {.training = true, .rng = &rng});
        }) == "SoftmaxTopK: k = 2, expected 1 <= k <= experts = 1");
  CHECK(rng.position() == 0);
  Matrix<double> far(1, 3);
  far << 2000.0, 0.0, 0.0;
  Matrix<double> noise(1, 3);
  noise << 0.0, 9000.0, 8999.0;
  // Of the experts drawn, both have the probability 0 to rounding.
  const SampledChoice<SoftmaxTopK<double>, FixedNoise> driven(
      SoftmaxTopK<double>({.k = 2, .renormalise = true}), {}, FixedNoise{noise});
  const Routing<double> routing = test::route(driven, far, {.training = true});
  CHECK(routing.expert == std::vector<Index>{1, 2});
  CHECK(routing.weight == std::vector<double>{0.5, 0.5});

  const SampledChoice<MakesNan, FixedNoise> broken(MakesNan({.k = 2}), {}, FixedNoise{noise});
  CHECK(test::message_of<NonFiniteError>([&] { test::route(broken, far, {.training = true}); }) ==
        "SampledChoice: the weight of token 0 for expert 2 is nan, expected a finite number");
}

TEST_CASE("SampledChoice draws the same in single precision", "[moe][selector][sampled_choice]") {
  const Matrix<double> z = test::random_matrix(50, 6, 21);
  const SampledChoiceConfig config{.certain = 1};
  const SampledChoice<StraightThrough<float>> selector(StraightThrough<float>({.k = 2}), config);
  Rng rng(22);
  auto selected = test::select(selector, z.cast<float>(), {.training = true, .rng = &rng});
  CHECK(selected.routing.expert ==
        sampled(SampledChoice(StraightThrough<double>({.k = 2}), config), z, 22).expert);
  const test::RoutingObjective<float> sum{RowVector<float>::Ones(100), Matrix<float>::Zero(50, 6)};
  CHECK(sum.logit_gradient(selector, selected).allFinite());
}

}  // namespace weir::sampled_choice_test
