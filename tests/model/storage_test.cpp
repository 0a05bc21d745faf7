// SPDX-License-Identifier: MIT
// What set_storage promises, for every layer that keeps weights.
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/storage.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/any_bank.hpp>
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

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::storage_test {

namespace {

template <class T>
using Values = std::vector<std::pair<std::string, Matrix<T>>>;

/// Names and values of all parameters.
template <class Model>
Values<typename Model::Scalar> values(Model& model) {
  Values<typename Model::Scalar> values;
  for (auto& [name, parameter] : parameters(model)) values.emplace_back(name, parameter->value);
  return values;
}

template <class Bank>
auto mixture(Bank bank, std::uint64_t seed) {
  using T = typename Bank::Scalar;
  Rng rng(seed);
  LinearRouter<T> router(bank.d_in(), bank.experts(), rng, {.init_scale = 4.0});
  return MoELayer(std::move(router), TopKSoftmax<T>({.k = 2}), Dropless(), std::move(bank));
}

/// Weights that become codes.
constexpr Storage kCodes[] = {Storage::kInt8,  Storage::kInt4,    Storage::kFp8,
                              Storage::kMxFp4, Storage::kInt8Dot, Storage::kInt4Dot};

/// \param weights  How many of the parameters are kept elsewhere when stored for inference.
/// \param message  What backward says then.
template <class L>
void check_storage(L layer, const Matrix<typename L::Scalar>& x, std::size_t weights,
                   const std::string& message) {
  using T = typename L::Scalar;
  const double kSame = std::is_same_v<T, float> ? 1e-6 : 1e-14;
  typename L::Cache cache;
  const Matrix<T> plain = infer(layer, x);
  const Values<T> before = values(layer);
  layer.forward(x, kTraining, cache);

  set_storage(layer, Storage::kPacked);
  CHECK(test::message_of<StateError>([&] { layer.backward(plain, cache); }) == message);
  CHECK(parameters(layer).size() == before.size() - weights);
  const auto run = [&]() -> const Matrix<T>& { return layer.forward(x, Pass{}, cache); };
  CHECK(test::relative_error(run(), plain) <= kSame);
  CHECK(infer(layer, x) == run());
  run();
  CHECK(test::count_allocations(run) == 0);
  {
    const Matrix<T> one = infer(layer, x);
    const test::Threads threads(3);
    CHECK(infer(layer, x) == one);
  }
  L copy = layer;
  const Matrix<T> packed = infer(layer, x);
  CHECK(infer(copy, x) == packed);

  set_storage(layer, Storage::kTrainable);
  CHECK(values(layer) == before);
  CHECK(layer.forward(x, kTraining, cache) == plain);
  layer.backward(plain, cache);

  set_storage(layer, Storage::kBfloat16);
  const double error = test::relative_error(run(), plain);
  CHECK(error > 1e-4);
  CHECK(error < 2e-2);
  const Matrix<T> rounded = infer(layer, x);
  const L rounded_copy = layer;

  // From one storage for inference to the other: what was rounded stays so.
  set_storage(layer, Storage::kPacked);
  CHECK(test::relative_error(infer(layer, x), rounded) < 1e-2);
  set_storage(layer, Storage::kTrainable);
  const Values<T> after = values(layer);
  REQUIRE(after.size() == before.size());
  std::size_t changed = 0;
  for (std::size_t i = 0; i < after.size(); ++i) {
    INFO(after[i].first);
    CHECK(after[i].first == before[i].first);
    const double difference = test::relative_error(after[i].second, before[i].second);
    CHECK(difference < 4e-3);
    changed += difference > 0.0 ? 1 : 0;
  }
  CHECK(changed == weights);
  if constexpr (std::is_same_v<T, double>) {
    // In double, tokens are not rounded: the rounded weights as parameters compute the same.
    CHECK(test::relative_error(infer(layer, x), rounded) <= kSame);
  }

  for (const Storage storage : kCodes) {
    INFO("storage " << static_cast<int>(storage));
    L coded = copy;
    set_storage(coded, storage);
    CHECK(parameters(coded).size() == before.size() - weights);
    const auto run_coded = [&]() -> const Matrix<T>& { return coded.forward(x, Pass{}, cache); };
    const double coded_error = test::relative_error(run_coded(), plain);
    const bool is_int8 = storage == Storage::kInt8 || storage == Storage::kInt8Dot;
    CHECK(coded_error > 1e-4);
    CHECK(coded_error < (is_int8 ? 0.03 : 0.4));
    CHECK(test::count_allocations(run_coded) == 0);
    const Matrix<T> one = infer(coded, x);
    const test::Threads threads(3);
    CHECK(infer(coded, x) == one);
    set_storage(coded, Storage::kTrainable);
    if (storage != Storage::kInt8Dot && storage != Storage::kInt4Dot) {
      CHECK(test::relative_error(infer(coded, x), one) <= 10.0 * kSame);
    }
  }

  // Copies share what is packed, and keep it whatever becomes of the original.
  CHECK(infer(rounded_copy, x) == rounded);
  CHECK(infer(copy, x) == packed);
  set_storage(copy, Storage::kTrainable);
  CHECK(values(copy) == before);
}

const std::string kStored = ": the weights are stored for inference, expected Storage::kTrainable";

}  // namespace

TEMPLATE_TEST_CASE("Dense layers compute the same in every storage", "[core][storage]", float,
                   double) {
  using T = TestType;
  Rng rng(1);
  // Odd widths, wider than a panel.
  const Matrix<T> x = test::random_matrix<T>(9, 35, 1);
  SECTION("Linear") {
    check_storage(Linear<T>(35, 67, rng, {.bias = true}), x, 1, "Linear::backward" + kStored);
  }
  SECTION("Glu") {
    check_storage(Glu<T>(35, 71, rng), x, 3, "Glu::backward" + kStored);
  }
  SECTION("Mlp") {
    check_storage(Mlp<T>(35, 71, rng, {.bias = true}), x, 2, "Mlp::backward" + kStored);
  }
}

TEMPLATE_TEST_CASE("Mixtures compute the same in every storage", "[moe][storage]", float, double) {
  using T = TestType;
  Rng rng(2);
  const Matrix<T> x = test::random_matrix<T>(40, 35, 1);
  SECTION("GluBank") {
    check_storage(mixture(GluBank<T>(35, 3, 71, rng), 1), x, 9, "GluBank::backward" + kStored);
  }
  SECTION("MlpBank") {
    check_storage(mixture(MlpBank<T>(35, 3, 71, rng, {.bias = true, .init_scale = 1.0}), 1), x, 6,
                  "MlpBank::backward" + kStored);
  }
  SECTION("ClampedGluBank") {
    check_storage(mixture(ClampedGluBank<T>(35, 3, 71, rng), 1), x, 9,
                  "ClampedGluBank::backward" + kStored);
  }
  SECTION("Shared experts") {
    check_storage(SharedExperts(mixture(GluBank<T>(35, 3, 71, rng), 1), Glu<T>(35, 40, rng)), x, 12,
                  "GluBank::backward" + kStored);
  }
}

TEST_CASE("Banks stored for inference have the same bits for any number of threads",
          "[moe][storage][parallel][slow]") {
  const auto storage =
      GENERATE(Storage::kPacked, Storage::kBfloat16, Storage::kInt4, Storage::kInt8Dot);
  // Experts with one to three tokens among them, and many panels.
  const auto tokens = GENERATE(as<Index>{}, 1, 2, 3, 40);
  const Matrix<float> x = test::random_matrix<float>(tokens, 160, 1);
  const auto check = [&](auto moe) {
    set_storage(moe, storage);
    const Matrix<float> one = infer(moe, x);
    for (const int count : {2, 3}) {
      const test::Threads threads(count);
      CHECK(infer(moe, x) == one);
    }
  };
  Rng rng(7);
  check(mixture(GluBank<float>(160, 3, 1000, rng), 1));
  check(mixture(MlpBank<float>(160, 3, 1000, rng, {.bias = true, .init_scale = 1.0}), 1));
}

TEST_CASE("The experts of a bank stored for inference share one memory", "[moe][storage]") {
  if (!test::allocations_are_counted()) return;
  const auto storage = GENERATE(Storage::kPacked, Storage::kBfloat16);
  const auto check = [&](auto few, auto many) {
    const long of_few = test::count_allocations([&] { set_storage(few, storage); });
    CHECK(of_few > 0);
    CHECK(test::count_allocations([&] { set_storage(many, storage); }) == of_few);
    CHECK(test::count_allocations([&] { set_storage(many, storage); }) == 0);
  };
  Rng rng(8);
  check(GluBank<float>(35, 2, 71, rng), GluBank<float>(35, 9, 71, rng));
  check(MlpBank<float>(35, 2, 71, rng), MlpBank<float>(35, 9, 71, rng));
  check(ClampedGluBank<float>(35, 2, 71, rng), ClampedGluBank<float>(35, 9, 71, rng));
}

TEST_CASE("A bank of layers stores those", "[moe][storage]") {
  Rng rng(3);
  auto moe =
      mixture(AnyBank<Glu<float>>({Glu<float>(8, 40, rng), Glu<float>(8, 40, rng)}, 8, 8), 1);
  const Matrix<float> x = test::random_matrix<float>(30, 8, 1);
  const Matrix<float> plain = infer(moe, x);
  set_storage(moe, Storage::kPacked);
  CHECK(parameters(moe).size() == 1);
  CHECK(test::relative_error(infer(moe, x), plain) < 1e-6);
}

TEMPLATE_TEST_CASE("Attention computes the same in every storage", "[attention][storage]", float,
                   double) {
  using T = TestType;
  Rng rng(4);
  GroupedQueryAttention<T> attention(rng, {.d_model = 36,
                                           .heads = 4,
                                           .kv_heads = 2,
                                           .head_dim = 10,
                                           .qkv_bias = true,
                                           .output_bias = true});
  const Matrix<T> x = test::random_matrix<T>(12, 36, 1);
  check_storage(attention, x, 4, "GroupedQueryAttention::backward" + kStored);

  set_storage(attention, Storage::kBfloat16);
  typename GroupedQueryAttention<T>::Cache cache;
  KvCache<T> kv;
  Matrix<T> decoded(12, 36);
  for (Index t = 0; t < 12; ++t) decoded.row(t) = decode(attention, x.row(t), kv, cache);
  CHECK(test::relative_error(decoded, infer(attention, x)) <= 1e-5);
}

TEST_CASE("A decoder stores its layers and its head", "[model][storage]") {
  using T = float;
  const bool tied = GENERATE(false, true);
  Rng rng(5);
  const auto make = [&] {
    std::vector<Block<T>> layers;
    for (int l = 0; l < 2; ++l) {
      layers.push_back(pre_norm_block<T>(
          RmsNorm<T>(16), GroupedQueryAttention<T>(rng, {.d_model = 16, .heads = 2, .kv_heads = 1}),
          RmsNorm<T>(16), mixture(GluBank<T>(16, 3, 24, rng), 6), "moe"));
    }
    return Decoder<T>(Embedding<T>(50, 16, rng, {.stddev = 1.0}), std::move(layers), RmsNorm<T>(16),
                      tied ? std::nullopt : std::optional<Linear<T>>(Linear<T>(16, 50, rng)));
  };
  Decoder<T> decoder = make();
  const std::vector<Index> ids = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3};
  const Matrix<T> plain = infer(decoder, ids);
  const Values<T> before = values(decoder);

  set_storage(decoder, Storage::kPacked);
  CHECK(test::relative_error(infer(decoder, ids), plain) < 1e-5);
  // What is left: norms, routers and, where it is not the head as well, the embedding.
  CHECK(parameters(decoder).size() == 2 * 3 + 1 + (tied ? 0 : 1));
  Decoder<T>::Cache cache;
  decoder.forward(ids, kTraining, cache);
  CHECK(test::message_of<StateError>([&] { decoder.backward(plain, cache); }) ==
        (tied ? "LanguageHead::backward" : "Linear::backward") + kStored);
  Decoder<T>::State state;
  Matrix<T> decoded(plain.rows(), plain.cols());
  for (std::size_t t = 0; t < ids.size(); ++t) {
    decoded.row(static_cast<Index>(t)) = decode(decoder, std::span(&ids[t], 1), state, cache);
  }
  CHECK(test::relative_error(decoded, plain) < 1e-5);

  set_storage(decoder, Storage::kTrainable);
  CHECK(values(decoder) == before);
  CHECK(infer(decoder, ids) == plain);

  set_storage(decoder, Storage::kBfloat16);
  const double error = test::relative_error(infer(decoder, ids), plain);
  CHECK(error > 1e-4);
  CHECK(error < 5e-2);
}

}  // namespace weir::storage_test
