// SPDX-License-Identifier: MIT
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include <weir/core/init.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/adaptive_capacity.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/input_weighted.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/experts/output_masking.hpp>
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
#include "support/same_draws.hpp"
#include "support/threads.hpp"

using namespace weir;

static_assert(CapacityPolicy<OutputMasking<Dropless>, float>);
static_assert(CapacityPolicy<OutputMasking<RenormaliseKept<FixedCapacity>>, double>);

namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr OutputMaskingConfig kFinal = {.rate = 0.4, .unit = MaskedUnit::kToken};
constexpr OutputMaskingConfig kInverted = {.rate = 0.4, .scaling = MaskScaling::kTraining};

/// Three tokens with the experts 0, 1 and 1, 0 and 2, 1.
Routing<double> small_routing(const Pass& pass = {}) {
  Matrix<double> logits(3, 3);
  logits << 2.0, 1.0, 0.0, 1.0, 2.0, 0.0, 0.0, 1.0, 2.0;
  return test::route(TopKSoftmax<double>{2}, logits, pass);
}

double share_of_ones(const Bytes& bytes) {
  double sum = 0.0;
  for (const std::uint8_t byte : bytes) sum += byte;
  return sum / static_cast<double>(bytes.size());
}

/// d_model 4, four experts.
template <class S, class C, class... L>
auto layer_of(const S& selector, const C& capacity, const L&... losses) {
  Rng rng(1);
  LinearRouter<double> router(4, 4, rng, {.init_scale = 5.0});
  return MoELayer(router, selector, capacity, GluBank<double>(4, 4, 3, rng, 1.0), losses...);
}

template <class L>
void check_training_gradients(L layer) {
  test::SameDraws<L> same{std::move(layer)};
  const Matrix<double> x = test::random_matrix(8, 4, 2);
  typename L::Cache cache;
  same.forward(x, {.training = true}, cache);
  const double masked = share_of_ones(cache.routing.output_masked);
  CHECK(masked > 0.1);
  CHECK(masked < 0.9);
  test::check_gradients(same, x, {.training = true});
}

}  // namespace

TEST_CASE("OutputMasking masks the assignments or tokens that the draws say",
          "[moe][capacity][output_masking]") {
  const std::vector<double> draws = {0.39, 0.4, 0.9, 0.0, 0.41, 0.1};
  const auto draw = [&](Index i) { return draws[static_cast<std::size_t>(i)]; };
  Routing<double> routing = small_routing();
  OutputMasking(Dropless{}, {.rate = 0.4}).mask(routing, draw);
  CHECK(routing.output_masked == Bytes{1, 0, 0, 1, 0, 1});
  routing = small_routing();
  OutputMasking(Dropless{}, kFinal).mask(routing, draw);
  CHECK(routing.output_masked == Bytes{1, 1, 0, 0, 0, 0});
  // One within the other: what either masks.
  OutputMasking(Dropless{}, {.rate = 0.1}).mask(routing, draw);
  CHECK(routing.output_masked == Bytes{1, 1, 0, 1, 0, 0});
}

TEST_CASE("OutputMasking masks its rate of outputs in training, none in evaluation",
          "[moe][capacity][output_masking]") {
  // 2000 tokens with two experts; four standard deviations are 0.031 of 4000, 0.044 of 2000.
  const Matrix<double> logits = test::random_matrix(2000, 4, 1);
  const TopKSoftmax<double> top{2};
  for (const OutputMaskingConfig& config : {OutputMaskingConfig{.rate = 0.4}, kFinal}) {
    Rng rng(2);
    Routing<double> routing = test::route(top, logits, {.training = true, .rng = &rng});
    const OutputMasking policy(Dropless{}, config);
    policy.apply(routing);
    const Bytes& masked = routing.output_masked;
    CHECK(share_of_ones(masked) == Approx(0.4).margin(0.044));
    int alike = 0;
    for (std::size_t t = 0; t < 2000; ++t) alike += masked[2 * t] == masked[2 * t + 1] ? 1 : 0;
    if (config.unit == MaskedUnit::kToken) {
      CHECK(alike == 2000);
    } else {
      CHECK(alike / 2000.0 == Approx(0.4 * 0.4 + 0.6 * 0.6).margin(0.045));
    }

    Routing<double> again = test::route(top, logits, {.training = true, .rng = &rng});
    policy.apply(again);
    CHECK(again.output_masked != masked);
    routing = test::route(top, logits, {.rng = &rng});
    policy.apply(routing);
    CHECK(routing.output_masked.empty());
  }
}

TEST_CASE("OutputMasking scales in evaluation or in training", "[moe][capacity][output_masking]") {
  Rng rng(2);
  const auto scale = [&](const auto& policy, bool training) {
    Routing<double> routing = small_routing({.training = training, .rng = &rng});
    policy.apply(routing);
    return routing.output_scale;
  };
  const OutputMasking nllb(Dropless{});
  CHECK(nllb.config().rate == 0.2);
  CHECK(scale(nllb, true) == 1.0);
  CHECK(scale(nllb, false) == 0.8);
  CHECK(scale(OutputMasking(Dropless{}, kInverted), true) == Approx(1.0 / 0.6));
  CHECK(scale(OutputMasking(Dropless{}, kInverted), false) == 1.0);
  CHECK(scale(OutputMasking(nllb, kFinal), true) == 1.0);
  CHECK(scale(OutputMasking(nllb, kFinal), false) == Approx(0.8 * 0.6));
}

TEST_CASE("OutputMasking yields the sum of the outputs that are left",
          "[moe][capacity][output_masking]") {
  // As fairseq: the outputs of all kept assignments times mask, or 1 - rate, times weight. Some
  // assignments are dropped before.
  const auto check = [](auto bank, OutputMaskingConfig config) {
    Rng rng(4);
    const LinearRouter<double> router(4, 4, rng, {.init_scale = 5.0});
    const FixedCapacity capacity{.capacity = 5};
    const SoftmaxTopK<double> top{.k = 2};
    const MoELayer plain(router, top, capacity, bank);
    const MoELayer masking(router, top, OutputMasking(capacity, config), bank);
    const Matrix<double> x = test::random_matrix(12, 4, 5);
    for (const bool training : {false, true}) {
      typename decltype(plain)::Cache cache;
      typename decltype(masking)::Cache masked;
      const Pass pass{.training = training, .rng = &rng};
      plain.forward(x, pass, cache);
      const Matrix<double> y = masking.forward(x, pass, masked);

      CHECK(masked.routing.kept == cache.routing.kept);
      CHECK(masked.routing.weight == cache.routing.weight);
      CHECK(masked.routing.output_masked.empty() == !training);
      // The output of each assignment by itself, from a routing that keeps no other.
      Matrix<double> expected = Matrix<double>::Zero(12, 4);
      const double scale = training == (config.scaling == MaskScaling::kEvaluation) ? 1.0
                           : training ? 1.0 / (1.0 - config.rate)
                                      : 1.0 - config.rate;
      typename decltype(bank)::Cache bank_cache;
      Dispatch<double> dispatch;
      for (std::size_t a = 0; a < cache.routing.kept.size(); ++a) {
        if (cache.routing.kept[a] == 0) continue;
        if (training && masked.routing.output_masked[a] != 0) continue;
        Routing<double> single = cache.routing;
        single.kept.assign(single.kept.size(), 0);
        single.kept[a] = 1;
        dispatch.build(single);
        expected += scale * bank.forward(x, dispatch, bank_cache);
      }
      CHECK(test::relative_error(y, expected) < 1e-14);
    }
  };
  Rng rng(3);
  const GluBank<double> glu(4, 4, 3, rng, 1.0);
  const auto matrices = [&](Index rows, Index cols) {
    std::vector<Matrix<double>> of_experts;
    for (int e = 0; e < 4; ++e) of_experts.push_back(normal_init<double>(rows, cols, 1.0, rng));
    return of_experts;
  };
  const MlpBank<double> biased(matrices(3, 4), matrices(4, 3), matrices(1, 3), matrices(1, 4));
  for (const OutputMaskingConfig& config : {OutputMaskingConfig{.rate = 0.4}, kFinal, kInverted}) {
    check(glu, config);
    check(InputWeighted(biased), config);
  }
}

TEST_CASE("OutputMasking leaves capacity, weights, losses and reports as they are",
          "[moe][capacity][output_masking]") {
  const Matrix<double> x = test::random_matrix(12, 4, 5);
  const SoftmaxTopK<double> top{.k = 2};
  const RenormaliseKept inner(FixedCapacity{.capacity = 4});
  const ImportanceLoss<double> importance{0.3};
  const SwitchLoss<double> balance{0.2};
  auto plain = layer_of(top, inner, importance, balance);
  auto outside = layer_of(top, OutputMasking(inner, {.rate = 0.5}), importance, balance);
  auto inside =
      layer_of(top, RenormaliseKept(OutputMasking(FixedCapacity{.capacity = 4}, {.rate = 0.5})),
               importance, balance);
  const auto run = [&](auto& layer, auto& cache) {
    Rng rng(6);
    layer.forward(x, {.training = true, .rng = &rng}, cache);
    return layer.report(cache);
  };
  decltype(plain)::Cache plain_cache;
  decltype(outside)::Cache outside_cache;
  decltype(inside)::Cache inside_cache;
  const MoEReport expected = run(plain, plain_cache);
  for (const MoEReport& report : {run(outside, outside_cache), run(inside, inside_cache)}) {
    CHECK(report.dropped == expected.dropped);
    CHECK(report.losses == expected.losses);
  }
  CHECK(outside_cache.routing.weight == plain_cache.routing.weight);
  CHECK(inside_cache.routing.weight == plain_cache.routing.weight);
  CHECK(outside_cache.y == inside_cache.y);
  CHECK(outside_cache.dispatch.slots() < plain_cache.dispatch.slots());
  CHECK(outside_cache.aux_loss == plain_cache.aux_loss);
}

TEST_CASE("OutputMasking has zeros for a token whose outputs are all masked",
          "[moe][capacity][output_masking]") {
  auto layer = layer_of(TopKSoftmax<double>{2}, OutputMasking(Dropless{}, {.rate = 0.9}));
  const Matrix<double> x = test::random_matrix(10, 4, 5);
  Rng rng(6);
  decltype(layer)::Cache cache;
  const Matrix<double> y = layer.forward(x, {.training = true, .rng = &rng}, cache);
  const Matrix<double> dx = layer.backward(test::random_matrix(10, 4, 7), cache);
  int zeros = 0;
  for (Index t = 0; t < 10; ++t) {
    const bool all = cache.dispatch.slots_of(t).empty();
    zeros += all ? 1 : 0;
    CHECK((y.row(t).norm() == 0.0) == all);
    CHECK((dx.row(t).norm() == 0.0) == all);
  }
  CHECK(zeros > 3);
}

TEST_CASE("OutputMasking passes dropped tokens on as they are", "[moe][capacity][output_masking]") {
  // Room for one token of each expert: the others go by, times their weights, also when scaled.
  const FixedCapacity capacity{.capacity = 1, .on_drop = OnDrop::kPass};
  auto plain = layer_of(TopKSoftmax<double>{1}, capacity);
  auto masking = layer_of(TopKSoftmax<double>{1}, OutputMasking(capacity, {.rate = 0.5}));
  const Matrix<double> x = test::random_matrix(10, 4, 5);
  decltype(plain)::Cache plain_cache;
  decltype(masking)::Cache cache;
  const Matrix<double> expected = plain.forward(x, plain_cache);
  const Matrix<double> y = masking.forward(x, cache);
  for (Index t = 0; t < 10; ++t) {
    const bool kept = cache.routing.kept[static_cast<std::size_t>(t)] != 0;
    CHECK(test::relative_error(y.row(t), (kept ? 0.5 : 1.0) * expected.row(t)) < 1e-15);
  }
}

TEST_CASE("OutputMasking with rate 0 draws nothing and changes nothing",
          "[moe][capacity][output_masking]") {
  const Matrix<double> x = test::random_matrix(10, 4, 5);
  const auto plain = layer_of(TopKSoftmax<double>{2}, Dropless{});
  const auto masking = layer_of(TopKSoftmax<double>{2}, OutputMasking(Dropless{}, {.rate = 0.0}));
  decltype(plain)::Cache plain_cache;
  decltype(masking)::Cache cache;
  for (const bool training : {false, true}) {
    CHECK(masking.forward(x, {.training = training}, cache) ==
          plain.forward(x, {.training = training}, plain_cache));
  }
}

TEST_CASE("OutputMasking knows padding and no tokens", "[moe][capacity][output_masking]") {
  Rng rng(2);
  const Bytes mask = {1, 0, 1};
  Routing<double> routing = small_routing({.training = true, .mask = mask, .rng = &rng});
  const OutputMasking policy(Dropless{}, kFinal);
  policy.apply(routing);
  CHECK(routing.output_masked.size() == 4);
  routing =
      test::route(TopKSoftmax<double>{2}, Matrix<double>(0, 3), {.training = true, .rng = &rng});
  policy.apply(routing);
  CHECK(routing.output_masked.empty());
}

TEST_CASE("OutputMasking decides for each token by itself", "[moe][capacity][output_masking]") {
  Matrix<double> logits = test::random_matrix(12, 5, 6);
  const auto masked = [&] {
    Rng rng(7);
    Routing<double> routing =
        test::route(TopKSoftmax<double>{3}, logits, {.training = true, .rng = &rng});
    OutputMasking(Dropless{}, {.rate = 0.5}).apply(routing);
    return routing.output_masked;
  };
  const Bytes before = masked();
  logits.bottomRows(4) = test::random_matrix(4, 5, 8);
  CHECK(masked() == before);
}

TEST_CASE("OutputMasking leaves nothing behind for a routing without it",
          "[moe][capacity][output_masking]") {
  Rng rng(2);
  Routing<double> routing = small_routing({.training = true, .rng = &rng});
  OutputMasking(Dropless{}, kInverted).apply(routing);
  routing.begin("Test", Matrix<double>::Zero(2, 4), {});
  CHECK(routing.output_masked.empty());
  CHECK(routing.output_scale == 1.0);
}

TEST_CASE("OutputMasking gradients agree with finite differences",
          "[moe][capacity][output_masking][gradient]") {
  const FixedCapacity capacity{.capacity = 5};
  const SoftmaxTopK<double> raw{.k = 3};
  const OutputMaskingConfig half{.rate = 0.5};
  check_training_gradients(layer_of(raw, OutputMasking(Dropless{}, half)));
  check_training_gradients(layer_of(TopKSoftmax<double>{3}, OutputMasking(capacity, kInverted)));
  check_training_gradients(layer_of(SigmoidTopK<double>(4, {.k = 3}),
                                    OutputMasking(RenormaliseKept(capacity), kFinal),
                                    ImportanceLoss<double>{}, SwitchLoss<double>{}));
  check_training_gradients(
      layer_of(raw, RenormaliseKept(OutputMasking(capacity, kInverted)), ImportanceLoss<double>{}));
  check_training_gradients(layer_of(RankPolicy(raw), OutputMasking(Dropless{}, half)));
  check_training_gradients(
      layer_of(raw, OutputMasking(FixedCapacity{.capacity = 5, .on_drop = OnDrop::kPass}, half)));
  // In evaluation, by the scale.
  auto layer =
      layer_of(raw, OutputMasking(RenormaliseKept(capacity), half), ImportanceLoss<double>{});
  test::check_gradients(layer, test::random_matrix(8, 4, 2));
}

TEST_CASE("OutputMasking hands over what its inner policy learns from",
          "[moe][capacity][output_masking]") {
  const Matrix<double> x = test::random_matrix(12, 4, 5);
  const auto learnt = [&](auto layer) {
    typename decltype(layer)::Cache cache;
    Rng rng(6);
    layer.forward(x, {.training = true, .rng = &rng}, cache);
    layer.backward(x, cache);
    layer.update();
    REQUIRE(buffers(layer).size() == 1);
    CHECK(buffers(layer)[0].name == "capacity.factor");
    return Matrix<double>(buffers(layer)[0].buffer->value);
  };
  const AdaptiveCapacity<double> inner({.initial = 1.0, .tolerated = 0.0, .rate = 1.0});
  const Matrix<double> expected = learnt(layer_of(TopKSoftmax<double>{2}, inner));
  CHECK(expected(0, 0) > 1.0);
  CHECK(learnt(layer_of(TopKSoftmax<double>{2}, OutputMasking(inner))) == expected);
}

TEST_CASE("OutputMasking is the same for any number of threads and allocates nothing",
          "[moe][capacity][output_masking]") {
  const Matrix<double> x = test::random_matrix(600, 4, 1);
  const Matrix<double> dy = test::random_matrix(600, 4, 2);
  auto layer = layer_of(TopKSoftmax<double>{2}, OutputMasking(Dropless{}, kInverted));
  decltype(layer)::Cache cache;
  const auto run = [&] {
    Rng rng(3);
    layer.forward(x, {.training = true, .rng = &rng}, cache);
    layer.backward(dy, cache);
  };
  run();
  if (test::allocations_are_counted()) CHECK(test::count_allocations(run) == 0);
  const Matrix<double> y = cache.y;
  const Matrix<double> dx = cache.dx;
  const test::Threads threads(3);
  run();
  CHECK(cache.y == y);
  CHECK(cache.dx == dx);
}

TEST_CASE("OutputMasking names the setting that is wrong", "[moe][capacity][output_masking]") {
  const auto message = [](double rate) {
    return test::message_of<ConfigError>([&] { OutputMasking(Dropless{}, {.rate = rate}); });
  };
  CHECK(message(1.0) == "OutputMasking: rate = 1, expected 0 <= rate < 1");
  CHECK(message(-0.5) == "OutputMasking: rate = -0.5, expected 0 <= rate < 1");
  CHECK(message(std::numeric_limits<double>::quiet_NaN()) ==
        "OutputMasking: rate = nan, expected 0 <= rate < 1");
  CHECK(test::message_of<ConfigError>([] {
          Routing<double> routing = small_routing({.training = true});
          OutputMasking(Dropless{}).apply(routing);
        }) == "OutputMasking: pass.rng = null, expected a generator in training");
  const OutputMasking policy(FixedCapacity{.capacity = 0});
  CHECK(test::message_of<ConfigError>([&] { policy.check(); }) ==
        "FixedCapacity: capacity = 0, expected >= 1");
}
