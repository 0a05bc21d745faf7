// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/core/layer.hpp>
#include <weir/core/storage.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/soft_moe.hpp>
#include <weir/nn/glu.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/threads.hpp"

namespace weir::soft_moe_test {

static_assert(Layer<SoftMoE<GluBank<float>>>);
static_assert(Layer<SoftMoE<MlpBank<double>>>);

namespace {

using Layer3 = SoftMoE<GluBank<double>>;

/// Three experts 4 -> d_out.
GluBank<double> bank(Index d_out = 4) {
  std::vector<Matrix<double>> gate, up, down;
  for (std::uint64_t e = 0; e < 3; ++e) {
    gate.push_back(test::random_matrix(5, 4, 10 + e));
    up.push_back(test::random_matrix(5, 4, 20 + e));
    down.push_back(test::random_matrix(d_out, 5, 30 + e));
  }
  return {gate, up, down};
}

Layer3 soft(SoftMoEConfig config, Index d_out = 4, double scale = 1.3) {
  config.scale = scale;
  return {test::random_matrix(3 * config.slots_per_expert, 4, 40), bank(d_out), config};
}

/// The definition for one sequence without padding, one number at a time.
Matrix<double> reference(const Matrix<double>& x, SoftMoEConfig config, double scale) {
  Matrix<double> phi = test::random_matrix(3 * config.slots_per_expert, 4, 40);
  Matrix<double> unit = x;
  if (config.normalise) {
    const double epsilon = config.epsilon;
    for (Index t = 0; t < x.rows(); ++t) unit.row(t) /= x.row(t).norm() + epsilon;
    for (Index i = 0; i < phi.rows(); ++i) phi.row(i) *= scale / (phi.row(i).norm() + epsilon);
  }
  Matrix<double> exp(x.rows(), phi.rows());
  for (Index t = 0; t < x.rows(); ++t) {
    for (Index i = 0; i < phi.rows(); ++i) exp(t, i) = std::exp(unit.row(t).dot(phi.row(i)));
  }
  Matrix<double> y = Matrix<double>::Zero(x.rows(), 4);
  for (Index i = 0; i < phi.rows(); ++i) {
    Matrix<double> in = Matrix<double>::Zero(1, 4);
    for (Index t = 0; t < x.rows(); ++t) in += exp(t, i) / exp.col(i).sum() * x.row(t);
    const auto e = static_cast<std::uint64_t>(i / config.slots_per_expert);
    const Glu<double> expert(test::random_matrix(5, 4, 10 + e), test::random_matrix(5, 4, 20 + e),
                             test::random_matrix(4, 5, 30 + e));
    const Matrix<double> out = infer(expert, in);
    for (Index t = 0; t < x.rows(); ++t) y.row(t) += exp(t, i) / exp.row(t).sum() * out;
  }
  return y;
}

}  // namespace

TEST_CASE("SoftMoE is its definition, sequence by sequence", "[moe][soft_moe]") {
  const Sequences sequences({5, 0, 1, 3});
  const Matrix<double> x = test::random_matrix(9, 4, 1);
  for (const Index slots : {Index(1), Index(2)}) {
    for (const bool normalise : {false, true}) {
      const SoftMoEConfig config{slots, normalise};
      const Layer3 layer = soft(config);
      CHECK(layer.slots() == 3 * slots);
      Layer3::Cache cache;
      const Matrix<double>& y =
          layer.forward(x, {.training = true, .sequences = &sequences}, cache);
      CHECK(test::relative_error(y.topRows(5), reference(x.topRows(5), config, 1.3)) < 1e-13);
      CHECK(test::relative_error(y.row(5), reference(x.row(5), config, 1.3)) < 1e-13);
      CHECK(test::relative_error(y.bottomRows(3), reference(x.bottomRows(3), config, 1.3)) < 1e-13);
      CHECK(test::relative_error(infer(layer, x), reference(x, config, 1.3)) < 1e-13);
    }
  }
}

TEST_CASE("SoftMoE gradients agree with finite differences", "[moe][soft_moe][gradient]") {
  const Sequences sequences({4, 1, 2});
  const std::vector<std::uint8_t> mask = {1, 0, 1, 1, 0, 1, 1};
  const Matrix<double> x = test::random_matrix(7, 4, 1);
  for (const bool normalise : {false, true}) {
    Layer3 layer = soft({2, normalise}, 3);
    test::check_gradients(layer, x);
    test::check_gradients(layer, x, {.mask = mask});
    test::check_gradients(layer, x, {.sequences = &sequences, .mask = mask});
  }
}

TEST_CASE("SoftMoE adds its epsilon to lengths", "[moe][soft_moe][gradient]") {
  const Matrix<double> x = test::random_matrix(5, 4, 1);
  for (const double epsilon : {1e-6, 0.3}) {
    SoftMoEConfig config{.slots_per_expert = 2};
    config.epsilon = epsilon;
    Layer3 layer = soft(config);
    CHECK(test::relative_error(infer(layer, x), reference(x, config, 1.3)) < 1e-13);
    test::check_gradients(layer, x);
  }
  SoftMoEConfig large{.slots_per_expert = 2};
  large.epsilon = 0.3;
  CHECK(test::relative_error(infer(soft(large), x), infer(soft({2}), x)) > 1e-2);
}

TEST_CASE("SoftMoE gives a token of zeros equal parts of all slots, and finite gradients",
          "[moe][soft_moe]") {
  Layer3 layer = soft({2, true});
  Matrix<double> x = test::random_matrix(3, 4, 1);
  x.row(1).setZero();
  Layer3::Cache cache;
  layer.forward(x, kTraining, cache);
  CHECK((cache.weights.combine.row(1).array() - 1.0 / 6.0).abs().maxCoeff() <= 1e-15);
  CHECK(layer.backward(test::random_matrix(3, 4, 2), cache).allFinite());
  for (const auto& [name, parameter] : parameters(layer)) CHECK(parameter->grad.allFinite());
}

TEST_CASE("SoftMoE is not causal", "[moe][soft_moe]") {
  const Layer3 layer = soft({});
  Matrix<double> x = test::random_matrix(5, 4, 1);
  const Matrix<double> before = infer(layer, x);
  x.row(4) *= 2.0;
  CHECK(test::relative_error(infer(layer, x).row(0), before.row(0)) > 1e-3);
}

TEST_CASE("SoftMoE follows the order of the tokens", "[moe][soft_moe]") {
  const Layer3 layer = soft({2, true});
  const Matrix<double> x = test::random_matrix(6, 4, 1);
  CHECK(test::relative_error(infer(layer, x.colwise().reverse()).colwise().reverse(),
                             infer(layer, x)) < 1e-14);
}

TEST_CASE("SoftMoE without padding is SoftMoE of the tokens alone", "[moe][soft_moe]") {
  for (const bool normalise : {false, true}) {
    Layer3 layer = soft({2, normalise});
    const std::vector<std::uint8_t> mask = {0, 1, 0, 1, 1, 0};
    Matrix<double> x = test::random_matrix(6, 4, 1);
    Matrix<double> real(3, 4);
    real << x.row(1), x.row(3), x.row(4);
    const Matrix<double> expected = infer(layer, real);
    x.row(0).setConstant(1e9);
    x.row(2).setConstant(std::numeric_limits<double>::quiet_NaN());
    x.row(5).setConstant(std::numeric_limits<double>::infinity());
    Layer3::Cache cache;
    const Matrix<double> y = layer.forward(x, {.training = true, .mask = mask}, cache);
    CHECK(test::relative_error(y.row(1), expected.row(0)) < 1e-14);
    CHECK(test::relative_error(y.row(4), expected.row(2)) < 1e-14);
    for (const Index t : {0, 2, 5}) CHECK(y.row(t).isZero(0.0));

    const Matrix<double> dx = layer.backward(x, cache);  // With dy that is not finite there either.
    CHECK(dx.allFinite());
    for (const Index t : {0, 2, 5}) CHECK(dx.row(t).isZero(0.0));
    for (const auto& [name, parameter] : parameters(layer)) CHECK(parameter->grad.allFinite());
  }
}

TEST_CASE("SoftMoE takes no tokens and none that is real", "[moe][soft_moe]") {
  Layer3 layer = soft({2, true}, 3);
  Layer3::Cache cache;
  CHECK(layer.forward(Matrix<double>(0, 4), kTraining, cache).cols() == 3);
  CHECK(layer.backward(Matrix<double>(0, 3), cache).cols() == 4);

  const std::vector<std::uint8_t> mask = {0, 0};
  CHECK(layer.forward(test::random_matrix(2, 4, 1), {.training = true, .mask = mask}, cache)
            .isZero(0.0));
  CHECK(layer.backward(test::random_matrix(2, 3, 1), cache).isZero(0.0));
}

TEST_CASE("SoftMoE names its members and stores those of its bank", "[moe][soft_moe]") {
  Layer3 layer = soft({2, true});
  const auto all = parameters(layer);
  REQUIRE(all.size() == 11);
  CHECK(all[0].name == "phi");
  CHECK(all[1].name == "scale");
  CHECK(all[2].name == "experts.0.gate");
  Layer3 plain = soft({2, false});
  CHECK(parameters(plain).size() == 10);

  const Matrix<double> x = test::random_matrix(6, 4, 1);
  const Matrix<double> before = infer(layer, x);
  set_storage(layer, Storage::kPacked);
  CHECK(layer.bank().storage() == Storage::kPacked);
  CHECK(test::relative_error(infer(layer, x), before) < 1e-14);
}

TEST_CASE("SoftMoE gives the same bits for any number of threads and allocates nothing",
          "[moe][soft_moe]") {
  Rng rng(5);
  SoftMoE layer(GluBank<double>(16, 4, 24, rng), rng, {.slots_per_expert = 3});
  const Sequences sequences({90, 110});
  const Matrix<double> x = test::random_matrix(200, 16, 1);
  decltype(layer)::Cache cache;
  const auto step = [&] {
    layer.forward(x, {.training = true, .sequences = &sequences}, cache);
    layer.backward(x, cache);
  };
  step();
  step();
  CHECK(test::count_allocations(step) == 0);
  zero_gradients(layer);
  step();
  const Matrix<double> y = cache.y;
  const Matrix<double> dx = cache.dx;
  std::vector<Matrix<double>> gradients;
  for (const auto& [name, parameter] : parameters(layer)) gradients.push_back(parameter->grad);
  zero_gradients(layer);
  const test::Threads threads(3);
  step();
  CHECK(cache.y == y);
  CHECK(cache.dx == dx);
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    CHECK(parameters(layer)[i].parameter->grad == gradients[i]);
  }
}

TEST_CASE("SoftMoE says what is wrong with its arguments", "[moe][soft_moe]") {
  Rng rng(1);
  CHECK(test::message_of<ConfigError>([&] { Layer3(bank(), rng, {.slots_per_expert = 0}); }) ==
        "SoftMoE: slots_per_expert = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([&] { Layer3(bank(), rng, {.scale = NAN}); }) ==
        "SoftMoE: scale = nan, expected a finite number");
  CHECK(test::message_of<ConfigError>([&] { Layer3(bank(), rng, {.epsilon = -1.0}); }) ==
        "SoftMoE: epsilon = -1, expected a finite number >= 0");
  CHECK(test::message_of<ShapeError>([&] {
          Layer3(test::random_matrix(3, 4, 1), bank(), {.slots_per_expert = 2});
        }) == "SoftMoE: phi is [3, 4], expected [6, 4]");

  Layer3 layer = soft({});
  Layer3::Cache cache;
  Matrix<double> x = test::random_matrix(5, 4, 1);
  CHECK(test::message_of<StateError>([&] { layer.backward(x, cache); }) ==
        "SoftMoE::backward: the cache is empty, expected a forward pass that succeeded");
  CHECK(test::message_of<ShapeError>([&] { infer(layer, x.leftCols(3)); }) ==
        "SoftMoE::forward: x is [5, 3], expected [tokens, 4]");
  layer.forward(x, kTraining, cache);
  CHECK(test::message_of<ShapeError>([&] { layer.backward(x.topRows(2), cache); }) ==
        "SoftMoE::backward: dy is [2, 4], expected [5, 4]");
  x(2, 1) = std::numeric_limits<double>::quiet_NaN();
  CHECK(test::message_of<NonFiniteError>([&] { layer.forward(x, kTraining, cache); }) ==
        "SoftMoE: logits[2, 0] = nan, expected a finite number");
}

}  // namespace weir::soft_moe_test
