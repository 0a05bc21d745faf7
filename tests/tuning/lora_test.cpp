// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/latent.hpp>
#include <weir/core/verbs.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/generate.hpp>
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
#include <weir/optim/adamw.hpp>
#include <weir/optim/set_precision.hpp>
#include <weir/tuning/lora.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::lora_test {

namespace {

template <class Bank>
auto mixture(Bank bank) {
  using T = typename Bank::Scalar;
  Rng rng(7);
  LinearRouter<T> router(bank.d_in(), bank.experts(), rng, {.init_scale = 4.0});
  return MoELayer(std::move(router), TopKSoftmax<T>({.k = 2}), Dropless(), std::move(bank));
}

template <class T>
auto glu_mixture() {
  Rng rng(3);
  return mixture(GluBank<T>(6, 4, 5, rng));
}

/// Numbers in place of the zeros that B starts from.
template <class Layer>
void move_adapters(Layer& layer, std::uint64_t seed) {
  using T = typename Layer::Scalar;
  for (auto& [name, parameter] : parameters(layer)) {
    if (!matches_pattern("*.lora_B.*", name)) continue;
    parameter->value =
        test::random_matrix<T>(parameter->value.rows(), parameter->value.cols(), ++seed);
  }
}

/// The layer with W + scale B A in the place of W and without adapters, put together by Eigen.
template <class Layer>
Layer folded(Layer layer) {
  using T = typename Layer::Scalar;
  for (auto& found : linear_weights(layer)) {
    for (const LowRank<T>& adapter : found.weight->adapters) {
      const auto rank = static_cast<double>(adapter.a.value.rows());
      const double scale = adapter.alpha / (adapter.rank_stabilised ? std::sqrt(rank) : rank);
      found.weight->value += static_cast<T>(scale) * adapter.b.value * adapter.a.value;
    }
    found.weight->adapters.clear();
  }
  return layer;
}

template <class Layer>
void check_adapted(Layer layer, Index d_in, std::string_view pattern) {
  Rng rng(11);
  const Matrix<double> x = test::random_matrix<double>(5, d_in, 1);
  const Matrix<double> before = infer(layer, x);
  add_lora(layer, pattern, rng, {.name = "one", .rank = 2, .alpha = 3.0});
  add_lora(layer, pattern, rng, {.name = "two", .rank = 3, .alpha = 1.0, .rank_stabilised = true});
  CHECK(infer(layer, x) == before);

  move_adapters(layer, 50);
  CHECK(test::relative_error(infer(layer, x), infer(folded(layer), x)) < 1e-12);
  CHECK(infer(layer, x, {.adapters = ""}) == before);
  const Matrix<double> one = infer(layer, x, {.adapters = "one"});
  CHECK(test::relative_error(one, before) > 1e-3);
  auto only_one = layer;
  CHECK(remove_lora(only_one, "two") > 0);
  CHECK(infer(only_one, x) == one);

  test::check_gradients(layer, x);
}

}  // namespace

TEST_CASE("Adapters of each layer are what Eigen folds into its weights, and have its gradients",
          "[tuning][gradient]") {
  Rng rng(2);
  SECTION("Linear") {
    check_adapted(Linear<double>(6, 4, rng, {.bias = true}), 6, "weight");
  }
  SECTION("Mlp") {
    check_adapted(Mlp<double, Silu>(6, 5, rng, {.bias = true}), 6, "*");
  }
  SECTION("Glu") {
    check_adapted(Glu<double>(6, 5, rng), 6, "*");
  }
  SECTION("GroupedQueryAttention") {
    check_adapted(GroupedQueryAttention<double>(
                      rng, {.d_model = 8, .heads = 2, .kv_heads = 1, .qkv_bias = true}),
                  8, "*");
  }
  SECTION("LatentAttention") {
    check_adapted(LatentAttention<double>(rng, {.d_model = 8,
                                                .heads = 2,
                                                .q_rank = 5,
                                                .kv_rank = 4,
                                                .nope_dim = 3,
                                                .rope_dim = 2,
                                                .value_dim = 3}),
                  8, "*");
  }
  SECTION("GluBank, all experts") {
    check_adapted(glu_mixture<double>(), 6, "experts.*");
  }
  SECTION("GluBank, two experts") {
    check_adapted(glu_mixture<double>(), 6, "experts.1.*");
  }
  SECTION("the router") {
    check_adapted(glu_mixture<double>(), 6, "router.weight");
  }
  SECTION("MlpBank") {
    check_adapted(mixture(MlpBank<double, Silu>(6, 4, 5, rng, {.bias = true})), 6, "experts.*");
  }
  SECTION("ClampedGluBank") {
    check_adapted(mixture(ClampedGluBank<double>(6, 4, 5, rng)), 6, "experts.*.gate");
  }
}

TEST_CASE("The scale of an adapter is alpha / rank or alpha / sqrt(rank)", "[tuning]") {
  // x = (1, 2), A = (3, 4), B = (5, 6)^T: x A^T = 11, so that B adds 11 scale (5, 6).
  Linear<double> layer{Matrix<double>(Matrix<double>::Zero(2, 2))};
  Rng rng(1);
  const auto check = [&](const LoraConfig& config, double scale) {
    add_lora(layer, "weight", rng, config);
    LowRank<double>& adapter = layer.weight().adapters[0];
    adapter.a.value.setZero();
    adapter.a.value.row(0) << 3.0, 4.0;
    adapter.b.value.col(0) << 5.0, 6.0;
    Matrix<double> x(1, 2);
    x << 1.0, 2.0;
    const Matrix<double> y = infer(layer, x);
    CHECK(y(0, 0) == Approx(55.0 * scale));
    CHECK(y(0, 1) == Approx(66.0 * scale));
    remove_lora(layer, config.name);
  };
  check({.rank = 1, .alpha = 8.0}, 8.0);
  check({.rank = 4, .alpha = 8.0}, 2.0);
  check({.rank = 4, .alpha = 8.0, .rank_stabilised = true}, 4.0);
}

TEST_CASE("Dropout of adapters has its expected value, its derivative, and leaves the base alone",
          "[tuning][gradient]") {
  Rng rng(5);
  auto layer = glu_mixture<double>();
  freeze(layer, "*");
  add_lora(layer, "*", rng, {.rank = 2, .dropout = 0.4});
  move_adapters(layer, 9);
  Matrix<double> x = test::random_matrix<double>(4, 6, 2);
  const Matrix<double> weight = test::random_matrix<double>(4, 6, 3);
  using Cache = decltype(layer)::Cache;
  const auto objective = [&] {
    Rng same(77);
    Cache cache;
    return layer.forward(x, {.training = true, .rng = &same}, cache).cwiseProduct(weight).sum();
  };
  Rng same(77);
  Cache cache;
  layer.forward(x, {.training = true, .rng = &same}, cache);
  const Matrix<double> dx = layer.backward(weight, cache);
  CHECK(test::relative_error(dx, test::numeric_gradient(x, objective)) < 1e-6);
  for (auto& [name, parameter] : parameters(layer)) {
    if (!matches_pattern("*.lora_*", name)) {
      INFO(name);
      CHECK((parameter->grad.size() == 0));  // A frozen weight.
      continue;
    }
    const Matrix<double> gradient = parameter->gradient();
    CHECK(test::relative_error(gradient, test::numeric_gradient(parameter->value, objective)) <
          1e-6);
  }
  CHECK(test::message_of<ConfigError>([&] { layer.forward(x, kTraining, cache); }) ==
        "LowRank::dropout: pass.rng = null, expected a generator in training");

  Linear<double> linear(6, 3, rng);
  add_lora(linear, "weight", rng, {.rank = 2, .dropout = 0.4});
  move_adapters(linear, 9);
  const Matrix<double> exact = infer(linear, x);
  Matrix<double> sum = Matrix<double>::Zero(4, 3);
  Linear<double>::Cache linear_cache;
  for (int i = 0; i < 20000; ++i) {
    sum += linear.forward(x, {.training = true, .rng = &rng}, linear_cache);
  }
  CHECK(test::relative_error(Matrix<double>(sum / 20000.0), exact) < 0.02);
}

TEST_CASE("Merging changes no output, and unmerging brings the weights back", "[tuning]") {
  Rng rng(5);
  auto layer = glu_mixture<double>();
  const auto original = layer;
  add_lora(layer, "*", rng, {.name = "a", .rank = 2});
  add_lora(layer, "*.down", rng, {.name = "b", .rank = 2});
  move_adapters(layer, 9);
  const Matrix<double> x = test::random_matrix<double>(7, 6, 2);
  const Matrix<double> y = infer(layer, x);
  const Matrix<double> a_alone = infer(layer, x, {.adapters = "a"});

  CHECK(merge_lora(layer, "a") == 13);
  CHECK(test::relative_error(infer(layer, x), y) < 1e-12);
  CHECK(test::relative_error(infer(layer, x, {.adapters = ""}), a_alone) < 1e-12);
  CHECK(test::message_of<StateError>([&] { merge_lora(layer, "a"); }) ==
        "merge_lora: adapter 'a' of router.weight is merged already, expected one that is not");
  CHECK(unmerge_lora(layer, "a") == 13);
  CHECK(test::relative_error(infer(layer, x), y) < 1e-12);
  auto copy = original;
  const auto then = parameters(copy);
  for (const auto& [name, parameter] : then) {
    for (const auto& now : parameters(layer)) {
      if (now.name != name) continue;
      CHECK(test::relative_error(now.parameter->value, parameter->value) < 1e-14);
    }
  }
  CHECK(test::message_of<StateError>([&] { unmerge_lora(layer, "a"); }) ==
        "unmerge_lora: adapter 'a' of router.weight is not merged, expected one that is");

  merge_lora(layer, "a");
  remove_lora(layer, "a");
  CHECK(adapter_names(layer) == std::vector<std::string>{"b"});
  CHECK(test::relative_error(infer(layer, x), y) < 1e-12);
}

TEST_CASE("Weights stored for inference take adapters, which are trained through them",
          "[tuning][gradient]") {
  const auto storage =
      GENERATE(Storage::kPacked, Storage::kBfloat16, Storage::kInt8, Storage::kInt4);
  const auto check = [&](auto layer, Index d_in) {
    Rng rng(4);
    set_storage(layer, storage);
    auto base = layer;
    add_lora(layer, "*", rng, {.rank = 2});
    const Matrix<double> x = test::random_matrix<double>(6, d_in, 8);
    CHECK(test::relative_error(infer(layer, x), infer(base, x)) < 1e-6);
    move_adapters(layer, 30);

    auto widened = layer;
    set_storage(widened, Storage::kTrainable);
    CHECK(adapter_names(widened).size() == 1);
    CHECK(test::relative_error(infer(layer, x), infer(widened, x)) < 1e-6);

    // Gradients are those of the rounded weights as parameters.
    const Matrix<double> dy = test::random_matrix<double>(6, infer(layer, x).cols(), 9);
    typename decltype(layer)::Cache cache;
    layer.forward(x, {.training = true, .through_stored = true}, cache);
    const Matrix<double> dx = layer.backward(dy, cache);
    widened.forward(x, kTraining, cache);
    CHECK(test::relative_error(dx, widened.backward(dy, cache)) < 1e-6);
    Index compared = 0;
    for (const auto& [name, parameter] : parameters(layer)) {
      for (const auto& other : parameters(widened)) {
        if (other.name != name) continue;
        INFO(name);
        ++compared;
        CHECK(test::relative_error(parameter->grad, other.parameter->grad) < 1e-6);
      }
    }
    CHECK(compared >= 2);
    const auto step = [&] {
      layer.forward(x, {.training = true, .through_stored = true}, cache);
      layer.backward(dy, cache);
    };
    step();
    CHECK(test::count_allocations(step) == 0);  // The unpacked weights have their place.
    layer.forward(x, kTraining, cache);
    CHECK_THROWS_AS(layer.backward(dy, cache), StateError);
  };
  Rng rng(6);
  SECTION("Linear") {
    check(Linear<double>(33, 5, rng, {.bias = true}), 33);
  }
  SECTION("Mlp") {
    check(Mlp<double, Silu>(33, 40, rng), 33);
  }
  SECTION("Glu") {
    check(Glu<double>(33, 40, rng), 33);
  }
  SECTION("GroupedQueryAttention") {
    check(GroupedQueryAttention<double>(rng, {.d_model = 32, .heads = 2, .kv_heads = 1}), 32);
  }
  SECTION("LatentAttention") {
    check(LatentAttention<double>(rng, {.d_model = 32,
                                        .heads = 2,
                                        .q_rank = 5,
                                        .kv_rank = 4,
                                        .nope_dim = 3,
                                        .rope_dim = 2,
                                        .value_dim = 3}),
          32);
  }
  SECTION("GluBank") {
    check(mixture(GluBank<double>(32, 4, 33, rng)), 32);
  }
  SECTION("MlpBank") {
    check(mixture(MlpBank<double, Silu>(32, 4, 33, rng)), 32);
  }
  SECTION("ClampedGluBank") {
    check(mixture(ClampedGluBank<double>(32, 4, 33, rng)), 32);
  }
}

TEST_CASE("Adapters are trained beside weights whose products are rounded", "[tuning]") {
  const auto check = [&](auto layer) {
    Rng rng(4);
    freeze(layer, "*");
    add_lora(layer, "*", rng, {.rank = 2});
    move_adapters(layer, 30);
    auto rounded = layer;
    set_precision(rounded, Precision::kBfloat16);
    const Matrix<float> x = test::random_matrix<float>(40, 32, 8);
    const Matrix<float> dy = test::random_matrix<float>(40, 32, 9);
    typename decltype(layer)::Cache cache, rounded_cache;
    const Matrix<float> y = layer.forward(x, kTraining, cache);
    constexpr double kNear = 0.02;
    CHECK(test::relative_error(rounded.forward(x, kTraining, rounded_cache), y) < kNear);
    const Matrix<float> dx = layer.backward(dy, cache);
    CHECK(test::relative_error(rounded.backward(dy, rounded_cache), dx) < kNear);
    const auto exact = parameters(layer);
    const auto now = parameters(rounded);
    for (std::size_t i = 0; i < now.size(); ++i) {
      if (!matches_pattern("*.lora_*", now[i].name)) continue;
      INFO(now[i].name);
      CHECK(test::relative_error(now[i].parameter->grad, exact[i].parameter->grad) < kNear);
    }
  };
  Rng rng(6);
  SECTION("Glu") {
    check(Glu<float>(32, 40, rng));
  }
  SECTION("attention") {
    check(GroupedQueryAttention<float>(rng, {.d_model = 32, .heads = 2, .kv_heads = 1}));
  }
}

TEST_CASE("An optimizer moves the adapters of a frozen model alone, for any number of threads",
          "[tuning]") {
  auto layer = glu_mixture<float>();
  freeze(layer, "*");
  auto base = layer;
  Rng rng(4);
  add_lora(layer, "experts.*", rng, {.name = "x", .rank = 2});
  AdamW<float> optimizer;
  const Matrix<float> x = test::random_matrix<float>(9, 6, 8);
  decltype(layer)::Cache cache;
  double first = 0.0;
  double last = 0.0;
  for (int step = 0; step < 40; ++step) {
    const Matrix<float> y = layer.forward(x, kTraining, cache);
    last = y.squaredNorm();
    if (step == 0) first = last;
    layer.backward(2.0F * y, cache);
    optimizer.step(layer);
  }
  CHECK(last < first);
  CHECK(infer(layer, x, {.adapters = ""}) == infer(base, x));
  for (const auto& [name, moments] : optimizer.moments()) {
    INFO(name);
    CHECK((moments->first.size() > 0) == matches_pattern("*.lora_*", name));
  }
}

TEST_CASE("Conversations have the adapters that they choose", "[tuning]") {
  Rng rng(4);
  std::vector<Block<float>> blocks;
  for (int l = 0; l < 2; ++l) {
    blocks.push_back(pre_norm_block<float>(
        RmsNorm<float>(8),
        GroupedQueryAttention<float>(rng, {.d_model = 8, .heads = 2, .kv_heads = 1}),
        RmsNorm<float>(8), mixture(GluBank<float>(8, 4, 6, rng)), "moe"));
  }
  Decoder<float> model(Embedding<float>(20, 8, rng, {.stddev = 1.0}), std::move(blocks),
                       RmsNorm<float>(8), std::optional<Linear<float>>(Linear<float>(8, 20, rng)));
  for (const char* const name : {"a", "b"}) {
    add_lora(model, "*", rng, {.name = name, .rank = 2, .alpha = 20.0});
  }
  move_adapters(model, 5);
  const std::vector<std::string> adapters = {"a", "", "b", "a", "*"};
  const std::vector<Index> prompt = {3, 1, 4};
  std::vector<Conversation<float>> all;
  for (std::size_t i = 0; i < adapters.size(); ++i) {
    all.push_back({.prompt = prompt,
                   .until = {.count = 12},
                   .sampling = {.temperature = 1.0},
                   .rng = Rng(5),
                   .adapters = adapters[i]});
  }
  const auto together = generate(model, std::span(all));
  for (std::size_t i = 0; i < adapters.size(); ++i) {
    // Token by token from whole passes, without a cache of keys.
    std::vector<Index> ids = prompt;
    Rng draws(5);
    Sampler<float> sampler;
    for (int token = 0; token < 12; ++token) {
      const Matrix<float> logits = infer(model, ids, {.adapters = adapters[i]});
      ids.push_back(sampler.sample(logits.row(logits.rows() - 1), {.temperature = 1.0}, draws));
    }
    CHECK(together[i].tokens == std::vector<Index>(ids.begin() + 3, ids.end()));
  }
  CHECK(together[0].tokens == together[3].tokens);
  CHECK(together[0].tokens != together[2].tokens);
  CHECK(together[0].tokens != together[1].tokens);
}

TEST_CASE("A token has the same bits alone and among others with adapters", "[tuning]") {
  Rng rng(4);
  Linear<float> layer(40, 30, rng);
  add_lora(layer, "weight", rng, {.rank = 8});
  move_adapters(layer, 3);
  const Matrix<float> x = test::random_matrix<float>(70, 40, 8);
  const Matrix<float> all = infer(layer, x);
  for (const Index t : {Index{0}, Index{33}, Index{69}}) {
    CHECK(infer(layer, Matrix<float>(x.row(t))) == all.row(t));
  }
  CHECK(infer(layer, Matrix<float>(0, 40)).rows() == 0);
}

TEST_CASE("Adapters are refused where they make no sense, and nothing changes", "[tuning]") {
  auto layer = glu_mixture<double>();
  Rng rng(1);
  const auto message = [&](std::string_view pattern, const LoraConfig& config) {
    return test::message_of<ConfigError>([&] { add_lora(layer, pattern, rng, config); });
  };
  CHECK(message("*.bias", {}) ==
        "add_lora: no weight of a linear map matches '*.bias', expected at least one");
  CHECK(message("*", {.rank = 0}) == "add_lora: rank = 0, expected >= 1");
  CHECK(message("*", {.alpha = 0.0}) == "add_lora: alpha = 0, expected a finite number > 0");
  CHECK(message("*", {.dropout = 1.0}) == "add_lora: dropout = 1, expected 0 <= dropout < 1");
  CHECK(message("*", {.name = "a.b"}) ==
        "add_lora: name = 'a.b', expected a name without '.', '*' and '/'");
  add_lora(layer, "experts.2.up", rng);
  CHECK(message("experts.*", {}) ==
        "add_lora: experts.2.up has an adapter 'default' already, expected another name");
  CHECK(parameters(layer).size() == 1 + 12 + 2);
  CHECK(test::message_of<ConfigError>([&] { remove_lora(layer, "x"); }) ==
        "remove_lora: there is no adapter 'x', expected one of add_lora");
  set_storage(layer, Storage::kPacked);
  CHECK(test::message_of<StateError>([&] { merge_lora(layer, "default"); }) ==
        "merge_lora: experts.2.up is stored for inference, expected Storage::kTrainable");

  // An adapter that goes away between forward and backward.
  set_storage(layer, Storage::kTrainable);
  const Matrix<double> x = test::random_matrix<double>(5, 6, 1);
  decltype(layer)::Cache cache;
  layer.forward(x, kTraining, cache);
  remove_lora(layer, "default");
  CHECK(test::message_of<StateError>([&] { layer.backward(x, cache); }) ==
        "LowRank: a weight has 0 adapters, expected those of the forward pass");

  // And one in whose place is another.
  add_lora(layer, "*", rng, {.rank = 3});
  layer.forward(x, kTraining, cache);
  remove_lora(layer, "default");
  add_lora(layer, "*", rng, {.rank = 2});
  CHECK(test::message_of<StateError>([&] { layer.backward(x, cache); }) ==
        "LowRank: adapter 'default' has the rank 2, expected 3 as in the forward pass");
}

}  // namespace weir::lora_test
