// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/storage.hpp>
#include <weir/model/generate.hpp>
#include <weir/model/multi_token.hpp>
#include <weir/model/speculative.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/hash_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/texts.hpp"

namespace weir::speculative_test {

namespace {

using Ids = std::vector<Index>;

constexpr Index kVocab = 11;
constexpr Index kModel = 8;
constexpr Sampling kGreedy{.temperature = 0.0};

enum class Kind { kDense, kMixture, kHash, kWindow };

template <class T>
Block<T> make_block(Kind kind, Rng& rng) {
  const RmsNorm<T> norm(kModel);
  const GroupedQueryAttention<T> attention(rng, {.d_model = kModel, .heads = 2, .kv_heads = 1});
  if (kind == Kind::kWindow) {
    const GroupedQueryAttention<T> local(
        rng, {.d_model = kModel, .heads = 2, .kv_heads = 1, .window = 3});
    return pre_norm_block<T>(norm, local, norm, Glu<T>(kModel, 6, rng), "mlp");
  }
  if (kind == Kind::kDense) {
    return pre_norm_block<T>(norm, attention, norm, Glu<T>(kModel, 6, rng), "mlp");
  }
  if (kind == Kind::kMixture) {
    auto moe = MoELayer(LinearRouter<T>(kModel, 3, rng, {.init_scale = 1.0}),
                        SoftmaxTopK<T>({.k = 2}), Dropless(), GluBank<T>(kModel, 3, 6, rng));
    return pre_norm_block<T>(norm, attention, norm, std::move(moe), "moe");
  }
  auto moe = MoELayer(HashRouter<T>(kModel, 3, modulo_hash_table(kVocab, 3)),
                      SoftmaxTopK<T>({.k = 1}), Dropless(), GluBank<T>(kModel, 3, 6, rng));
  return pre_norm_block<T>(norm, attention, norm, std::move(moe), "moe");
}

template <class T = double>
Decoder<T> make_decoder(Kind kind, bool tied, std::uint64_t seed = 1) {
  Rng rng(seed);
  std::vector<Block<T>> layers;
  layers.push_back(make_block<T>(kind, rng));
  layers.push_back(make_block<T>(kind, rng));
  std::optional<Linear<T>> head;
  if (!tied) head.emplace(kModel, kVocab, rng);
  return {Embedding<T>(kVocab, kModel, rng, {.stddev = 0.5}), std::move(layers), RmsNorm<T>(kModel),
          std::move(head)};
}

template <class T = double>
MultiToken<T> make_modules(std::size_t depth, Kind kind, const MultiTokenConfig& config = {}) {
  Rng rng(2);
  std::vector<MultiTokenModule<T>> modules;
  for (std::size_t k = 0; k < depth; ++k) {
    modules.push_back({RmsNorm<T>(kModel), RmsNorm<T>(kModel), Linear<T>(2 * kModel, kModel, rng),
                       make_block<T>(kind, rng), RmsNorm<T>(kModel)});
  }
  return MultiToken<T>(std::move(modules), config);
}

// A model without layers predicts by the last token alone, and modules that look at nothing but
// their token, multiplied by `sign`, predict the same as it or the opposite.
Decoder<double> make_bigram() {
  Rng rng(3);
  return {Embedding<double>(kVocab, kModel, rng, {.stddev = 1.0}),
          {},
          RmsNorm<double>(kModel),
          Linear<double>(kModel, kVocab, rng)};
}

MultiToken<double> make_bigram_modules(std::size_t depth, double sign) {
  Matrix<double> projection = Matrix<double>::Zero(kModel, 2 * kModel);
  projection.leftCols(kModel).diagonal().setConstant(sign);
  const Block<double> nothing(
      {{"nothing", RmsNorm<double>(kModel), Linear<double>(Matrix<double>::Zero(kModel, kModel))}});
  std::vector<MultiTokenModule<double>> modules(
      depth, {RmsNorm<double>(kModel), RmsNorm<double>(kModel), Linear<double>(projection), nothing,
              RmsNorm<double>(kModel)});
  return MultiToken<double>(std::move(modules));
}

// 0, 1, 4, 9, ... modulo the vocabulary.
Ids squares(Index count) {
  Ids ids;
  for (Index t = 0; t < count; ++t) ids.push_back(t * t % kVocab);
  return ids;
}

// Teaches them squares.
template <class T>
void train(Decoder<T>& model, MultiToken<T>& modules) {
  AdamW<T> optimizer({.learning_rate = 1e-2});
  AdamW<T> module_optimizer({.learning_rate = 1e-2});
  Ids ids = squares(45);
  const Ids targets(ids.begin() + 1, ids.end());
  ids.pop_back();
  const CrossEntropy<T> loss;
  typename CrossEntropy<T>::Cache loss_cache;
  typename Decoder<T>::Cache cache;
  typename MultiToken<T>::Cache module_cache;
  for (int step = 0; step < 60; ++step) {
    loss.forward(model.forward(ids, kTraining, cache), targets, loss_cache);
    modules.forward(model, cache, ids, targets, kTraining, module_cache);
    model.backward(loss.backward(loss_cache), cache, modules.backward(model, module_cache));
    optimizer.step(model);
    module_optimizer.step(modules);
  }
}

}  // namespace

TEST_CASE("Speculative decoding yields the text of plain decoding", "[model][speculative]") {
  const auto kind = GENERATE(Kind::kDense, Kind::kMixture, Kind::kHash, Kind::kWindow);
  const auto depth = GENERATE(as<std::size_t>{}, 1, 2, 3);
  const auto sampling =
      GENERATE(as<Sampling>{}, kGreedy, Sampling{}, Sampling{.temperature = 0.7, .top_k = 3},
               Sampling{.min_p = 0.1, .repetition_penalty = 1.5});
  const auto source = depth == 2 ? HiddenSource::kHidden : HiddenSource::kNormed;
  const Decoder<double> model = make_decoder(kind, depth == 1);
  const MultiToken<double> modules = make_modules(depth, kind, {.source = source});
  DraftReport report;
  for (const Ids& prompt : {Ids{4}, Ids{1, 2}, Ids{0, 9, 3, 3, 7, 10, 2}}) {
    for (const Index count : {0, 1, 2, 25}) {
      Rng rng(5), plain_rng(5);
      CHECK(speculate(model, modules, prompt, count, sampling, rng, report) ==
            generate(model, prompt, count, sampling, plain_rng));
      CHECK(rng.position() == plain_rng.position());
    }
  }
  CHECK(report.tokens == 84);
  CHECK(report.checked[0] > 0);
}

TEST_CASE("Good drafts are all accepted", "[model][speculative]") {
  const auto depth = GENERATE(as<std::size_t>{}, 1, 2, 4);
  const Decoder<double> model = make_bigram();
  const MultiToken<double> modules = make_bigram_modules(depth, 1.0);
  Rng rng(0), plain_rng(0);
  DraftReport report;
  const auto d = static_cast<Index>(depth);
  const Index count = 1 + 6 * (d + 1);  // One from the prompt, then six full passes.
  const Ids text = speculate(model, modules, Ids{4, 7}, count, kGreedy, rng, report);
  CHECK(text == generate(model, Ids{4, 7}, count, kGreedy, plain_rng));
  const std::vector<int> prompt = {4, 7};  // Tokens may be int.
  DraftReport again;
  CHECK(text == speculate(model, modules, prompt, count, kGreedy, rng, again));
  CHECK(report.acceptance() == 1.0);
  CHECK(report.tokens == count);
  CHECK(report.passes == 1 + 6 + 1);  // The prompt, six, and the last token into the state.
  CHECK(report.checked == Ids(depth, 6));
  CHECK(report.accepted == report.checked);
}

TEST_CASE("Bad drafts are refused, and change nothing", "[model][speculative]") {
  const auto depth = GENERATE(as<std::size_t>{}, 1, 3);
  const Decoder<double> model = make_bigram();
  const MultiToken<double> modules = make_bigram_modules(depth, -1.0);
  Rng rng(0), plain_rng(0);
  DraftReport report;
  CHECK(speculate(model, modules, Ids{4}, 20, kGreedy, rng, report) ==
        generate(model, Ids{4}, 20, kGreedy, plain_rng));
  CHECK(report.accepted[0] == 0);
  CHECK(report.acceptance() == 0.0);
  CHECK(report.passes == 21);
  CHECK(report.checked[0] == 18);  // There is no draft for the first token, and none for the last.
  CHECK(DraftReport().acceptance() == 0.0);
}

TEST_CASE("Modules that were trained draft well", "[model][speculative]") {
  Decoder<float> model = make_decoder<float>(Kind::kMixture, true);
  MultiToken<float> modules = make_modules<float>(2, Kind::kMixture);
  train(model, modules);
  Rng rng(0), plain_rng(0);
  DraftReport report;
  const Ids prompt = squares(13);
  CHECK(speculate(model, modules, prompt, 30, kGreedy, rng, report) ==
        generate(model, prompt, 30, kGreedy, plain_rng));
  CHECK(report.acceptance() > 0.6);
  CHECK(report.passes < 22);
}

TEST_CASE("A draft is the best token of the module, from the h that the settings name",
          "[model][speculative]") {
  const auto source = GENERATE(HiddenSource::kHidden, HiddenSource::kNormed);
  Decoder<double> model = make_decoder(Kind::kDense, true);
  // A norm that the other kind of h would not go through.
  for (auto& [name, parameter] : parameters(model)) {
    if (name.starts_with("norm")) parameter->value += test::random_matrix(1, kModel, 4);
  }
  MultiToken<double> modules = make_modules(1, Kind::kDense, {.source = source});
  train(model, modules);
  Index accepted = 0;
  Rng rng(3);
  for (int draw = 0; draw < 40; ++draw) {
    Ids ids;
    for (Index i = rng.below(5); i >= 0; --i) ids.push_back(rng.below(kVocab));
    DraftReport report;
    const Ids text = speculate(model, modules, ids, 3, kGreedy, rng, report);
    CHECK(report.checked == Ids{1});
    // The loss of each token as the next but one of the last prompt token.
    ids.push_back(text[0]);
    Decoder<double>::Cache cache;
    model.forward(ids, kTraining, cache);
    Index best = 0;
    double least = 1e9;
    for (Index candidate = 0; candidate < kVocab; ++candidate) {
      Ids targets(ids.size(), -100);
      targets.back() = candidate;
      MultiToken<double>::Cache module_cache;
      const double loss = modules.forward(model, cache, ids, targets, kTraining, module_cache);
      if (loss < least) best = candidate;
      least = std::min(least, loss);
    }
    CHECK(report.accepted[0] == (best == text[1] ? 1 : 0));
    accepted += report.accepted[0];
  }
  CHECK(accepted > 4);
  CHECK(accepted < 36);
}

TEST_CASE("A report adds up calls with different numbers of modules", "[model][speculative]") {
  const Decoder<double> model = make_bigram();
  DraftReport report;
  Rng rng(0);
  speculate(model, make_bigram_modules(1, 1.0), Ids{4}, 5, kGreedy, rng, report);
  CHECK(report.checked == Ids{2});
  speculate(model, make_bigram_modules(3, -1.0), Ids{4}, 6, kGreedy, rng, report);
  CHECK(report.checked == Ids{2 + 4, 0, 0});
  speculate(model, make_bigram_modules(2, 1.0), Ids{4}, 7, kGreedy, rng, report);
  CHECK(report.checked == Ids{2 + 4 + 2, 2, 0});
  CHECK(report.accepted == Ids{2 + 2, 2, 0});
  CHECK(report.acceptance() == 0.6);
  CHECK(report.tokens == 18);
}

TEST_CASE("Drafts that were refused leave no trace in the modules", "[model][speculative]") {
  Decoder<double> model = make_decoder(Kind::kWindow, true);
  MultiToken<double> modules = make_modules(3, Kind::kDense);
  train(model, modules);
  SpeculativeState<double> state;
  DraftReport ignored;
  Rng rng(1);
  for (int turn = 0; turn < 12; ++turn) {
    // Drafts are greedy: with a temperature, many are refused.
    const Sampling sampling = {.temperature = 2.0};
    speculate(model, modules, Ids{turn % kVocab}, {.count = 5}, sampling, rng, state, ignored);
    // From here on, a state that has seen no drafts at all has to draft the same.
    SpeculativeState<double> copy = state;
    SpeculativeState<double> fresh;
    DraftReport report, expected;
    const Ids next = {3};
    speculate(model, modules, next, {.count = 8}, kGreedy, rng, copy, report);
    const Ids all = test::joined(state.tokens, next);
    speculate(model, modules, all, {.count = 8}, kGreedy, rng, fresh, expected);
    CHECK(copy.tokens == fresh.tokens);
    CHECK(report.checked == expected.checked);
    CHECK(report.accepted == expected.accepted);
  }
  CHECK(ignored.acceptance() < 0.8);
}

TEST_CASE("Speculative decoding continues a conversation", "[model][speculative]") {
  const auto depth = GENERATE(as<std::size_t>{}, 1, 3);
  const Decoder<double> model = make_decoder(Kind::kMixture, false);
  const MultiToken<double> modules = make_modules(depth, Kind::kMixture);
  SpeculativeState<double> state;
  DraftReport report;
  Rng rng(6), plain_rng(6);
  Ids text;
  Decoder<double>::State plain;
  for (const Ids& prompt : {Ids{1, 2, 3}, Ids{5}, Ids{8, 8}}) {
    for (const Index count : {6, 0, 1}) {
      const SpeculativeState<double> before = state;
      const Generated got =
          speculate(model, modules, prompt, {.count = count}, {}, rng, state, report);
      CHECK(got.tokens == generate(model, prompt, count, {}, plain_rng, plain));
      CHECK(got.ending == Ending::kCount);
      text = test::joined(text, prompt, got.tokens);
      CHECK(state.tokens == text);
      CHECK(state.main.length == plain.length);
      // A copy goes on from the same place.
      SpeculativeState<double> copy = before;
      Rng other(9), plain_other(9);
      speculate(model, modules, Ids{0}, {.count = 4}, {}, other, copy, report);
      const Ids so_far(text.begin(), text.begin() + before.main.length);
      CHECK(Ids(copy.tokens.end() - 4, copy.tokens.end()) ==
            generate(model, test::joined(so_far, Ids{0}), 4, {}, plain_other));
    }
  }
}

TEST_CASE("Speculative decoding ends where plain decoding does", "[model][speculative]") {
  const auto good_drafts = GENERATE(true, false);
  const Decoder<double> model = make_bigram();
  const MultiToken<double> modules = make_bigram_modules(2, good_drafts ? 1.0 : -1.0);
  const Ids prompt = {4, 7};
  Rng rng(7);
  const Sampling sampling = good_drafts ? kGreedy : Sampling{.temperature = 3.0};
  const Ids all = generate(model, prompt, 20, sampling, rng);
  for (std::size_t i = 0; i < 6; ++i) {
    Index calls = 0;
    const std::vector<Until> conditions = {{.count = static_cast<Index>(i)},
                                           {.count = 20, .tokens = {all[i]}},
                                           {.count = 20, .texts = {{all[i], all[i + 1]}}},
                                           {.count = 20, .on_token = [&](Index) {
                                              return ++calls % (static_cast<Index>(i) + 1) != 0;
                                            }}};
    for (const Until& until : conditions) {
      Rng one(7), other(7);
      SpeculativeState<double> state;
      Decoder<double>::State plain;
      DraftReport report;
      const Generated expected = generate(model, prompt, until, sampling, one, plain);
      calls = 0;
      const Generated got =
          speculate(model, modules, prompt, until, sampling, other, state, report);
      calls = 0;
      CHECK(got.tokens == expected.tokens);
      CHECK(got.ending == expected.ending);
      CHECK(state.main.length == plain.length);
      CHECK(state.tokens == test::joined(prompt, expected.tokens));
      CHECK(one.position() == other.position());
      // And goes on from there.
      CHECK(speculate(model, modules, Ids{1}, {.count = 5}, kGreedy, other, state, report).tokens ==
            generate(model, Ids{1}, 5, kGreedy, one, plain));
    }
  }
}

TEST_CASE("Speculative decoding works with weights stored for inference", "[model][speculative]") {
  const auto storage = GENERATE(Storage::kPacked, Storage::kBfloat16);
  Decoder<float> model = make_decoder<float>(Kind::kMixture, true);
  MultiToken<float> modules = make_modules<float>(2, Kind::kMixture);
  set_storage(model, storage);
  set_storage(modules, storage);
  CHECK(parameters(modules).size() == 12);  // The norms and routers.
  Rng rng(0), plain_rng(0);
  DraftReport report;
  CHECK(speculate(model, modules, Ids{3, 1}, 20, kGreedy, rng, report) ==
        generate(model, Ids{3, 1}, 20, kGreedy, plain_rng));
  CHECK(report.checked[0] > 0);
}

TEST_CASE("A state that an exception has left incomplete is not continued",
          "[model][speculative]") {
  const Decoder<double> model = make_bigram();
  const MultiToken<double> modules = make_bigram_modules(2, 1.0);
  SpeculativeState<double> state;
  DraftReport report;
  Rng rng(0);
  const Until until = {.count = 9,
                       .on_token = [](Index) -> bool { throw std::runtime_error("no"); }};
  CHECK(test::message_of<std::runtime_error>([&] {
          speculate(model, modules, Ids{1}, until, kGreedy, rng, state, report);
        }) == "no");
  CHECK(test::message_of<StateError>([&] {
          speculate(model, modules, Ids{1}, {.count = 1}, kGreedy, rng, state, report);
        }) == "speculate: the state is incomplete after an exception, expected a copy made before");
}

TEST_CASE("Speculative decoding refuses misuse before it changes anything",
          "[model][speculative]") {
  const Decoder<double> model = make_decoder(Kind::kDense, true);
  const MultiToken<double> modules = make_modules(1, Kind::kDense);
  SpeculativeState<double> state;
  DraftReport report;
  Rng rng(8);
  speculate(model, modules, Ids{1, 2}, {.count = 2}, kGreedy, rng, state, report);
  const auto message = [&](const Ids& prompt, const Until& until, const Sampling& sampling) {
    return test::message_of<ConfigError>(
        [&] { speculate(model, modules, prompt, until, sampling, rng, state, report); });
  };
  CHECK(message({}, {.count = 3}, {}) == "generate: prompt is empty, expected at least one token");
  CHECK(message({1}, {.count = -1}, {}) == "generate: count = -1, expected >= 0");
  CHECK(message({1}, {.count = 1, .texts = {{}}}, {}) ==
        "generate: until.texts[0] is empty, expected at least one token");
  CHECK(message({1}, {.count = 1}, {.top_k = -1}) == "Sampling: top_k = -1, expected >= 0");
  CHECK(message({3, 11}, {.count = 3}, {}) ==
        "generate: prompt[1] = 11 of conversation 0, expected 0 <= id < 11");
  CHECK(state.main.length == 4);
  CHECK(state.tokens.size() == 4);

  const MultiToken<double> two = make_modules(2, Kind::kDense);
  CHECK(test::message_of<StateError>([&] {
          speculate(model, two, Ids{1}, {.count = 3}, {}, rng, state, report);
        }) == "speculate: the state has 1 modules, expected 2");
  const Decoder<double> wide(Embedding<double>(kVocab, 10, rng), {}, RmsNorm<double>(10));
  SpeculativeState<double> fresh;
  CHECK(test::message_of<ConfigError>([&] {
          speculate(wide, modules, Ids{1}, {.count = 3}, {}, rng, fresh, report);
        }) == "speculate: the modules have d_model = 8, expected 10 as the model");

  Matrix<double> table = test::random_matrix(kVocab, kModel, 9);
  table(2, 1) = std::numeric_limits<double>::quiet_NaN();
  const Decoder<double> broken(Embedding<double>(table), {}, RmsNorm<double>(kModel));
  CHECK_THROWS_AS(speculate(broken, modules, Ids{2}, 1, {}, rng, report), NonFiniteError);
}

}  // namespace weir::speculative_test
