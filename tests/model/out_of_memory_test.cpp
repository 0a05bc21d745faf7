// SPDX-License-Identifier: MIT
// Memory that runs out at any allocation: std::bad_alloc comes through, and everything can be used
// afterwards as if nothing had happened.
#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/latent.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/generate.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/nn/layer_norm.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/optim/adamw.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::out_of_memory_test {

namespace {

using Ids = std::vector<Index>;
using Model = Decoder<double>;

constexpr Index kVocab = 11;
constexpr Index kWidth = 8;

/// Two layers: attention of one kind each, a dense network and mixtures.
Model make_model(bool latent) {
  Rng rng(1);
  const RmsNorm<double> norm(kWidth);
  std::vector<Block<double>> layers;
  if (latent) {
    const LatentAttention<double> attention(rng, {.d_model = kWidth,
                                                  .heads = 2,
                                                  .q_rank = 5,
                                                  .kv_rank = 3,
                                                  .nope_dim = 4,
                                                  .rope_dim = 2,
                                                  .value_dim = 4});
    layers.push_back(
        pre_norm_block<double>(norm, attention, norm, Glu<double>(kWidth, 6, rng), "mlp"));
    layers.push_back(pre_norm_block<double>(
        norm, attention, norm,
        SharedExperts(MoELayer(LinearRouter<double>(kWidth, 3, rng), SoftmaxTopK<double>({.k = 2}),
                               Dropless(), GluBank<double>(kWidth, 3, 6, rng),
                               SwitchLoss<double>({.coefficient = 0.01})),
                      Glu<double>(kWidth, 6, rng)),
        "moe"));
    return {Embedding<double>(kVocab, kWidth, rng), std::move(layers), norm};
  }
  const LayerNorm<double> layer_norm(kWidth);
  const GroupedQueryAttention<double> attention(
      rng, {.d_model = kWidth, .heads = 2, .kv_heads = 1, .qkv_bias = true});
  layers.push_back(pre_norm_block<double>(layer_norm, attention, norm,
                                          Mlp<double>(kWidth, 6, rng, {.bias = true}), "mlp"));
  layers.push_back(pre_norm_block<double>(
      norm, attention, norm,
      MoELayer(LinearRouter<double>(kWidth, 3, rng), TopKSoftmax<double>({.k = 2}),
               CapacityFactor({.train = 1.0}), MlpBank<double>(kWidth, 3, 6, rng)),
      "moe"));
  return {Embedding<double>(kVocab, kWidth, rng), std::move(layers), norm,
          Linear<double>(kWidth, kVocab, rng)};
}

Ids make_ids(Index count, std::uint64_t seed) {
  Rng rng(seed);
  Ids ids;
  for (Index i = 0; i < count; ++i) ids.push_back(rng.below(kVocab));
  return ids;
}

/// Calls `f` until it has all the memory it wants, with one failing allocation more each time, and
/// `after(failures)` after each failure.
/// \return         How often memory ran out.
template <class F, class After>
long starve(F&& f, After&& after) {
  long failures = 0;
  while (test::runs_out_of_memory(failures + 1, f)) {
    ++failures;
    after();
    REQUIRE(failures < 5000);
  }
  return failures;
}

/// The values or the gradients of all parameters.
std::vector<Matrix<double>> numbers(Model& model, bool gradients) {
  std::vector<Matrix<double>> all;
  for (auto& [name, p] : parameters(model)) all.push_back(gradients ? p->gradient() : p->value);
  return all;
}

}  // namespace

TEST_CASE("Forward and backward passes can be repeated when memory has run out",
          "[model][memory]") {
  const auto latent = GENERATE(false, true);
  if (!test::allocations_are_counted()) return;
  Model model = make_model(latent);
  const CrossEntropy<double> loss;
  // Passes of several sizes, so that the kept cache grows and shrinks.
  const auto train = [&](Index tokens, Model::Cache& cache, CrossEntropy<double>::Cache& errors) {
    const Ids ids = make_ids(tokens, 3);
    const Matrix<double>& logits = model.forward(ids, kTraining, cache);
    const double value = loss.forward(logits, ids, errors);
    model.backward(loss.backward(errors), cache);
    return value;
  };
  Model::Cache cache;
  CrossEntropy<double>::Cache errors;
  Model::Cache fresh;
  CrossEntropy<double>::Cache fresh_errors;
  for (const Index tokens : {3, 7, 2, 9}) {
    zero_gradients(model);
    const double expected = train(tokens, fresh, fresh_errors);
    const std::vector<Matrix<double>> gradients = numbers(model, true);
    double value = 0.0;
    const long failures = starve(
        [&] {
          // Gradients are empty at first, as those of a new model are.
          for (auto& [name, p] : parameters(model)) p->grad.resize(0, 0);
          value = train(tokens, cache, errors);
        },
        [&] {
          CHECK(test::message_of<StateError>([&] {
                  Model::Cache other;
                  model.backward(Matrix<double>::Zero(tokens, kVocab), other);
                }) != "no exception");
        });
    CHECK(failures > 20);
    CHECK(value == expected);
    CHECK(numbers(model, true) == gradients);
  }
}

TEST_CASE("A pass after one that ran out of memory is as any other", "[model][memory]") {
  const auto latent = GENERATE(false, true);
  if (!test::allocations_are_counted()) return;
  const Model model = make_model(latent);
  const Ids few = make_ids(3, 4);
  const Ids many = make_ids(8, 5);
  const Matrix<double> expected = infer(model, few);
  for (const bool training : {false, true}) {
    // A thread's workspaces register their destructors at their first use; glibc ends the program
    // if there is no memory for that.
    Model::Cache first;
    model.forward(many, {.training = training}, first);
    Model::Cache cache;
    model.forward(few, {.training = training}, cache);
    starve([&] { model.forward(many, {.training = training}, cache); },
           [&] { REQUIRE(model.forward(few, {.training = training}, cache) == expected); });
    CHECK(model.forward(few, {.training = training}, cache) == expected);
  }
}

TEST_CASE("AdamW::step that runs out of memory changes nothing", "[model][memory][optim]") {
  if (!test::allocations_are_counted()) return;
  const auto latent = GENERATE(false, true);
  Model model = make_model(latent);
  Model other = make_model(latent);
  const auto accumulate = [](Model& m) {
    Model::Cache cache;
    const Ids ids = make_ids(6, 6);
    const Matrix<double> d = m.forward(ids, kTraining, cache);
    m.backward(d, cache);
  };
  AdamW<double> starved({.learning_rate = 0.1});
  AdamW<double> plain({.learning_rate = 0.1});
  for (int round = 0; round < 2; ++round) {
    accumulate(model);
    accumulate(other);
    const std::vector<Matrix<double>> values = numbers(model, false);
    const std::vector<Matrix<double>> gradients = numbers(model, true);
    const long failures = starve([&] { starved.step(model); },
                                 [&] {
                                   REQUIRE(numbers(model, false) == values);
                                   REQUIRE(numbers(model, true) == gradients);
                                   REQUIRE(starved.steps() == round);
                                 });
    CHECK((failures > 5) == (round == 0));
    plain.step(other);
    CHECK(numbers(model, false) == numbers(other, false));
  }
}

TEST_CASE("set_storage that runs out of memory leaves a model that works", "[model][memory]") {
  if (!test::allocations_are_counted()) return;
  const auto latent = GENERATE(false, true);
  const auto from = GENERATE(Storage::kTrainable, Storage::kPacked, Storage::kBfloat16);
  const auto to = GENERATE(Storage::kTrainable, Storage::kPacked, Storage::kBfloat16);
  if (from == to) return;
  const Ids ids = make_ids(6, 7);
  Model model = make_model(latent);
  set_storage(model, from);
  const Matrix<double> before = infer(model, ids);
  Model other = make_model(latent);
  set_storage(other, from);
  set_storage(other, to);
  const Matrix<double> after = infer(other, ids);
  const bool exact = to != Storage::kBfloat16;
  const long failures = starve([&] { set_storage(model, to); },
                               [&] {
                                 const double error =
                                     test::relative_error(infer(model, ids), before);
                                 REQUIRE(error < (exact ? 1e-13 : 0.05));
                               });
  CHECK(failures > 5);
  CHECK(infer(model, ids) == after);
  set_storage(model, Storage::kTrainable);
  CHECK(parameters(model).size() == [&] {
    Model trainable = make_model(latent);
    return parameters(trainable).size();
  }());
}

TEST_CASE("Decoding goes on after memory has run out", "[model][memory][decode]") {
  if (!test::allocations_are_counted()) return;
  const auto latent = GENERATE(false, true);
  const auto storage = GENERATE(Storage::kTrainable, Storage::kPacked);
  Model model = make_model(latent);
  set_storage(model, storage);
  const Ids prompt = make_ids(4, 8);
  const Ids more = make_ids(5, 9);
  Model::Cache plain_cache;
  Model::State plain;
  const Matrix<double> first = decode(model, prompt, plain, plain_cache);
  const Matrix<double> second = decode(model, more, plain, plain_cache);

  Model::Cache cache;
  Model::State state;
  const auto take_back = [&] {
    const Index length = state.length;
    state.truncate(length);
    REQUIRE(state.length == length);
  };
  const Matrix<double>* logits = nullptr;
  CHECK(starve([&] { logits = &decode(model, prompt, state, cache); }, take_back) > 5);
  CHECK(*logits == first);
  CHECK(starve([&] { logits = &decode(model, more, state, cache); }, take_back) > 5);
  CHECK(*logits == second);
  CHECK(state.length == 9);
}

TEST_CASE("generate that runs out of memory can be repeated", "[model][memory][generate]") {
  if (!test::allocations_are_counted()) return;
  const auto latent = GENERATE(false, true);
  const Model model = make_model(latent);
  const Ids prompt = make_ids(4, 10);
  Rng rng(11);
  const Ids expected = generate(model, prompt, 6, {}, rng);
  Ids tokens;
  const long failures = starve(
      [&] {
        Rng again(11);
        tokens = generate(model, prompt, 6, {}, again);
      },
      [] {});
  CHECK(failures > 20);
  CHECK(tokens == expected);
}

}  // namespace weir::out_of_memory_test
