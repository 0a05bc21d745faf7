// SPDX-License-Identifier: MIT
// Layers in training with rounded products, against the scheme computed apart in double.
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/latent.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/optim/set_precision.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/rounded_glu.hpp"
#include "support/rounded_products.hpp"
#include "support/threads.hpp"

namespace weir::rounded_layers_test {

using test::Real;

namespace {

/// A number next to the border between two codes may fall on either side of it in float. With
/// E4M3 codes that is a sixteenth of the number; it happens to one in thousands.
double tolerance(Precision precision) {
  return precision == Precision::kFp8 ? 4e-3 : 4e-4;
}

Real real(const Matrix<float>& m) {
  return m.cast<double>();
}

}  // namespace

TEST_CASE("Linear is trained with products of the scheme", "[nn][linear][precision]") {
  const Precision precision = GENERATE(Precision::kBfloat16, Precision::kFp8);
  const bool padded = GENERATE(false, true);
  Rng rng(1);
  Linear<float> layer(140, 70, rng, {.bias = true});
  layer.bias().value = test::random_matrix<float>(1, 70, 4);
  set_precision(layer, precision);
  Matrix<float> x = test::random_matrix<float>(150, 140, 2);
  Matrix<float> dy = 1e-3F * test::random_matrix<float>(150, 70, 3);
  x(3, 5) = 100.0F;
  std::vector<std::uint8_t> mask;
  if (padded) {
    mask.assign(150, 1);
    mask[7] = 0;
    x.row(7).setConstant(NAN);
    dy.row(7).setConstant(NAN);
  }
  Linear<float>::Cache cache;
  const Matrix<float> y = layer.forward(x, {.training = true, .mask = mask}, cache);
  CHECK((cache.x.size() == 0) == (precision == Precision::kFp8));  // It is kept once.
  const Matrix<float> dx = layer.backward(dy, cache);
  if (padded) {
    CHECK(y.row(7).isZero(0.0F));
    CHECK(dx.row(7).isZero(0.0F));
    x.row(7).setZero();
    dy.row(7).setZero();
  }
  const Real w = real(layer.weight().value);
  Real expected = test::forward(precision, real(x), w).rowwise() + real(layer.bias().value).row(0);
  if (padded) expected.row(7).setZero();
  CHECK(test::relative_error(real(y), expected) < 1e-5);
  CHECK(test::relative_error(real(dx), test::input_gradient(precision, real(dy), w)) < 1e-5);
  const Real kept = test::kept(precision, real(x));
  CHECK(test::relative_error(real(layer.weight().grad),
                             test::weight_gradient(precision, real(dy), kept)) < 1e-5);
  CHECK(test::relative_error(layer.bias().grad, dy.colwise().sum()) < 1e-5);
}

TEST_CASE("Glu is trained with products of the scheme", "[nn][glu][precision]") {
  const Precision precision = GENERATE(Precision::kBfloat16, Precision::kFp8);
  Rng rng(1);
  Glu<float> layer(150, 140, rng);
  set_precision(layer, precision);
  const Matrix<float> x = test::random_matrix<float>(130, 150, 2);
  const Matrix<float> dy = 1e-2F * test::random_matrix<float>(130, 150, 3);
  Glu<float>::Cache cache;
  const Matrix<float> y = layer.forward(x, kTraining, cache);
  const Matrix<float> dx = layer.backward(dy, cache);
  const test::RoundedGlu expected(precision, real(x), real(layer.gate().value),
                                  real(layer.up().value), real(layer.down().value));
  const test::RoundedGlu::Gradients d = expected.backward(real(dy));
  const double most = tolerance(precision);
  CHECK(test::relative_error(real(y), expected.y) < most);
  CHECK(test::relative_error(real(dx), d.x) < most);
  CHECK(test::relative_error(real(layer.gate().grad), d.gate) < most);
  CHECK(test::relative_error(real(layer.up().grad), d.up) < most);
  CHECK(test::relative_error(real(layer.down().grad), d.down) < most);
}

TEST_CASE("Attention is trained with products of the scheme", "[attention][precision]") {
  // A token that is alone in its sequence attends to itself: only values count.
  const Precision precision = GENERATE(Precision::kBfloat16, Precision::kFp8);
  Rng rng(1);
  GroupedQueryAttention<float> layer(rng, {.d_model = 140, .heads = 5, .kv_heads = 5});
  set_precision(layer, precision);
  const Matrix<float> x = test::random_matrix<float>(40, 140, 2);
  const Matrix<float> dy = 1e-2F * test::random_matrix<float>(40, 140, 3);
  const Sequences alone = Sequences::uniform(40, 1);
  GroupedQueryAttention<float>::Cache cache;
  const Matrix<float> y = layer.forward(x, {.training = true, .sequences = &alone}, cache);
  const Matrix<float> dx = layer.backward(dy, cache);
  const Real wv = real(layer.value().value);
  const Real wo = real(layer.output().value);
  const Real v = test::forward(precision, real(x), wv);
  const Real dv = test::input_gradient(precision, real(dy), wo);
  const double most = tolerance(precision);
  CHECK(test::relative_error(real(y), test::forward(precision, v, wo)) < most);
  CHECK(test::relative_error(real(dx), test::input_gradient(precision, dv, wv)) < most);
  CHECK(test::relative_error(real(layer.value().grad),
                             test::weight_gradient(precision, dv, test::kept(precision, real(x)))) <
        most);
  CHECK(test::relative_error(real(layer.output().grad),
                             test::weight_gradient(precision, real(dy), v)) < most);
}

namespace {

/// Everything that a training step yields.
template <class L>
std::vector<Matrix<float>> step(L& layer, const Matrix<float>& x) {
  typename L::Cache cache;
  zero_gradients(layer);
  std::vector<Matrix<float>> all = {layer.forward(x, kTraining, cache)};
  all.push_back(layer.backward(Matrix<float>(1e-2F * all[0]), cache));
  for (const auto& [name, parameter] : parameters(layer)) all.push_back(parameter->gradient());
  return all;
}

/// Rounded steps are near exact ones, differ from them, and have the same bits on several threads.
template <class L>
void check_steps(L layer, Precision precision) {
  const Matrix<float> x = test::random_matrix<float>(70, 64, 5);
  const std::vector<Matrix<float>> exact = step(layer, x);
  set_precision(layer, precision);
  const std::vector<Matrix<float>> rounded = step(layer, x);
  {
    const test::Threads threads(2);
    CHECK(step(layer, x) == rounded);
  }
  for (std::size_t i = 0; i < exact.size(); ++i) {
    INFO("result " << i);
    const double error = test::relative_error(rounded[i], exact[i]);
    CHECK(error < (precision == Precision::kFp8 ? 0.25 : 0.02));
    CHECK(error > 1e-4);
  }
  typename L::Cache cache;
  const auto run = [&] {
    const Matrix<float>& y = layer.forward(x, kTraining, cache);
    layer.backward(y, cache);
  };
  run();
  run();
  CHECK(test::count_allocations(run) == 0);
}

}  // namespace

TEST_CASE("Training steps with rounded products stay near exact ones", "[nn][precision]") {
  const Precision precision = GENERATE(Precision::kBfloat16, Precision::kFp8);
  Rng rng(1);
  check_steps(Linear<float>(64, 50, rng), precision);
  check_steps(Glu<float>(64, 50, rng), precision);
  check_steps(Mlp<float>(64, 50, rng), precision);
  check_steps(GroupedQueryAttention<float>(rng, {.d_model = 64, .heads = 2, .kv_heads = 1}),
              precision);
  check_steps(LatentAttention<float>(rng, {.d_model = 64,
                                           .heads = 2,
                                           .q_rank = 24,
                                           .kv_rank = 32,
                                           .nope_dim = 16,
                                           .rope_dim = 8,
                                           .value_dim = 16}),
              precision);
}

TEST_CASE("Glu keeps less than a fifth as much in FP8", "[nn][glu][precision]") {
  if (!test::allocations_are_counted()) return;
  Rng rng(1);
  Glu<float> layer(256, 512, rng);
  const Matrix<float> x = test::random_matrix<float>(128, 256, 2);
  const auto bytes_kept = [&] {
    Glu<float>::Cache cache;
    const long before = test::bytes_in_use();
    {
      Workspace workspace;
      const Workspace::Lend lend(&workspace);  // As models do.
      layer.forward(x, kTraining, cache);
    }
    return test::bytes_in_use() - before;
  };
  bytes_kept();  // Threads get space of their own.
  const long exact = bytes_kept();
  set_precision(layer, Precision::kFp8);
  bytes_kept();
  const long rounded = bytes_kept();
  constexpr long kOutput = 4L * 128 * 256;
  // x, gate, up and hidden as they are; x, gate and up in a quarter of that and their scales.
  CHECK(exact - kOutput >= 4L * 128 * (256 + 3 * 512));
  CHECK(rounded - kOutput < 128L * (256 + 2 * 512) * 11 / 10);
}

}  // namespace weir::rounded_layers_test
