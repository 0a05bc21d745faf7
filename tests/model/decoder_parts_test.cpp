// SPDX-License-Identifier: MIT
// What a Decoder multiplies and caps, and what it offers to those who hang more on it.
#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/model/decoder.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/rms_norm.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"

namespace weir::decoder_parts_test {

namespace {

using Ids = std::vector<Index>;

constexpr Index kVocab = 7;
constexpr Index kModel = 4;
const Ids kIds = {3, 0, 6, 3, 1};

Decoder<double> make_decoder(bool tied, const DecoderConfig& config = {}) {
  Rng rng(1);
  RmsNorm<double> norm(kModel);
  norm.weight().value += normal_init<double>(1, kModel, 0.3, rng);
  std::vector<Block<double>> layers;
  layers.reserve(2);
  for (int l = 0; l < 2; ++l) {
    layers.push_back(pre_norm_block<double>(
        norm, GroupedQueryAttention<double>(rng, {.d_model = kModel, .heads = 2, .kv_heads = 1}),
        norm, Glu<double>(kModel, 5, rng), "mlp"));
  }
  std::optional<Linear<double>> head;
  if (!tied) head.emplace(kModel, kVocab, rng);
  return {Embedding<double>(kVocab, kModel, rng, {.stddev = 0.5}), std::move(layers), norm,
          std::move(head), config};
}

constexpr DecoderConfig kGrok = {
    .embedding_multiplier = 78.38, .logit_multiplier = 0.577, .logit_softcap = 1.5};

std::vector<Matrix<double>> gradients_of(Decoder<double>& model) {
  std::vector<Matrix<double>> gradients;
  for (auto& [name, parameter] : parameters(model)) gradients.push_back(parameter->gradient());
  return gradients;
}

}  // namespace

TEST_CASE("Decoder multiplies embeddings and logits, and caps the logits", "[model][decoder]") {
  const auto tied = GENERATE(false, true);
  const Decoder<double> plain = make_decoder(tied);
  const Matrix<double> logits = infer(plain, kIds);
  CHECK(infer(make_decoder(tied, {.logit_multiplier = 0.5}), kIds) == 0.5 * logits);
  const Matrix<double> capped = infer(make_decoder(tied, {.logit_softcap = 1.5}), kIds);
  CHECK(test::relative_error(capped, 1.5 * (logits / 1.5).array().tanh().matrix()) <= 1e-14);

  // An embedding twice as large is the same as one multiplied by two, unless the head shares it.
  Decoder<double> larger = make_decoder(tied);
  parameters(larger)[0].parameter->value *= 2.0;
  const Matrix<double> expected = infer(larger, kIds);
  const Matrix<double> doubled = infer(make_decoder(tied, {.embedding_multiplier = 2.0}), kIds);
  CHECK(test::relative_error(doubled, tied ? Matrix<double>(0.5 * expected) : expected) <= 1e-14);
}

TEST_CASE("Multipliers and softcap have the gradients of finite differences",
          "[model][decoder][gradient]") {
  const auto tied = GENERATE(false, true);
  const auto config =
      GENERATE(as<DecoderConfig>{}, kGrok, DecoderConfig{.embedding_multiplier = 3.0},
               DecoderConfig{.logit_softcap = 2.0});
  Decoder<double> model = make_decoder(tied, config);
  const Matrix<double> weight = test::random_matrix(5, kVocab, 2);
  Decoder<double>::Cache cache;
  model.forward(kIds, kTraining, cache);
  model.backward(weight, cache);
  for (auto& [name, parameter] : parameters(model)) {
    INFO("parameter " << name);
    const Matrix<double> analytic = parameter->gradient();
    const Matrix<double> numeric = test::numeric_gradient(
        parameter->value, [&] { return infer(model, kIds).cwiseProduct(weight).sum(); });
    CHECK(test::relative_error(analytic, numeric) <= 1e-6);
  }
}

TEST_CASE("Decoder decodes with multipliers and softcap what it computes at once",
          "[model][decoder]") {
  const auto tied = GENERATE(false, true);
  const Decoder<double> model = make_decoder(tied, kGrok);
  const Matrix<double> expected = infer(model, kIds);
  Decoder<double>::State state;
  Decoder<double>::Cache cache;
  for (std::size_t t = 0; t < kIds.size(); ++t) {
    CHECK(test::relative_error(decode(model, std::span(&kIds[t], 1), state, cache),
                               expected.row(static_cast<Index>(t))) <= 1e-12);
  }
}

TEST_CASE("Decoder is its parts one after the other", "[model][decoder]") {
  const auto tied = GENERATE(false, true);
  const auto config = GENERATE(as<DecoderConfig>{}, DecoderConfig{}, kGrok);
  const Decoder<double> model = make_decoder(tied, config);
  Decoder<double>::Cache cache;
  const Matrix<double> logits = model.forward(kIds, kTraining, cache);
  Decoder<double>::EmbedCache embed_cache;
  Decoder<double>::HeadCache head_cache;
  Matrix<double> x = model.embed(kIds, Pass{}, embed_cache);
  for (const Block<double>& layer : model.layers()) x = infer(layer, x);
  CHECK(model.hidden(cache) == x);
  CHECK(model.head(model.normed(cache), Pass{}, head_cache) == logits);
  CHECK(test::relative_error(model.normed(cache).rowwise().norm(), x.rowwise().norm()) > 1e-3);

  // Decoding, all tokens have their h, whichever logits are wanted.
  Decoder<double>::State state;
  const Matrix<double>& last = decode(model, kIds, state, cache, true);
  CHECK(test::relative_error(model.hidden(cache), x) <= 1e-12);
  CHECK(model.normed(cache).rows() == 1);
  CHECK(test::relative_error(last, logits.bottomRows(1)) <= 1e-12);
}

TEST_CASE("Decoder without layers has its embedding for h", "[model][decoder]") {
  Rng rng(3);
  const Embedding<double> table(kVocab, kModel, rng, {.stddev = 1.0});
  const Decoder<double> model(table, {}, RmsNorm<double>(kModel), std::nullopt,
                              {.embedding_multiplier = 2.0});
  Decoder<double>::Cache cache;
  model.forward(kIds, kTraining, cache);
  Embedding<double>::Cache table_cache;
  CHECK(model.hidden(cache) == 2.0 * table.forward(kIds, Pass{}, table_cache));
}

TEST_CASE("Gradients of h from elsewhere go through the decoder", "[model][decoder][gradient]") {
  const auto tied = GENERATE(false, true);
  Decoder<double> model = make_decoder(tied, kGrok);
  const Matrix<double> d_logits = test::random_matrix(5, kVocab, 4);
  const Matrix<double> d_hidden = test::random_matrix(5, kModel, 5);
  const Matrix<double> d_normed = test::random_matrix(5, kModel, 6);
  const auto objective = [&] {
    Decoder<double>::Cache fresh;
    const double logits = model.forward(kIds, Pass{}, fresh).cwiseProduct(d_logits).sum();
    return logits + model.hidden(fresh).cwiseProduct(d_hidden).sum() +
           model.normed(fresh).cwiseProduct(d_normed).sum();
  };
  Decoder<double>::Cache cache;
  model.forward(kIds, kTraining, cache);
  model.backward(d_logits, cache, {.hidden = &d_hidden, .normed = &d_normed});
  for (auto& [name, parameter] : parameters(model)) {
    INFO("parameter " << name);
    const Matrix<double> analytic = parameter->gradient();
    CHECK(test::relative_error(analytic, test::numeric_gradient(parameter->value, objective)) <=
          1e-6);
  }
}

TEST_CASE("Embedding and head are used beside the decoder, and add to the same gradients",
          "[model][decoder][gradient]") {
  const auto tied = GENERATE(false, true);
  const auto config = GENERATE(as<DecoderConfig>{}, DecoderConfig{}, kGrok);
  Decoder<double> model = make_decoder(tied, config);
  const Matrix<double> d_logits = test::random_matrix(5, kVocab, 7);
  Decoder<double>::EmbedCache embed_cache;
  Decoder<double>::HeadCache head_cache;
  const auto objective = [&] {
    Decoder<double>::EmbedCache embedded;
    Decoder<double>::HeadCache logits;
    return model.head(model.embed(kIds, Pass{}, embedded), Pass{}, logits)
        .cwiseProduct(d_logits)
        .sum();
  };
  const auto accumulate = [&] {
    model.head(model.embed(kIds, kTraining, embed_cache), kTraining, head_cache);
    model.embed_backward(model.head_backward(d_logits, head_cache), embed_cache);
  };
  accumulate();
  for (auto& [name, parameter] : parameters(model)) {
    if (name != "embedding.weight" && name != "head.weight") continue;
    INFO("parameter " << name);
    const Matrix<double> analytic = parameter->gradient();
    CHECK(test::relative_error(analytic, test::numeric_gradient(parameter->value, objective)) <=
          1e-6);
  }
  const std::vector<Matrix<double>> once = gradients_of(model);
  accumulate();
  const std::vector<Matrix<double>> twice = gradients_of(model);
  CHECK(test::relative_error(twice[0], 2.0 * once[0]) <= 1e-14);
}

TEST_CASE("A decoder with all settings trains without allocating", "[model][decoder]") {
  const auto tied = GENERATE(false, true);
  Decoder<double> model = make_decoder(tied, kGrok);
  const Matrix<double> d_logits = test::random_matrix(5, kVocab, 8);
  const Matrix<double> d_hidden = test::random_matrix(5, kModel, 9);
  Decoder<double>::Cache cache;
  const auto step = [&] {
    model.forward(kIds, kTraining, cache);
    model.backward(d_logits, cache, {.hidden = &d_hidden, .normed = &d_hidden});
  };
  step();
  step();
  CHECK(test::count_allocations(step) == 0);
}

TEST_CASE("Decoder checks its settings and the gradients it is given", "[model][decoder]") {
  const auto message = [](const DecoderConfig& config) {
    return test::message_of<ConfigError>([&] { make_decoder(true, config); });
  };
  CHECK(message({.embedding_multiplier = 0.0}) ==
        "Decoder: embedding_multiplier = 0, expected a finite number > 0");
  CHECK(message({.embedding_multiplier = std::numeric_limits<double>::infinity()}) ==
        "Decoder: embedding_multiplier = inf, expected a finite number > 0");
  CHECK(message({.logit_multiplier = -1.0}) ==
        "Decoder: logit_multiplier = -1, expected a finite number > 0");
  CHECK(message({.logit_softcap = -30.0}) ==
        "Decoder: logit_softcap = -30, expected a finite number >= 0");
  CHECK(message({.logit_softcap = std::nan("")}) ==
        "Decoder: logit_softcap = nan, expected a finite number >= 0");

  Decoder<double> model = make_decoder(true, kGrok);
  CHECK(model.config().logit_softcap == 1.5);
  Decoder<double>::Cache cache;
  const Matrix<double> d_logits = model.forward(kIds, kTraining, cache);
  const Matrix<double> narrow(5, 3), short_of(4, kModel);
  CHECK(test::message_of<ShapeError>([&] {
          model.backward(d_logits, cache, {.hidden = &narrow});
        }) == "Decoder::backward: also.hidden is [5, 3], expected [5, 4]");
  CHECK(test::message_of<ShapeError>([&] {
          model.backward(d_logits, cache, {.normed = &short_of});
        }) == "Decoder::backward: also.normed is [4, 4], expected [5, 4]");
  for (const auto& [name, parameter] : parameters(model)) CHECK(parameter->grad.size() == 0);

  Decoder<double>::HeadCache head_cache;
  CHECK(test::message_of<StateError>([&] { model.head_backward(d_logits, head_cache); }) ==
        "LanguageHead::backward: the cache is empty, expected a forward pass that succeeded");
  model.head(model.normed(cache), Pass{}, head_cache);
  CHECK(test::message_of<StateError>([&] { model.head_backward(d_logits, head_cache); }) ==
        "LanguageHead::backward: the forward pass did not train, expected one with pass.training = "
        "true");
  model.head(model.normed(cache), kTraining, head_cache);
  CHECK(test::message_of<ShapeError>([&] { model.head_backward(narrow, head_cache); }) ==
        "LanguageHead::backward: d_logits is [5, 3], expected [5, 7]");
}

}  // namespace weir::decoder_parts_test
