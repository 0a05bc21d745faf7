// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"

namespace weir::shared_experts_test {

namespace {

auto mixture() {
  Rng rng(3);
  return MoELayer(LinearRouter<double>(4, 3, rng, {.init_scale = 5.0}),
                  SigmoidTopK<double>(3, {.k = 2}), Dropless(),
                  GluBank<double>(4, 3, 5, rng, {.init_scale = 1.0}),
                  SwitchLoss<double>({.coefficient = 0.3}), BiasBalance<double>({.rate = 0.25}));
}

Glu<double> shared_network(Index d_hidden = 6) {
  Rng rng(4);
  return {4, d_hidden, rng};
}

Linear<double> gate() {
  return Linear<double>(test::random_matrix(1, 4, 5));
}

using Moe = decltype(mixture());
using Both = SharedExperts<Moe, Glu<double>>;

static_assert(Layer<Both>);

}  // namespace

TEST_CASE("SharedExperts adds the shared network to the mixture", "[moe][shared_experts]") {
  const Matrix<double> x = test::random_matrix(5, 4, 1);
  const Matrix<double> routed = infer(mixture(), x);
  const Matrix<double> shared = infer(shared_network(), x);
  CHECK(infer(Both(mixture(), shared_network()), x) == routed + shared);

  Matrix<double> expected = routed;
  for (Index t = 0; t < 5; ++t) {
    const double z = x.row(t).dot(gate().weight().value.row(0));
    expected.row(t) += shared.row(t) / (1.0 + std::exp(-z));
  }
  CHECK(test::relative_error(infer(Both(mixture(), shared_network(), gate()), x), expected) <
        1e-14);
}

TEST_CASE("SharedExperts blends with the weights it is given", "[moe][shared_experts]") {
  const Matrix<double> x = test::random_matrix(5, 4, 1);
  const Matrix<double> routed = infer(mixture(), x);
  const Matrix<double> shared = infer(shared_network(), x);
  // k = 2: the mean of two routed experts and the shared one.
  const Both blend(mixture(), shared_network(), SharedExpertsConfig::weighted_sum(2));
  CHECK(blend.config().routed_weight == Approx(2.0 / 3.0));
  CHECK(test::relative_error(infer(blend, x), (2.0 * routed + shared) / 3.0) < 1e-14);

  Matrix<double> expected = 0.5 * routed;
  for (Index t = 0; t < 5; ++t) {
    const double z = x.row(t).dot(gate().weight().value.row(0));
    expected.row(t) += 2.0 * shared.row(t) / (1.0 + std::exp(-z));
  }
  CHECK(test::relative_error(infer(Both(mixture(), shared_network(), gate(), {0.5, 2.0}), x),
                             expected) < 1e-14);
}

TEST_CASE("Two shared experts are one of twice the width", "[moe][shared_experts]") {
  const Glu<double> wide = shared_network(6);
  const auto half = [&](Index begin) {
    return Glu<double>(wide.gate().value.middleRows(begin, 3), wide.up().value.middleRows(begin, 3),
                       wide.down().value.middleCols(begin, 3));
  };
  const Matrix<double> x = test::random_matrix(5, 4, 1);
  const SharedExperts first(mixture(), half(0));
  const SharedExperts both(first, half(3));
  CHECK(test::relative_error(infer(both, x), infer(Both(mixture(), wide), x)) < 1e-14);
}

TEST_CASE("SharedExperts gradients agree with finite differences",
          "[moe][shared_experts][gradient]") {
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1};
  const Pass pass{.training = true, .mask = mask, .aux_scale = 0.7};
  const Matrix<double> x = test::random_matrix(5, 4, 1);
  Both plain(mixture(), shared_network());
  test::check_gradients(plain, x, pass);
  Both gated(mixture(), shared_network(), gate());
  test::check_gradients(gated, x, pass);
  Both blend(mixture(), shared_network(), SharedExpertsConfig::weighted_sum(2));
  test::check_gradients(blend, x, pass);
  Both gated_blend(mixture(), shared_network(), gate(), {0.5, 2.0});
  test::check_gradients(gated_blend, x, pass);
}

TEST_CASE("SharedExperts passes on what belongs to the mixture", "[moe][shared_experts]") {
  Both layer(mixture(), shared_network(), gate());
  Moe alone = mixture();
  const Matrix<double> x = test::random_matrix(5, 4, 1);
  Both::Cache cache;
  Moe::Cache alone_cache;
  PassRecord record(PassRecord::Collects::kLossesAndReports);
  PassRecord alone_record = record;
  layer.forward(x, {.training = true, .aux_scale = 0.5, .record = &record}, cache);
  alone.forward(x, {.training = true, .aux_scale = 0.5, .record = &alone_record}, alone_cache);
  CHECK(record.aux_loss() == alone_record.aux_loss());
  CHECK(record.aux_loss() > 0.0);
  REQUIRE(record.reports().size() == 1);
  CHECK(record.reports()[0].report.load == alone.report(alone_cache).load);

  layer.backward(x, cache);
  alone.backward(x, alone_cache);
  update(layer);
  update(alone);
  CHECK(layer.moe().selector().selection_bias().value == alone.selector().selection_bias().value);
  CHECK(!alone.selector().selection_bias().value.isZero(0.0));
}

TEST_CASE("SharedExperts names its members after the mixture's", "[moe][shared_experts]") {
  Both layer(mixture(), shared_network(), gate());
  CHECK(layer.d_model() == 4);
  const auto all = parameters(layer);
  REQUIRE(all.size() == 1 + 9 + 3 + 1);
  CHECK(all[0].name == "router.weight");
  CHECK(all[1].name == "experts.0.gate");
  CHECK(all[10].name == "shared.gate");
  CHECK(all[13].name == "shared_gate.weight");
  REQUIRE(buffers(layer).size() == 1);
  CHECK(buffers(layer)[0].name == "selector.bias");

  Both plain(mixture(), shared_network());
  CHECK(parameters(plain).size() == 13);
}

TEST_CASE("SharedExperts takes no tokens", "[moe][shared_experts]") {
  Both layer(mixture(), shared_network(), gate());
  Both::Cache cache;
  const Matrix<double>& y = layer.forward(Matrix<double>(0, 4), kTraining, cache);
  CHECK(y.rows() == 0);
  CHECK(y.cols() == 4);
  CHECK(layer.backward(Matrix<double>(0, 4), cache).cols() == 4);
}

TEST_CASE("SharedExperts allocates nothing once warm", "[moe][shared_experts]") {
  const bool gated = GENERATE(false, true);
  Both layer = gated ? Both(mixture(), shared_network(), gate(), {0.5, 2.0})
                     : Both(mixture(), shared_network(), SharedExpertsConfig{0.5, 2.0});
  const Matrix<double> x = test::random_matrix(5, 4, 1);
  Both::Cache cache;
  const auto step = [&] {
    layer.forward(x, kTraining, cache);
    layer.backward(x, cache);
  };
  step();
  step();
  CHECK(test::count_allocations(step) == 0);
}

TEST_CASE("SharedExperts says what is wrong with its arguments", "[moe][shared_experts]") {
  Rng rng(1);
  CHECK(test::message_of<ConfigError>([&] {
          Both(mixture(), shared_network(), Linear<double>(4, 2, rng));
        }) == "SharedExperts: the gate is [2, 4], expected [1, 4]");
  CHECK(test::message_of<ConfigError>([&] {
          Both(mixture(), shared_network(), Linear<double>(3, 1, rng));
        }) == "SharedExperts: the gate is [1, 3], expected [1, 4]");

  CHECK(test::message_of<ConfigError>([&] { SharedExpertsConfig::weighted_sum(0); }) ==
        "SharedExpertsConfig::weighted_sum: k = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([&] {
          Both(mixture(), shared_network(), SharedExpertsConfig{.shared_weight = HUGE_VAL});
        }) == "SharedExperts: shared_weight = inf, expected a finite number");
  CHECK(test::message_of<ConfigError>([&] {
          Both(mixture(), shared_network(), gate(), {.routed_weight = -HUGE_VAL});
        }) == "SharedExperts: routed_weight = -inf, expected a finite number");

  const Matrix<double> x = test::random_matrix(5, 4, 1);
  const SharedExperts narrow(mixture(), Linear<double>(4, 3, rng));
  CHECK(test::message_of<ShapeError>([&] { infer(narrow, x); }) ==
        "SharedExperts::forward: the shared experts' output is [5, 3], expected [5, 4]");

  Both layer(mixture(), shared_network());
  Both::Cache cache;
  CHECK(test::message_of<StateError>([&] { layer.backward(x, cache); }) ==
        "SharedExperts::backward: the cache is empty, expected a forward pass that succeeded");
  layer.forward(x, kTraining, cache);
  CHECK(test::message_of<ShapeError>([&] { layer.backward(x.topRows(2), cache); }) ==
        "SharedExperts::backward: dy is [2, 4], expected [5, 4]");
}

}  // namespace weir::shared_experts_test
