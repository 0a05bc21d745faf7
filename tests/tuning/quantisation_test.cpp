// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/latent.hpp>
#include <weir/core/input_samples.hpp>
#include <weir/kernels/packed_weight.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/clamped_glu_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/tuning/gptq.hpp>
#include <weir/tuning/quantisation.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::quantisation_test {

namespace {

template <class Bank>
auto mixture(Bank bank) {
  Rng rng(7);
  LinearRouter<float> router(bank.d_in(), bank.experts(), rng, {.init_scale = 4.0});
  return MoELayer(std::move(router), TopKSoftmax<float>({.k = 2}), Dropless(), std::move(bank));
}

Decoder<float> make_decoder() {
  Rng rng(1);
  std::vector<Block<float>> layers;
  for (int l = 0; l < 2; ++l) {
    layers.push_back(pre_norm_block<float>(
        RmsNorm<float>(32),
        GroupedQueryAttention<float>(rng, {.d_model = 32, .heads = 2, .kv_heads = 1}),
        RmsNorm<float>(32),
        SharedExperts(mixture(GluBank<float>(32, 3, 40, rng)), Glu<float>(32, 24, rng)), "moe"));
  }
  return {Embedding<float>(50, 32, rng, {.stddev = 1.0}), std::move(layers), RmsNorm<float>(32),
          std::optional<Linear<float>>(Linear<float>(32, 50, rng))};
}

std::vector<Index> ids(Index count, std::uint64_t seed) {
  Rng rng(seed);
  std::vector<Index> ids;
  for (Index i = 0; i < count; ++i) ids.push_back(rng.below(50));
  return ids;
}

/// Rows whose inputs depend on each other, and some of which are much larger than others.
Matrix<float> correlated(Index rows, Index cols, std::uint64_t seed) {
  const Matrix<float> mix = test::random_matrix<float>(cols / 4, cols, 100);
  Matrix<float> x = test::random_matrix<float>(rows, cols / 4, seed) * mix +
                    0.2F * test::random_matrix<float>(rows, cols, seed + 1);
  for (Index i = 0; i < cols; i += 7) x.col(i) *= 6.0F;
  return x;
}

double output_error(const Matrix<float>& x, const Matrix<float>& stored,
                    const Matrix<float>& weight) {
  return test::relative_error(Matrix<float>(x * stored.transpose()),
                              Matrix<float>(x * weight.transpose()));
}

Matrix<float> stored_as(Storage storage, const Matrix<float>& weight) {
  Matrix<float> stored;
  kernels::PackedWeight<float>(weight, storage).unpack(stored);
  return stored;
}

}  // namespace

TEST_CASE("Samples are the rows that a weight was multiplied with", "[tuning][samples]") {
  Rng rng(1);
  const Linear<float> layer(5, 3, rng);
  const Matrix<float> x = test::random_matrix<float>(6, 5, 1);
  Linear<float>::Cache cache;
  InputSamples samples(8);
  CHECK(samples.of(layer.weight()).rows() == 0);
  CHECK(samples.of(layer.weight()).cols() == 5);
  layer.forward(x, {.inputs = &samples}, cache);
  CHECK(samples.of(layer.weight()) == x);

  // Padding is left out; beyond the most, rows take the places of others.
  const std::vector<std::uint8_t> mask = {0, 1, 1, 0, 1, 1};
  InputSamples some(3);
  layer.forward(x, {.mask = mask, .inputs = &some}, cache);
  const Matrix<float> kept = some.of(layer.weight());
  REQUIRE(kept.rows() == 3);
  for (Index i = 0; i < 3; ++i) {
    CHECK((kept.row(i) == x.row(1) || kept.row(i) == x.row(2) || kept.row(i) == x.row(4) ||
           kept.row(i) == x.row(5)));
  }
  CHECK(test::message_of<ConfigError>([] { InputSamples(0); }) ==
        "InputSamples: most = 0, expected >= 1");
}

TEST_CASE("Every row has the same chance to be a sample", "[tuning][samples]") {
  InputSamples samples(50);
  Parameter<double> weight{Matrix<double>::Zero(2, 1)};
  Matrix<double> x(10, 1);
  for (Index step = 0; step < 100; ++step) {
    for (Index i = 0; i < 10; ++i) x(i, 0) = static_cast<double>(10 * step + i);
    samples.see(weight, x, {});
  }
  const Matrix<float> kept = samples.of(weight);
  REQUIRE(kept.rows() == 50);
  CHECK(std::set<float>(kept.data(), kept.data() + 50).size() == 50);
  CHECK(kept.mean() == Approx(500.0).margin(150.0));
  CHECK(kept.minCoeff() < 150.0F);
  CHECK(kept.maxCoeff() > 850.0F);
}

TEST_CASE("All layers show what their weights are multiplied with", "[tuning][samples]") {
  Rng rng(3);
  const Matrix<float> x = test::random_matrix<float>(20, 16, 1);
  const auto check = [&](auto layer, std::size_t weights) {
    typename decltype(layer)::Cache cache;
    for (const bool training : {false, true}) {
      InputSamples samples;
      layer.forward(x, {.training = training, .inputs = &samples}, cache);
      const StorageReport report = storage_report(layer, {{"*", Storage::kInt8}}, &samples);
      CHECK(report.weights.size() == weights);
      for (const StoredWeight& weight : report.weights) {
        INFO(weight.name);
        CHECK(weight.output_error > 1e-5);
        CHECK(weight.output_error < 0.02);
      }
    }
  };
  check(Linear<float>(16, 9, rng), 1);
  check(Glu<float>(16, 9, rng), 3);
  check(Mlp<float>(16, 9, rng, {.bias = true}), 2);
  check(mixture(GluBank<float>(16, 3, 9, rng)), 9);
  check(mixture(MlpBank<float>(16, 3, 9, rng, {.bias = true, .init_scale = 1.0})), 6);
  check(mixture(ClampedGluBank<float>(16, 3, 9, rng)), 9);
  check(GroupedQueryAttention<float>(rng,
                                     {.d_model = 16, .heads = 2, .kv_heads = 1, .qkv_bias = true}),
        4);
  check(LatentAttention<float>(rng, {.d_model = 16,
                                     .heads = 2,
                                     .q_rank = 8,
                                     .kv_rank = 8,
                                     .nope_dim = 4,
                                     .rope_dim = 4,
                                     .value_dim = 4}),
        6);
}

TEST_CASE("Rounding for sampled inputs keeps products better than plain rounding",
          "[tuning][quantisation]") {
  const Matrix<float> weight = test::random_matrix<float>(24, 112, 3);
  const Matrix<float> x = correlated(300, 112, 4);
  const Matrix<float> fresh = correlated(300, 112, 6);
  const Matrix<float> plain = stored_as(Storage::kInt4, weight);
  Matrix<float> rounded = weight;
  round_to_int4_for<float>(x, 0.01, rounded);

  CHECK(output_error(x, rounded, weight) < 0.6 * output_error(x, plain, weight));
  CHECK(output_error(fresh, rounded, weight) < 0.7 * output_error(fresh, plain, weight));
  // The storage keeps these numbers.
  CHECK(test::relative_error(stored_as(Storage::kInt4, rounded), rounded) < 1e-6);
  CHECK(test::relative_error(rounded, weight) < 0.25);
}

TEST_CASE("Calibration survives few rows, dead inputs and blocks of equal numbers",
          "[tuning][quantisation]") {
  Matrix<double> weight = test::random_matrix(7, 70, 3);
  weight.row(0).setZero();
  weight.row(1).setConstant(0.5);
  Matrix<float> x = test::random_matrix<float>(3, 70, 4);
  x.leftCols(10).setZero();
  Matrix<double> rounded = weight;
  round_to_int4_for<double>(x, 0.01, rounded);
  CHECK(rounded.allFinite());
  CHECK(rounded.row(0).isZero(1e-6));
  CHECK(test::relative_error(rounded, weight) < 0.4);
  rounded = weight;
  round_to_int4_for<double>(Matrix<float>::Zero(2, 70), 0.01, rounded);
  CHECK(test::relative_error(rounded, weight) < 0.12);
}

TEST_CASE("A calibrated model is nearer to the exact one", "[tuning][quantisation]") {
  const StorageRules rules = {
      {"*.experts", Storage::kInt4}, {"*.shared", Storage::kInt4}, {"*.attention", Storage::kInt8}};
  Decoder<float> model = make_decoder();
  const std::vector<Index> text = ids(400, 1);
  const std::vector<Index> other = ids(100, 2);
  const Matrix<float> exact = infer(model, other);
  Decoder<float> plain = model;
  set_storage(plain, rules);

  InputSamples samples;
  Decoder<float>::Cache cache;
  model.forward(text, {.inputs = &samples}, cache);
  CHECK(calibrate(model, rules, samples) == 2 * (9 + 3));
  CHECK(is_trainable(model));
  const Matrix<float> calibrated = infer(model, other);
  set_storage(model, {{"*.experts", Storage::kInt4}, {"*.shared", Storage::kInt4}});
  CHECK(test::relative_error(infer(model, other), calibrated) < 1e-5);
  set_storage(model, rules);
  const double error = test::relative_error(infer(model, other), exact);
  CHECK(error < 0.95 * test::relative_error(infer(plain, other), exact));

  CHECK(test::message_of<ConfigError>([&] { calibrate(plain, rules, samples, 0.0); }) ==
        "calibrate: damping = 0, expected a finite number > 0");
  CHECK(test::message_of<StateError>([&] { calibrate(plain, rules, samples); }) ==
        "calibrate: part 'layers.0.attention' is stored for inference, expected "
        "Storage::kTrainable");
  CHECK(test::message_of<StateError>([&] { storage_report(plain, rules); }) ==
        "storage_report: part 'layers.0.attention' is stored for inference, expected "
        "Storage::kTrainable");
}

TEST_CASE("A report says what each weight becomes", "[tuning][quantisation]") {
  Decoder<float> model = make_decoder();
  const StorageRules rules = {{"*.0.*.experts", Storage::kTrainable},
                              {"*.experts", Storage::kInt4},
                              {"*.attention", Storage::kInt8},
                              {"head", Storage::kBfloat16}};
  const StorageReport report = storage_report(model, rules);
  CHECK(is_trainable(model));
  CHECK(report.weights.size() == 4 + 4 + 9 + 1);
  const StoredWeight& last = report.weights.back();
  CHECK(last.name == "head.weight");
  CHECK(last.storage == Storage::kBfloat16);
  CHECK(last.rows == 50);
  CHECK(last.cols == 32);
  CHECK(last.bytes == kernels::PackedWeight<float>::bytes(50, 32, Storage::kBfloat16));
  CHECK(last.output_error == -1.0);
  const Matrix<float>& head = parameters(model).back().parameter->value;
  CHECK(last.weight_error == Approx(test::relative_error(stored_as(last.storage, head), head)));
  std::size_t bytes = 0;
  for (const StoredWeight& weight : report.weights) {
    bytes += weight.bytes;
    const double most = weight.storage == Storage::kInt4 ? 0.12 : 0.02;
    CHECK(weight.weight_error < most);
    CHECK(weight.weight_error > 1e-4);
  }
  CHECK(report.bytes() == bytes);
}

}  // namespace weir::quantisation_test
