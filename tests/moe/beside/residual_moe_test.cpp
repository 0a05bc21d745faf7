// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <vector>

#include <weir/core/storage.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/beside/residual_moe.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"

namespace weir::residual_moe_test {

namespace {

auto mixture() {
  Rng rng(3);
  return MoELayer(LinearRouter<double>(4, 3, rng, {.init_scale = 5.0}),
                  SoftmaxTopK<double>({.k = 1, .renormalise = false}), Dropless(),
                  GluBank<double>(4, 3, 5, rng, {.init_scale = 1.0}),
                  SwitchLoss<double>({.coefficient = 0.3}));
}

Glu<double> dense() {
  Rng rng(4);
  return {4, 6, rng};
}

Linear<double> mix() {
  return Linear<double>(test::random_matrix(2, 4, 5), test::random_matrix(1, 2, 6));
}

using Residual = ResidualMoE<decltype(mixture()), Glu<double>>;

static_assert(Layer<Residual>);

}  // namespace

TEST_CASE("ResidualMoE mixes mixture and dense network by a softmax", "[moe][residual_moe]") {
  const Matrix<double> x = test::random_matrix(5, 4, 1);
  const Matrix<double> routed = infer(mixture(), x);
  const Matrix<double> plain = infer(dense(), x);
  const Matrix<double> logits = infer(mix(), x);
  Matrix<double> expected(5, 4);
  for (Index t = 0; t < 5; ++t) {
    const double share = 1.0 / (1.0 + std::exp(logits(t, 1) - logits(t, 0)));
    expected.row(t) = share * routed.row(t) + (1.0 - share) * plain.row(t);
  }
  CHECK(test::relative_error(infer(Residual(mixture(), dense(), mix()), x), expected) < 1e-14);

  const Linear<double> even(Matrix<double>::Zero(2, 4));
  CHECK(test::relative_error(infer(Residual(mixture(), dense(), even), x), 0.5 * (routed + plain)) <
        1e-14);
}

TEST_CASE("ResidualMoE gradients agree with finite differences", "[moe][residual_moe][gradient]") {
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1};
  Residual layer(mixture(), dense(), mix());
  test::check_gradients(layer, test::random_matrix(5, 4, 1),
                        {.training = true, .mask = mask, .aux_scale = 0.7});
}

TEST_CASE("ResidualMoE names its members, stores them and allocates nothing once warm",
          "[moe][residual_moe]") {
  Residual layer(mixture(), dense(), mix());
  CHECK(layer.d_model() == 4);
  const auto all = parameters(layer);
  REQUIRE(all.size() == 1 + 9 + 3 + 2);
  CHECK(all[0].name == "router.weight");
  CHECK(all[10].name == "dense.gate");
  CHECK(all[14].name == "mix.bias");

  const Matrix<double> x = test::random_matrix(5, 4, 1);
  Residual::Cache cache;
  const auto step = [&] {
    layer.forward(x, kTraining, cache);
    layer.backward(x, cache);
  };
  step();
  step();
  CHECK(test::count_allocations(step) == 0);
  CHECK(layer.moe().report(cache.moe).tokens == 5);
  CHECK(test::aux_loss(layer, x, kTraining) > 0.0);

  const Matrix<double> before = infer(layer, x);
  set_storage(layer, Storage::kPacked);
  CHECK(parameters(layer).size() == 3);  // The router, and the mix with its bias.
  CHECK(test::relative_error(infer(layer, x), before) < 1e-14);
}

TEST_CASE("ResidualMoE takes no tokens", "[moe][residual_moe]") {
  Residual layer(mixture(), dense(), mix());
  Residual::Cache cache;
  CHECK(layer.forward(Matrix<double>(0, 4), kTraining, cache).cols() == 4);
  CHECK(layer.backward(Matrix<double>(0, 4), cache).cols() == 4);
}

TEST_CASE("ResidualMoE says what is wrong with its arguments", "[moe][residual_moe]") {
  Rng rng(1);
  CHECK(test::message_of<ConfigError>([&] {
          Residual(mixture(), dense(), Linear<double>(4, 1, rng));
        }) == "ResidualMoE: the mix is [1, 4], expected [2, 4]");
  const Matrix<double> x = test::random_matrix(5, 4, 1);
  const ResidualMoE narrow(mixture(), Linear<double>(4, 3, rng), mix());
  CHECK(test::message_of<ShapeError>([&] { infer(narrow, x); }) ==
        "ResidualMoE::forward: the dense network's output is [5, 3], expected [5, 4]");
  Residual layer(mixture(), dense(), mix());
  Residual::Cache cache;
  layer.forward(x, kTraining, cache);
  CHECK(test::message_of<ShapeError>([&] { layer.backward(x.topRows(2), cache); }) ==
        "ResidualMoE::backward: dy is [2, 4], expected [5, 4]");
}

}  // namespace weir::residual_moe_test
