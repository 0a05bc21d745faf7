// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/core/init.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/input_weighted.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/experts/output_masking.hpp>
#include <weir/moe/experts/pass_dropped.hpp>
#include <weir/moe/experts/with_zero_experts.hpp>
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

namespace weir::output_masking_test {

static_assert(ExpertBank<OutputMasking<GluBank<float>>>);
static_assert(ExpertBank<OutputMasking<OutputMasking<InputWeighted<MlpBank<double>>>>>);

namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr OutputMaskingConfig kFinal = {.rate = 0.4, .unit = MaskedUnit::kToken};
constexpr OutputMaskingConfig kInverted = {.rate = 0.4, .scaling = MaskScaling::kInTraining};

GluBank<double> glu(Index experts = 4) {
  Rng rng(1);
  return {4, experts, 3, rng};
}

Dispatch<double> dispatch_of(const Routing<double>& routing) {
  Dispatch<double> dispatch;
  dispatch.build(routing);
  return dispatch;
}

/// Three tokens with the experts 0, 1 and 1, 0 and 2, 1.
Dispatch<double> small_dispatch(const Pass& pass = {}) {
  Matrix<double> logits(3, 3);
  logits << 2.0, 1.0, 0.0, 1.0, 2.0, 0.0, 0.0, 1.0, 2.0;
  return dispatch_of(test::route(TopKSoftmax<double>({.k = 2}), logits, pass));
}

/// One byte per assignment: 1 for those of `dispatch` that are not in `unmasked`.
Bytes masked_of(const Dispatch<double>& dispatch, const Dispatch<double>& unmasked) {
  Bytes masked(static_cast<std::size_t>(dispatch.assignments()), 0);
  for (Index s = 0; s < dispatch.slots(); ++s) {
    masked[static_cast<std::size_t>(dispatch.assignment(s))] = 1;
  }
  for (Index s = 0; s < unmasked.slots(); ++s) {
    masked[static_cast<std::size_t>(unmasked.assignment(s))] = 0;
  }
  return masked;
}

double share_of_ones(const Bytes& bytes) {
  double sum = 0.0;
  for (const std::uint8_t byte : bytes) sum += byte;
  return sum / static_cast<double>(bytes.size());
}

/// d_model 4, four experts.
template <class S, class C, class B, class... L>
auto layer_of(const S& selector, const C& capacity, const B& bank, const L&... losses) {
  Rng rng(2);
  LinearRouter<double> router(4, 4, rng, {.init_scale = 5.0});
  return MoELayer(router, selector, capacity, bank, losses...);
}

template <class L>
void check_training_gradients(L layer) {
  test::SameDraws<L> same{std::move(layer)};
  const Matrix<double> x = test::random_matrix(8, 4, 2);
  typename L::Cache cache;
  same.forward(x, kTraining, cache);
  test::check_gradients(same, x);
}

/// The same, of a layer whose bank is an OutputMasking.
template <class L>
void check_masked_gradients(L layer) {
  test::SameDraws<L> same{layer};
  const Matrix<double> x = test::random_matrix(8, 4, 2);
  typename L::Cache cache;
  same.forward(x, kTraining, cache);
  const auto masked = static_cast<double>(cache.dispatch.slots() - cache.bank.unmasked.slots());
  CHECK(masked > 0.1 * static_cast<double>(cache.dispatch.slots()));
  CHECK(masked < 0.9 * static_cast<double>(cache.dispatch.slots()));
  check_training_gradients(std::move(layer));
}

}  // namespace

TEST_CASE("OutputMasking masks the assignments or tokens that the draws say",
          "[moe][experts][output_masking]") {
  const std::vector<double> draws = {0.39, 0.4, 0.9, 0.0, 0.41, 0.1};
  const auto draw = [&](Index i) { return draws[static_cast<std::size_t>(i)]; };
  const Dispatch<double> dispatch = small_dispatch();
  Dispatch<double> unmasked;
  OutputMasking(glu(3), {.rate = 0.4}).mask(dispatch, draw, unmasked);
  CHECK(masked_of(dispatch, unmasked) == Bytes{1, 0, 0, 1, 0, 1});
  OutputMasking(glu(3), kFinal).mask(dispatch, draw, unmasked);
  CHECK(masked_of(dispatch, unmasked) == Bytes{1, 1, 0, 0, 0, 0});
  // One within the other: what either masks.
  Dispatch<double> twice;
  OutputMasking(glu(3), {.rate = 0.1}).mask(unmasked, draw, twice);
  CHECK(masked_of(dispatch, twice) == Bytes{1, 1, 0, 1, 0, 0});
}

TEST_CASE("OutputMasking draws by the number of the assignment or token",
          "[moe][experts][output_masking]") {
  Routing<double> routing =
      test::route(TopKSoftmax<double>({.k = 2}), test::random_matrix(30, 4, 1));
  test::limit(FixedCapacity({.capacity = 12}), routing);
  const Dispatch<double> dispatch = dispatch_of(routing);
  const Matrix<double> x = test::random_matrix(30, 4, 2);
  for (const OutputMaskingConfig& config : {OutputMaskingConfig{.rate = 0.4}, kFinal}) {
    Rng rng(7);
    Rng same(7);
    OutputMasking<GluBank<double>>::Cache cache;
    OutputMasking(glu(), config).forward(x, dispatch, {.training = true, .rng = &rng}, cache);
    const Rng draws = same.split();
    CHECK(rng.position() == same.position());
    Bytes expected(60, 0);
    for (Index t = 0; t < 30; ++t) {
      for (Index a = 2 * t; a < 2 * t + 2; ++a) {
        const Index i = config.unit == MaskedUnit::kToken ? t : a;
        const double u = unit_interval(draws.at(static_cast<std::uint64_t>(i)));
        if (routing.kept[a] != 0 && u < 0.4) expected[static_cast<std::size_t>(a)] = 1;
      }
    }
    CHECK(masked_of(dispatch, cache.unmasked) == expected);
  }
}

TEST_CASE("OutputMasking masks its rate of outputs in training, none in evaluation",
          "[moe][experts][output_masking]") {
  // 2000 tokens with two experts; four standard deviations are 0.031 of 4000, 0.044 of 2000.
  const Dispatch<double> dispatch =
      dispatch_of(test::route(TopKSoftmax<double>({.k = 2}), test::random_matrix(2000, 4, 1)));
  const Matrix<double> x = test::random_matrix(2000, 4, 2);
  for (const OutputMaskingConfig& config : {OutputMaskingConfig{.rate = 0.4}, kFinal}) {
    Rng rng(2);
    const Pass pass{.training = true, .rng = &rng};
    const OutputMasking bank(glu(), config);
    OutputMasking<GluBank<double>>::Cache cache;
    bank.forward(x, dispatch, pass, cache);
    const Bytes masked = masked_of(dispatch, cache.unmasked);
    CHECK(share_of_ones(masked) == Approx(0.4).margin(0.044));
    int alike = 0;
    for (std::size_t t = 0; t < 2000; ++t) alike += masked[2 * t] == masked[2 * t + 1] ? 1 : 0;
    if (config.unit == MaskedUnit::kToken) {
      CHECK(alike == 2000);
    } else {
      CHECK(alike / 2000.0 == Approx(0.4 * 0.4 + 0.6 * 0.6).margin(0.045));
    }

    bank.forward(x, dispatch, pass, cache);
    CHECK(masked_of(dispatch, cache.unmasked) != masked);
    const auto position = rng.position();
    bank.forward(x, dispatch, {.rng = &rng}, cache);
    CHECK_FALSE(cache.masks);
    CHECK(rng.position() == position);
  }
}

TEST_CASE("OutputMasking scales in evaluation or in training", "[moe][experts][output_masking]") {
  const Dispatch<double> dispatch = small_dispatch();
  const Matrix<double> x = test::random_matrix(3, 4, 1);
  Rng rng(2);
  const auto scale = [&](const OutputMaskingConfig& config, bool training) {
    OutputMasking<GluBank<double>>::Cache cache;
    OutputMasking(glu(3), config).forward(x, dispatch, {.training = training, .rng = &rng}, cache);
    return cache.scale;
  };
  CHECK(OutputMasking(glu()).config().rate == 0.2);
  CHECK(scale({}, true) == 1.0);
  CHECK(scale({}, false) == 0.8);
  CHECK(scale(kInverted, true) == Approx(1.0 / 0.6));
  CHECK(scale(kInverted, false) == 1.0);

  // One within the other has both factors.
  const OutputMasking both(OutputMasking(glu(3), {}), kFinal);
  GluBank<double>::Cache plain;
  std::remove_const_t<decltype(both)>::Cache cache;
  const Matrix<double> expected = 0.8 * 0.6 * glu(3).forward(x, dispatch, {}, plain);
  CHECK(test::relative_error(both.forward(x, dispatch, {}, cache), expected) < 1e-15);
}

TEST_CASE("OutputMasking within another has both units", "[moe][experts][output_masking]") {
  const Dispatch<double> dispatch =
      dispatch_of(test::route(TopKSoftmax<double>({.k = 2}), test::random_matrix(2000, 4, 1)));
  const OutputMasking both(OutputMasking(glu(), {.rate = 0.4}),
                           {.rate = 0.3, .unit = MaskedUnit::kToken});
  Rng rng(2);
  std::remove_const_t<decltype(both)>::Cache cache;
  both.forward(test::random_matrix(2000, 4, 2), dispatch, {.training = true, .rng = &rng}, cache);
  const Bytes by_token = masked_of(dispatch, cache.unmasked);
  const Bytes all = masked_of(dispatch, cache.inner.unmasked);
  CHECK(share_of_ones(by_token) == Approx(0.3).margin(0.044));
  CHECK(share_of_ones(all) == Approx(1.0 - 0.7 * 0.6).margin(0.044));
  for (std::size_t a = 0; a < 4000; ++a) REQUIRE(by_token[a] <= all[a]);
}

TEST_CASE("OutputMasking yields the sum of the outputs that are left",
          "[moe][experts][output_masking]") {
  // As fairseq: the outputs of all kept assignments times mask, or 1 - rate, times weight. Some
  // assignments are dropped before.
  const auto check = [](auto bank, OutputMaskingConfig config) {
    Rng rng(4);
    const LinearRouter<double> router(4, 4, rng, {.init_scale = 5.0});
    const FixedCapacity capacity({.capacity = 5});
    const SoftmaxTopK<double> top({.k = 2});
    const MoELayer plain(router, top, capacity, bank);
    const MoELayer masking(router, top, capacity, OutputMasking(bank, config));
    const Matrix<double> x = test::random_matrix(12, 4, 5);
    for (const bool training : {false, true}) {
      typename decltype(plain)::Cache cache;
      typename decltype(masking)::Cache masked;
      const Pass pass{.training = training, .rng = &rng};
      plain.forward(x, pass, cache);
      const Matrix<double> y = masking.forward(x, pass, masked);

      CHECK(masked.routing.kept == cache.routing.kept);
      CHECK(masked.routing.weight == cache.routing.weight);
      CHECK(masked.bank.masks == training);
      const Bytes is_masked = masked_of(masked.dispatch, masked.bank.unmasked);
      // The output of each assignment by itself, from a routing that keeps no other.
      Matrix<double> expected = Matrix<double>::Zero(12, 4);
      const double scale = training == (config.scaling == MaskScaling::kInEvaluation) ? 1.0
                           : training ? 1.0 / (1.0 - config.rate)
                                      : 1.0 - config.rate;
      typename decltype(bank)::Cache bank_cache;
      Dispatch<double> dispatch;
      for (Index a = 0; a < cache.routing.assignments(); ++a) {
        if (cache.routing.kept[a] == 0) continue;
        if (training && is_masked[static_cast<std::size_t>(a)] != 0) continue;
        Routing<double> single = cache.routing;
        single.kept.assign(single.assignments(), 0);
        single.kept[a] = 1;
        dispatch.build(single);
        expected += scale * bank.forward(x, dispatch, pass, bank_cache);
      }
      CHECK(test::relative_error(y, expected) < 1e-14);
    }
  };
  Rng rng(3);
  const auto matrices = [&](Index rows, Index cols) {
    std::vector<Matrix<double>> of_experts;
    for (int e = 0; e < 4; ++e) of_experts.push_back(normal_init<double>(rows, cols, 1.0, rng));
    return of_experts;
  };
  const MlpBank<double> biased(matrices(3, 4), matrices(4, 3), matrices(1, 3), matrices(1, 4));
  for (const OutputMaskingConfig& config : {OutputMaskingConfig{.rate = 0.4}, kFinal, kInverted}) {
    check(glu(), config);
    check(InputWeighted(biased), config);
    check(WithZeroExperts(glu(1), rng, {1, 1, 1}), config);
  }
}

TEST_CASE("OutputMasking leaves capacity, weights, losses and reports as they are",
          "[moe][experts][output_masking]") {
  const Matrix<double> x = test::random_matrix(12, 4, 5);
  const SoftmaxTopK<double> top({.k = 2});
  const RenormaliseKept capacity(FixedCapacity({.capacity = 4}));
  const ImportanceLoss<double> importance({.coefficient = 0.3});
  const SwitchLoss<double> balance({.coefficient = 0.2});
  const auto plain = layer_of(top, capacity, glu(), importance, balance);
  const auto masking =
      layer_of(top, capacity, OutputMasking(glu(), {.rate = 0.5}), importance, balance);
  const auto run = [&](const auto& layer, auto& cache) {
    Rng rng(6);
    layer.forward(x, {.training = true, .rng = &rng}, cache);
    return layer.report(cache);
  };
  std::remove_const_t<decltype(plain)>::Cache plain_cache;
  std::remove_const_t<decltype(masking)>::Cache cache;
  const LayerReport expected = run(plain, plain_cache);
  const LayerReport report = run(masking, cache);
  CHECK(report.dropped == expected.dropped);
  CHECK(report.kept == expected.kept);
  CHECK(report.losses == expected.losses);
  CHECK(cache.routing.applied == plain_cache.routing.applied);
  CHECK(cache.dispatch.slots() == plain_cache.dispatch.slots());
  CHECK(cache.bank.unmasked.slots() < cache.dispatch.slots());
  CHECK(cache.bank.inner.kept.exact_rows() == cache.bank.unmasked.slots());  // No others are run.
}

TEST_CASE("OutputMasking has zeros for a token whose outputs are all masked",
          "[moe][experts][output_masking]") {
  auto layer =
      layer_of(TopKSoftmax<double>({.k = 2}), Dropless(), OutputMasking(glu(), {.rate = 0.9}));
  const Matrix<double> x = test::random_matrix(10, 4, 5);
  Rng rng(6);
  decltype(layer)::Cache cache;
  const Matrix<double> y = layer.forward(x, {.training = true, .rng = &rng}, cache);
  const Matrix<double> dx = layer.backward(test::random_matrix(10, 4, 7), cache);
  int zeros = 0;
  for (Index t = 0; t < 10; ++t) {
    const bool all = cache.bank.unmasked.slots_of(t).empty();
    zeros += all ? 1 : 0;
    CHECK((y.row(t).norm() == 0.0) == all);
    CHECK((dx.row(t).norm() == 0.0) == all);
  }
  CHECK(zeros > 3);
}

TEST_CASE("OutputMasking has no gradient for the weight of a masked output",
          "[moe][experts][output_masking]") {
  const Dispatch<double> dispatch =
      dispatch_of(test::route(TopKSoftmax<double>({.k = 2}), test::random_matrix(10, 4, 1)));
  OutputMasking bank(glu(), {.rate = 0.5});
  decltype(bank)::Cache cache;
  Rng rng(6);
  bank.forward(test::random_matrix(10, 4, 2), dispatch, {.training = true, .rng = &rng}, cache);
  std::vector<double> d_weight(20, std::numeric_limits<double>::quiet_NaN());
  bank.backward(test::random_matrix(10, 4, 3), dispatch, d_weight, cache);
  const Bytes masked = masked_of(dispatch, cache.unmasked);
  for (std::size_t a = 0; a < 20; ++a) {
    CHECK(std::isfinite(d_weight[a]));
    CHECK((d_weight[a] == 0.0) == (masked[a] != 0));
  }
}

TEST_CASE("OutputMasking leaves alone what is passed on around it",
          "[moe][experts][output_masking]") {
  // Room for one token of each expert: the others go by, times their weights, also when scaled.
  const FixedCapacity capacity({.capacity = 1});
  const TopKSoftmax<double> top({.k = 1});
  const auto plain = layer_of(top, capacity, PassDropped(glu()));
  const auto masking = layer_of(top, capacity, PassDropped(OutputMasking(glu(), {.rate = 0.5})));
  const Matrix<double> x = test::random_matrix(10, 4, 5);
  const Matrix<double> expected = infer(plain, x);
  std::remove_const_t<decltype(masking)>::Cache cache;
  const Matrix<double> y = masking.forward(x, {}, cache);
  for (Index t = 0; t < 10; ++t) {
    const bool kept = cache.routing.kept[t] != 0;
    CHECK(test::relative_error(y.row(t), (kept ? 0.5 : 1.0) * expected.row(t)) < 1e-15);
  }
}

TEST_CASE("OutputMasking with rate 0 draws nothing and changes nothing",
          "[moe][experts][output_masking]") {
  const Matrix<double> x = test::random_matrix(10, 4, 5);
  const TopKSoftmax<double> top({.k = 2});
  const auto plain = layer_of(top, Dropless(), glu());
  const auto masking = layer_of(top, Dropless(), OutputMasking(glu(), {.rate = 0.0}));
  for (const bool training : {false, true}) {
    CHECK(infer(masking, x, {.training = training}) == infer(plain, x, {.training = training}));
  }
}

TEST_CASE("OutputMasking knows padding and no tokens", "[moe][experts][output_masking]") {
  Rng rng(2);
  const Bytes mask = {1, 0, 1};
  const Pass pass{.training = true, .mask = mask, .rng = &rng};
  const Dispatch<double> dispatch = small_dispatch(pass);
  OutputMasking bank(
      glu(3), {.rate = 0.4, .unit = MaskedUnit::kToken, .scaling = MaskScaling::kInTraining});
  decltype(bank)::Cache cache;
  Matrix<double> x = test::random_matrix(3, 4, 1);
  x.row(1).setConstant(std::numeric_limits<double>::quiet_NaN());
  CHECK(bank.forward(x, dispatch, pass, cache).row(1).isZero(0.0));
  std::vector<double> d_weight(4);
  CHECK(bank.backward(x, dispatch, d_weight, cache).row(1).isZero(0.0));

  const Dispatch<double> none =
      dispatch_of(test::route(TopKSoftmax<double>({.k = 2}), Matrix<double>(0, 3)));
  const Pass training{.training = true, .rng = &rng};
  CHECK(bank.forward(Matrix<double>(0, 4), none, training, cache).rows() == 0);
  CHECK(bank.backward(Matrix<double>(0, 4), none, {}, cache).cols() == 4);
}

TEST_CASE("OutputMasking decides for each token by itself", "[moe][experts][output_masking]") {
  Matrix<double> logits = test::random_matrix(12, 5, 6);
  const OutputMasking bank(glu(5), {.rate = 0.5});
  const auto masked = [&] {
    Rng rng(7);
    const Dispatch<double> dispatch =
        dispatch_of(test::route(TopKSoftmax<double>({.k = 3}), logits));
    OutputMasking<GluBank<double>>::Cache cache;
    bank.forward(test::random_matrix(12, 4, 1), dispatch, {.training = true, .rng = &rng}, cache);
    return masked_of(dispatch, cache.unmasked);
  };
  const Bytes before = masked();
  logits.bottomRows(4) = test::random_matrix(4, 5, 8);
  CHECK(masked() == before);
}

TEST_CASE("OutputMasking leaves nothing behind for another pass",
          "[moe][experts][output_masking]") {
  Rng rng(2);
  const Dispatch<double> dispatch = small_dispatch();
  const Matrix<double> x = test::random_matrix(3, 4, 1);
  const OutputMasking bank(glu(3), kInverted);
  OutputMasking<GluBank<double>>::Cache cache;
  GluBank<double>::Cache plain;
  bank.forward(x, dispatch, {.training = true, .rng = &rng}, cache);
  CHECK(bank.forward(x, dispatch, {}, cache) == glu(3).forward(x, dispatch, {}, plain));
}

TEST_CASE("OutputMasking gradients agree with finite differences",
          "[moe][experts][output_masking][gradient]") {
  const FixedCapacity capacity({.capacity = 5});
  const SoftmaxTopK<double> raw({.k = 3});
  const OutputMaskingConfig half{.rate = 0.5};
  check_masked_gradients(layer_of(raw, Dropless(), OutputMasking(glu(), half)));
  check_masked_gradients(
      layer_of(TopKSoftmax<double>({.k = 3}), capacity, OutputMasking(glu(), kInverted)));
  check_masked_gradients(layer_of(SigmoidTopK<double>(4, {.k = 3}), RenormaliseKept(capacity),
                                  OutputMasking(glu(), kFinal), ImportanceLoss<double>(),
                                  SwitchLoss<double>()));
  check_masked_gradients(layer_of(raw, RenormaliseKept(capacity), OutputMasking(glu(), kInverted),
                                  ImportanceLoss<double>()));
  check_masked_gradients(layer_of(RankPolicy(raw), Dropless(), OutputMasking(glu(), half)));
  check_training_gradients(
      layer_of(raw, capacity, OutputMasking(OutputMasking(glu(), kInverted), kFinal)));
  check_training_gradients(layer_of(raw, capacity, PassDropped(OutputMasking(glu(), half))));
  check_training_gradients(layer_of(raw, capacity, OutputMasking(InputWeighted(glu()), kInverted)));
  Rng rng(3);
  check_training_gradients(
      layer_of(raw, capacity, WithZeroExperts(OutputMasking(glu(1), kInverted), rng, {1, 1, 1})));
}

TEST_CASE("OutputMasking is the same for any number of threads and allocates nothing",
          "[moe][experts][output_masking]") {
  const Matrix<double> x = test::random_matrix(600, 4, 1);
  const Matrix<double> dy = test::random_matrix(600, 4, 2);
  auto layer = layer_of(TopKSoftmax<double>({.k = 2}), Dropless(), OutputMasking(glu(), kInverted));
  decltype(layer)::Cache cache;
  const auto run = [&] {
    Rng rng(3);
    layer.forward(x, {.training = true, .rng = &rng}, cache);
    layer.backward(dy, cache);
  };
  run();
  if (test::allocations_are_counted()) CHECK(test::count_allocations(run) == 0);
  const Matrix<double> y = cache.bank.y;
  const Matrix<double> dx = cache.dx;
  const test::Threads threads(3);
  run();
  CHECK(cache.bank.y == y);
  CHECK(cache.dx == dx);
}

TEST_CASE("OutputMasking names the setting that is wrong", "[moe][experts][output_masking]") {
  const auto message = [](double rate) {
    return test::message_of<ConfigError>([&] { OutputMasking(glu(), {.rate = rate}); });
  };
  CHECK(message(1.0) == "OutputMasking: rate = 1, expected 0 <= rate < 1");
  CHECK(message(-0.5) == "OutputMasking: rate = -0.5, expected 0 <= rate < 1");
  CHECK(message(std::numeric_limits<double>::quiet_NaN()) ==
        "OutputMasking: rate = nan, expected 0 <= rate < 1");
  CHECK(test::message_of<ConfigError>([] {
          OutputMasking<GluBank<double>>::Cache cache;
          OutputMasking(glu(3)).forward(test::random_matrix(3, 4, 1), small_dispatch(), kTraining,
                                        cache);
        }) == "OutputMasking: pass.rng = null, expected a generator in training");
}

}  // namespace weir::output_masking_test
