// SPDX-License-Identifier: MIT
// Decoding with a Decoder: several conversations at once, and tokens taken back.
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/hash_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/rms_norm.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/texts.hpp"
#include "support/threads.hpp"

namespace weir::decode_test {

namespace {

using Ids = std::vector<Index>;

constexpr Index kVocab = 11;

// Two layers of attention and a mixture, the second mixture routed by token id.
template <class T>
Decoder<T> make_decoder(bool tied) {
  Rng rng(1);
  const RmsNorm<T> norm(8);
  const auto attention = [&] {
    return GroupedQueryAttention<T>(rng, {.d_model = 8, .heads = 2, .kv_heads = 1});
  };
  std::vector<Block<T>> layers;
  layers.push_back(
      pre_norm_block<T>(norm, attention(), norm,
                        MoELayer(LinearRouter<T>(8, 3, rng, {.init_scale = 1.0}),
                                 SoftmaxTopK<T>({.k = 2}), Dropless(), GluBank<T>(8, 3, 6, rng)),
                        "moe"));
  layers.push_back(
      pre_norm_block<T>(norm, attention(), norm,
                        MoELayer(HashRouter<T>(8, 3, modulo_hash_table(kVocab, 3)),
                                 SoftmaxTopK<T>({.k = 1}), Dropless(), GluBank<T>(8, 3, 6, rng)),
                        "moe"));
  std::optional<Linear<T>> head;
  if (!tied) head.emplace(8, kVocab, rng);
  return {Embedding<T>(kVocab, 8, rng, {.stddev = 0.5}), std::move(layers), norm, std::move(head)};
}

}  // namespace

TEST_CASE("Decoder decodes several conversations as it does each alone", "[model][decode]") {
  const auto tied = GENERATE(false, true);
  const Decoder<double> model = make_decoder<double>(tied);
  // How many tokens each of four conversations adds in each of five calls.
  const std::vector<std::vector<Index>> calls = {
      {3, 0, 1, 5}, {1, 1, 1, 1}, {0, 2, 0, 1}, {0, 0, 0, 0}, {2, 4, 1, 0}};
  constexpr std::size_t kCount = 4;
  std::array<Ids, kCount> text;
  std::array<Decoder<double>::State, kCount> state;
  std::array<Decoder<double>::State, kCount> last_state;
  std::array<Decoder<double>::State*, kCount> states{};
  std::array<Decoder<double>::State*, kCount> last_states{};
  for (std::size_t c = 0; c < kCount; ++c) {
    states[c] = &state[c];
    last_states[c] = &last_state[c];
  }
  Decoder<double>::Cache cache;
  Decoder<double>::Cache last_cache;
  Rng rng(2);
  for (const std::vector<Index>& counts : calls) {
    Ids ids;
    for (std::size_t c = 0; c < kCount; ++c) {
      for (Index i = 0; i < counts[c]; ++i) {
        ids.push_back(rng.below(kVocab));
        text[c].push_back(ids.back());
      }
    }
    const Sequences sequences(counts);
    const Pass pass{.sequences = &sequences};
    const Matrix<double>& logits = model.decode(ids, pass, states, cache);
    const Matrix<double>& last = model.decode(ids, pass, last_states, last_cache, true);
    REQUIRE(logits.rows() == sequences.tokens());
    Index row = 0;
    for (std::size_t c = 0; c < kCount; ++c) {
      const Index count = counts[c];
      CHECK(state[c].length == static_cast<Index>(text[c].size()));
      if (count == 0) continue;
      const Matrix<double> alone = infer(model, text[c]);
      CHECK(test::relative_error(logits.middleRows(sequences.begin(static_cast<Index>(c)), count),
                                 alone.bottomRows(count)) <= 1e-12);
      REQUIRE(row < last.rows());
      CHECK(test::relative_error(last.row(row++), alone.bottomRows(1)) <= 1e-12);
    }
    CHECK(last.rows() == row);
  }
}

TEST_CASE("Mixtures of experts see the tokens of all conversations in one pass",
          "[model][decode]") {
  const Decoder<double> model = make_decoder<double>(true);
  Decoder<double>::State a, b;
  Decoder<double>::State* const states[] = {&a, &b};
  Decoder<double>::Cache cache;
  const Sequences sequences({2, 3});
  PassRecord record(PassRecord::Collects::kLossesAndReports);
  const Ids ids = {0, 1, 2, 5, 3};
  model.decode(ids, {.sequences = &sequences, .record = &record}, states, cache);
  REQUIRE(record.reports().size() == 2);
  CHECK(record.reports()[0].name == "layers.0.moe");
  CHECK(record.reports()[0].report.tokens == 5);
  CHECK(record.reports()[1].report.load == Ids{2, 1, 2});  // By token id modulo 3.
  CHECK(record.losses().empty());

  // Ids of the pass come before the decoder's own.
  const Ids others = {1, 1, 1, 1, 1};
  record.clear();
  model.decode(ids, {.sequences = &sequences, .token_ids = others, .record = &record}, states,
               cache);
  CHECK(record.reports()[1].report.load == Ids{0, 5, 0});
}

TEST_CASE("Tokens taken back leave no trace", "[model][decode]") {
  const Decoder<double> model = make_decoder<double>(false);
  const Ids text = test::random_ids(9, kVocab, 3);
  Decoder<double>::State state;
  Decoder<double>::Cache cache;
  decode(model, text, state, cache);
  const auto length = GENERATE(as<Index>{}, 0, 1, 5, 9);
  state.truncate(length);
  CHECK(state.length == length);

  Decoder<double>::State expected;
  Decoder<double>::Cache other;
  Ids all(text.begin(), text.begin() + length);
  if (length > 0) decode(model, all, expected, other);
  const Ids more = {4, 9};
  const Matrix<double>& logits = decode(model, more, expected, other);
  CHECK(test::relative_error(decode(model, more, state, cache), logits) <= 1e-12);
  all.insert(all.end(), more.begin(), more.end());
  CHECK(test::relative_error(logits, infer(model, all).bottomRows(2)) <= 1e-12);
}

TEST_CASE("A state that a failed pass has changed is truncated to its length", "[model][decode]") {
  Decoder<double> model = make_decoder<double>(false);
  Decoder<double>::State state;
  Decoder<double>::Cache cache;
  const Ids text = {1, 2, 3};
  decode(model, text, state, cache);
  // NaN in the embedding of token 5: the first router notices, behind the first attention.
  Parameter<double>& weight = *parameters(model)[0].parameter;
  weight.value(5, 0) = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS_AS(decode(model, Ids{4, 5}, state, cache), NonFiniteError);
  CHECK(state.length == 3);
  state.truncate(state.length);
  CHECK(test::relative_error(decode(model, Ids{4}, state, cache),
                             infer(model, Ids{1, 2, 3, 4}).bottomRows(1)) <= 1e-12);
}

TEST_CASE("Decoding is the same to the bit on one thread and on two", "[model][decode]") {
  const Decoder<float> model = make_decoder<float>(true);
  const Ids ids = test::random_ids(150, kVocab, 4);
  const Sequences sequences({100, 1, 49});
  const auto decode = [&] {
    Decoder<float>::State a, b, c;
    Decoder<float>::State* const states[] = {&a, &b, &c};
    Decoder<float>::Cache cache;
    return Matrix<float>(model.decode(ids, {.sequences = &sequences}, states, cache));
  };
  const Matrix<float> one = decode();
  const test::Threads two(2);
  CHECK(decode() == one);
}

TEST_CASE("Decoding needs one workspace, whatever the number of layers", "[model][decode]") {
  Decoder<double> model = make_decoder<double>(true);
  const std::vector<Block<double>> two = model.layers();
  for (int copies = 0; copies < 3; ++copies) {
    for (const Block<double>& layer : two) model.layers().push_back(layer);
  }
  Decoder<double>::State state;
  Decoder<double>::Cache cache;
  const Ids ids = test::random_ids(6, kVocab, 6);
  const Matrix<double>& logits = decode(model, ids, state, cache);
  CHECK(test::relative_error(logits, infer(model, ids)) <= 1e-12);
  CHECK(cache.layers.layers.empty());
  CHECK(state.layers.size() == 8);
}

TEST_CASE("Decoding allocates nothing once it has run before", "[model][decode]") {
  const auto last_only = GENERATE(false, true);
  const Decoder<float> model = make_decoder<float>(false);
  Decoder<float>::State a, b, c;
  Decoder<float>::State* const states[] = {&a, &b, &c};
  Decoder<float>::Cache cache;
  const Ids ids = test::random_ids(6, kVocab, 5);
  const Sequences sequences({3, 1, 2});
  const Pass pass{.sequences = &sequences};
  for (int i = 0; i < 8; ++i) model.decode(ids, pass, states, cache, last_only);
  for (Decoder<float>::State* s : states) s->truncate(0);
  CHECK(test::count_allocations([&] {
          for (int i = 0; i < 8; ++i) model.decode(ids, pass, states, cache, last_only);
        }) == 0);
}

TEST_CASE("Decoding refuses misuse before it changes anything", "[model][decode]") {
  const Decoder<double> model = make_decoder<double>(false);
  Decoder<double>::State a, b;
  Decoder<double>::Cache cache;
  decode(model, Ids{1, 2}, a, cache);
  const Sequences two({2, 1});
  const Sequences four({2, 2});
  const Ids ids = {1, 2, 3};
  using States = std::vector<Decoder<double>::State*>;
  const auto attempt = [&](const Pass& pass, const States& states, const Ids& of) {
    return [&model, &cache, pass, states, of] { model.decode(of, pass, states, cache); };
  };
  CHECK(test::message_of<StateError>(attempt({.sequences = &two}, {&a}, ids)) ==
        "Decoder::decode: 1 states, expected 2 (one for each sequence)");
  CHECK(test::message_of<StateError>(attempt({}, {&a, &b}, ids)) ==
        "Decoder::decode: 2 states, expected 1 (one for each sequence)");
  CHECK(test::message_of<StateError>(attempt({.sequences = &two}, {&a, &a}, ids)) ==
        "Decoder::decode: states[0] and states[1] are the same, expected one for each sequence");
  CHECK(test::message_of<StateError>(attempt({.sequences = &two}, {&a, nullptr}, ids)) ==
        "Decoder::decode: states[1] is null");
  CHECK(test::message_of<ShapeError>(attempt({.sequences = &four}, {&a, &b}, ids)) ==
        "Decoder::decode: pass.sequences cover 4 tokens, expected 3");
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  CHECK(test::message_of<ConfigError>(attempt({.sequences = &two, .mask = mask}, {&a, &b}, ids)) ==
        "Decoder::decode: token 1 is padding, expected none where tokens are kept");
  CHECK(test::message_of<ConfigError>(attempt({.sequences = &two}, {&a, &b}, {1, 2, 11})) ==
        "Embedding::forward: ids[2] = 11, expected 0 <= id < 11");
  CHECK(test::message_of<ConfigError>([&] { a.truncate(3); }) ==
        "Decoder::State::truncate: length = 3, expected 0 <= length <= 2");
  CHECK(test::message_of<ConfigError>([&] { a.truncate(-1); }) ==
        "Decoder::State::truncate: length = -1, expected 0 <= length <= 2");
  CHECK(a.length == 2);
  CHECK(test::relative_error(decode(model, Ids{3}, a, cache),
                             infer(model, Ids{1, 2, 3}).bottomRows(1)) <= 1e-12);
}

}  // namespace weir::decode_test
