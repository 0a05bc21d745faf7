// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/language_loss.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/rms_norm.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/texts.hpp"
#include "support/threads.hpp"

namespace weir::language_loss_test {

namespace {

constexpr Index kVocab = 9;
constexpr Index kModel = 4;
constexpr Index kTokens = 11;

Decoder<double> make_decoder(bool tied, bool scaled, Index vocab = kVocab) {
  Rng rng(1);
  std::vector<Block<double>> layers;
  layers.push_back(pre_norm_block<double>(
      RmsNorm<double>(kModel),
      GroupedQueryAttention<double>(rng, {.d_model = kModel, .heads = 2, .kv_heads = 1}),
      RmsNorm<double>(kModel), Glu<double>(kModel, 5, rng), "mlp"));
  std::optional<Linear<double>> head;
  if (!tied) head.emplace(kModel, vocab, rng, LinearConfig{.bias = true});
  DecoderConfig config;
  if (scaled) config = {.embedding_multiplier = 3.0, .logit_multiplier = 2.0, .logit_softcap = 1.5};
  return {Embedding<double>(vocab, kModel, rng, {.stddev = 0.5}), std::move(layers),
          RmsNorm<double>(kModel), std::move(head), config};
}

// A batch with padding, targets that are ignored, and some that are not to be learned.
struct Batch {
  std::vector<Index> ids = test::random_ids(kTokens, kVocab, 2);
  std::vector<Index> targets = test::random_ids(kTokens, kVocab, 3);
  std::vector<std::uint8_t> mask = std::vector<std::uint8_t>(static_cast<std::size_t>(kTokens), 1);
  std::vector<std::uint8_t> learned = mask;
  Sequences sequences{std::vector<Index>{6, kTokens - 6}};

  Batch() {
    mask[5] = 0;
    targets[5] = targets[8] = -100;
    learned[0] = learned[9] = 0;
  }

  Pass pass() const { return {.training = true, .sequences = &sequences, .mask = mask}; }
};

struct Result {
  double loss = 0.0, nll = 0.0, z_loss = 0.0;
  Index tokens = 0;
  std::vector<Matrix<double>> gradients = {};
};

std::vector<Matrix<double>> gradients_of(Decoder<double>& model) {
  std::vector<Matrix<double>> gradients;
  for (auto& [name, parameter] : parameters(model)) gradients.push_back(parameter->gradient());
  return gradients;
}

Result fused(Decoder<double> model, const Batch& batch, Index slice, Index tokens, double scale) {
  const LanguageLoss<double> loss({.cross_entropy = {.z_loss = 0.1}, .slice = slice});
  Decoder<double>::Cache cache;
  LanguageLoss<double>::Cache loss_cache;
  const Matrix<double>& x = model.forward_to_head(batch.ids, batch.pass(), cache);
  Result result;
  result.loss =
      loss.forward(model, x, batch.targets, batch.pass(), loss_cache, tokens, batch.learned);
  model.backward_from_head(loss.backward(model, loss_cache, scale), cache);
  result.nll = loss_cache.loss.nll;
  result.z_loss = loss_cache.loss.z_loss;
  result.tokens = loss_cache.loss.tokens;
  result.gradients = gradients_of(model);
  return result;
}

Result whole(Decoder<double> model, const Batch& batch, Index tokens, double scale) {
  const CrossEntropy<double> loss({.z_loss = 0.1});
  Decoder<double>::Cache cache;
  CrossEntropy<double>::Cache loss_cache;
  const Matrix<double>& logits = model.forward(batch.ids, batch.pass(), cache);
  Result result;
  result.loss = loss.forward(logits, batch.targets, loss_cache, tokens, batch.learned);
  model.backward(loss.backward(loss_cache, scale), cache);
  result.nll = loss_cache.nll;
  result.z_loss = loss_cache.z_loss;
  result.tokens = loss_cache.tokens;
  result.gradients = gradients_of(model);
  return result;
}

}  // namespace

TEST_CASE("LanguageLoss is the cross-entropy of the logits, in slices of any size",
          "[model][language_loss]") {
  const auto tied = GENERATE(false, true);
  const auto scaled = GENERATE(false, true);
  const auto tokens = GENERATE(as<Index>{}, 0, 20);
  const Decoder<double> model = make_decoder(tied, scaled);
  const Batch batch;
  const Result expected = whole(model, batch, tokens, 4.0);
  for (const Index slice : {0, 1, 4, static_cast<int>(kTokens), 100}) {
    INFO("slice " << slice);
    const Result result = fused(model, batch, slice, tokens, 4.0);
    CHECK(result.loss == Approx(expected.loss).epsilon(1e-13));
    CHECK(result.nll == Approx(expected.nll).epsilon(1e-13));
    CHECK(result.z_loss == Approx(expected.z_loss).epsilon(1e-13));
    CHECK(result.tokens == expected.tokens);
    REQUIRE(result.gradients.size() == expected.gradients.size());
    for (std::size_t p = 0; p < expected.gradients.size(); ++p) {
      CHECK(test::relative_error(result.gradients[p], expected.gradients[p]) <= 1e-13);
    }
  }
}

TEST_CASE("LanguageLoss has the gradients of finite differences",
          "[model][language_loss][gradient]") {
  const auto tied = GENERATE(false, true);
  const auto scaled = GENERATE(false, true);
  Decoder<double> model = make_decoder(tied, scaled);
  const Batch batch;
  const Result result = fused(model, batch, 3, 0, 1.0);
  const LanguageLoss<double> loss({.cross_entropy = {.z_loss = 0.1}, .slice = 2});
  std::size_t p = 0;
  for (auto& [name, parameter] : parameters(model)) {
    INFO("parameter " << name);
    const Matrix<double> numeric = test::numeric_gradient(parameter->value, [&] {
      Decoder<double>::Cache cache;
      LanguageLoss<double>::Cache loss_cache;
      Pass pass = batch.pass();
      pass.training = false;
      const Matrix<double>& x = model.forward_to_head(batch.ids, pass, cache);
      return loss.forward(model, x, batch.targets, pass, loss_cache, 0, batch.learned);
    });
    CHECK(test::relative_error(result.gradients[p++], numeric) <= 1e-6);
  }
}

TEST_CASE("LanguageLoss holds the logits of one slice", "[model][language_loss]") {
  if (!test::allocations_are_counted()) return;
  constexpr Index kWords = 4000;
  constexpr Index kMany = 192;
  const auto scaled = GENERATE(false, true);
  Decoder<double> model = make_decoder(true, scaled, kWords);
  const std::vector<Index> ids = test::random_ids(kMany, kWords, 4);
  const std::vector<Index> targets = test::random_ids(kMany, kWords, 5);
  model.forward(ids, kTraining, *std::make_unique<Decoder<double>::Cache>());
  for (auto& [name, parameter] : parameters(model)) parameter->gradient();
  constexpr long kLogits = kMany * kWords * static_cast<long>(sizeof(double));
  const long without = test::most_bytes_of([&] {
    Decoder<double>::Cache cache;
    model.forward_to_head(ids, kTraining, cache);
    model.backward_from_head(Matrix<double>::Zero(kMany, kModel), cache);
  });
  const auto with = [&](Index slice) {
    const LanguageLoss<double> loss({.slice = slice});
    return test::most_bytes_of([&] {
      Decoder<double>::Cache cache;
      LanguageLoss<double>::Cache loss_cache;
      const Matrix<double>& x = model.forward_to_head(ids, kTraining, cache);
      loss.forward(model, x, targets, kTraining, loss_cache);
      model.backward_from_head(loss.backward(model, loss_cache), cache);
    });
  };
  const long copies = scaled ? 2 : 1;
  CHECK(with(kMany) - without <= copies * kLogits + kLogits / 8);
  CHECK(with(kMany / 16) - without <= copies * kLogits / 16 + kLogits / 8);
  // By itself, it takes as many tokens as have 64 MiB of logits: 2097.
  CHECK(std::abs(with(0) - with(kMany)) <= 4096);
}

TEST_CASE("LanguageLoss divides large vocabularies into slices by itself",
          "[model][language_loss]") {
  const auto slice_of = [](Index vocab) {
    const Decoder<double> model = make_decoder(true, false, vocab);
    const LanguageLoss<double> loss;
    LanguageLoss<double>::Cache cache;
    loss.forward(model, Matrix<double>::Zero(1, kModel), std::vector<Index>{0}, Pass{}, cache);
    return cache.slice;
  };
  CHECK(slice_of(1024) == 8192);    // 64 MiB / (1024 * 8)
  CHECK(slice_of(1 << 17) == 128);  // 64 of them would take that much.
}

TEST_CASE("LanguageLoss does not depend on threads and allocates nothing once it has run",
          "[model][language_loss]") {
  Decoder<double> model = make_decoder(false, true, 300);
  const Matrix<double> x = test::random_matrix(40, kModel, 6);
  const std::vector<Index> targets = test::random_ids(40, 300, 7);
  const LanguageLoss<double> loss({.slice = 15});
  LanguageLoss<double>::Cache cache;
  const auto step = [&] {
    loss.forward(model, x, targets, kTraining, cache);
    loss.backward(model, cache);
  };
  step();
  const Matrix<double> expected = cache.dx;
  CHECK(test::count_allocations(step) == 0);
  const test::Threads threads(3);
  step();
  CHECK(cache.dx == expected);
}

TEST_CASE("LanguageLoss accepts no tokens, and none to learn", "[model][language_loss]") {
  Decoder<double> model = make_decoder(true, false);
  const LanguageLoss<double> loss({.slice = 2});
  LanguageLoss<double>::Cache cache;
  CHECK(loss.forward(model, Matrix<double>(0, kModel), {}, kTraining, cache) == 0.0);
  CHECK(loss.backward(model, cache).rows() == 0);
  const Matrix<double> x = test::random_matrix(3, kModel, 8);
  const std::vector<Index> ignored(3, -100);
  CHECK(loss.forward(model, x, ignored, kTraining, cache) == 0.0);
  CHECK(loss.backward(model, cache).isZero(0.0));
}

TEST_CASE("LanguageLoss says what is wrong", "[model][language_loss]") {
  CHECK(test::message_of<ConfigError>([] { LanguageLoss<double>({.slice = -1}); }) ==
        "LanguageLoss: slice = -1, expected >= 0");
  Decoder<double> model = make_decoder(true, false);
  const LanguageLoss<double> loss({.slice = 2});
  LanguageLoss<double>::Cache cache;
  const Matrix<double> x = test::random_matrix(3, kModel, 9);
  const std::vector<Index> targets = {1, 2, 3};
  CHECK(test::message_of<StateError>([&] { loss.backward(model, cache); }) ==
        "LanguageLoss::backward: the cache is empty, expected a forward pass that succeeded");
  CHECK(test::message_of<ShapeError>([&] {
          loss.forward(model, x.leftCols(3), targets, kTraining, cache);
        }) == "LanguageLoss::forward: x is [3, 3], expected [tokens, 4]");
  const std::vector<Index> far = {1, 2, kVocab};
  CHECK(test::message_of<ConfigError>([&] { loss.forward(model, x, far, kTraining, cache); }) ==
        "CrossEntropy::forward: targets[2] = 9, expected 0 <= target < 9 or -100");
  const std::vector<std::uint8_t> mask = {1, 1};
  CHECK(test::message_of<ShapeError>([&] {
          loss.forward(model, x, targets, {.training = true, .mask = mask}, cache);
        }) == "LanguageLoss::forward: pass.mask has 2 entries, expected 3 (one per token)");
  Matrix<double> broken = x;
  broken(2, 1) = std::numeric_limits<double>::quiet_NaN();
  CHECK(test::message_of<NonFiniteError>([&] {
          loss.forward(model, broken, targets, kTraining, cache);
        }).starts_with("CrossEntropy::forward: row 2 of logits has log sum exp nan"));
  CHECK(test::message_of<StateError>([&] { loss.backward(model, cache); }) ==
        "LanguageLoss::backward: the cache is empty, expected a forward pass that succeeded");

  loss.forward(model, x, targets, Pass{}, cache);
  CHECK(test::message_of<StateError>([&] { loss.backward(model, cache); }) ==
        "LanguageLoss::backward: the forward pass did not train, expected one with pass.training "
        "= true");
  loss.forward(model, x, targets, kTraining, cache);
  Decoder<double> other = model;
  CHECK(test::message_of<StateError>([&] { loss.backward(other, cache); }) ==
        "LanguageLoss::backward: the cache was filled by another layer, expected a forward pass of "
        "this one");
  loss.backward(model, cache);
  CHECK(test::message_of<StateError>([&] { loss.backward(model, cache); }) ==
        "LanguageLoss::backward: the cache was used by a backward pass already, expected a forward "
        "pass between the two");
}

TEST_CASE("Decoder takes the gradient of what it gave", "[model][language_loss]") {
  Decoder<double> model = make_decoder(true, false);
  const std::vector<Index> ids = test::random_ids(3, kVocab, 10);
  Decoder<double>::Cache cache;
  const Matrix<double> normed = model.forward_to_head(ids, kTraining, cache);
  CHECK(normed == model.normed(cache));
  CHECK(test::message_of<StateError>([&] { model.backward(Matrix<double>(3, kVocab), cache); }) ==
        "Decoder::backward: the cache was filled by Decoder::forward_to_head, expected "
        "Decoder::forward");
  CHECK(test::message_of<ShapeError>([&] { model.backward_from_head(normed.topRows(2), cache); }) ==
        "Decoder::backward_from_head: d_normed is [2, 4], expected [3, 4]");
  model.backward_from_head(normed, cache);
  const Matrix<double> logits = model.forward(ids, kTraining, cache);
  CHECK(model.normed(cache) == normed);
  CHECK(test::message_of<StateError>([&] { model.backward_from_head(normed, cache); }) ==
        "Decoder::backward_from_head: the cache was filled by Decoder::forward, expected "
        "Decoder::forward_to_head");
  model.backward(logits, cache);
}

}  // namespace weir::language_loss_test
