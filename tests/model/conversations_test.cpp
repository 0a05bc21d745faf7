// SPDX-License-Identifier: MIT
// Text for many conversations at once.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/model/generate.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/hash_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/rms_norm.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/texts.hpp"

namespace weir::conversations_test {

namespace {

using Ids = std::vector<Index>;
using Conversations = std::vector<Conversation<double>>;

constexpr Index kVocab = 11;
constexpr Sampling kGreedy{.temperature = 0.0};

Decoder<double> make_decoder(std::uint64_t seed = 1) {
  Rng rng(seed);
  const RmsNorm<double> norm(8);
  const auto attention = [&] {
    return GroupedQueryAttention<double>(rng, {.d_model = 8, .heads = 2, .kv_heads = 1});
  };
  std::vector<Block<double>> layers;
  layers.push_back(pre_norm_block<double>(
      norm, attention(), norm,
      MoELayer(LinearRouter<double>(8, 3, rng, {.init_scale = 1.0}), SoftmaxTopK<double>({.k = 2}),
               Dropless(), GluBank<double>(8, 3, 6, rng)),
      "moe"));
  layers.push_back(pre_norm_block<double>(
      norm, attention(), norm,
      MoELayer(HashRouter<double>(8, 3, modulo_hash_table(kVocab, 3)),
               SoftmaxTopK<double>({.k = 1}), Dropless(), GluBank<double>(8, 3, 6, rng)),
      "moe"));
  return {Embedding<double>(kVocab, 8, rng, {.stddev = 0.5}), std::move(layers), norm,
          Linear<double>(8, kVocab, rng)};
}

}  // namespace

TEST_CASE("Each of many conversations gets the tokens it gets alone", "[model][generate]") {
  const auto sampling =
      GENERATE(as<Sampling>{}, kGreedy, Sampling{}, Sampling{.temperature = 1.5, .top_k = 4});
  const Decoder<double> model = make_decoder();
  const std::vector<Ids> prompts = {{4}, {0, 9, 3, 3, 7}, {5, 5}, {10, 2, 1}};
  const Ids counts = {7, 3, 0, 12};  // They leave one by one.
  Conversations conversations;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    conversations.push_back(
        {.prompt = prompts[i], .until = {.count = counts[i]}, .sampling = sampling, .rng = Rng(i)});
  }
  const std::vector<Generated> results = generate(model, conversations);
  REQUIRE(results.size() == prompts.size());
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    INFO("conversation " << i);
    const Ids expected = test::generate_slowly(model, prompts[i], counts[i], sampling, Rng(i));
    CHECK(results[i].tokens == expected);
    CHECK(results[i].ending == Ending::kCount);
    CHECK(conversations[i].state.length == static_cast<Index>(prompts[i].size()) + counts[i]);
    CHECK(conversations[i].rng.position() ==
          (sampling.temperature == 0.0 ? 0U : static_cast<std::uint64_t>(counts[i])));
    // One by one, the other way to write it.
    Rng rng(i);
    CHECK(generate(model, prompts[i], counts[i], sampling, rng) == expected);
  }

  // The next turn goes on behind the first.
  std::vector<Ids> text;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    text.push_back(test::joined(prompts[i], results[i].tokens, Ids{1, 8}));
    conversations[i].prompt = {1, 8};
    conversations[i].until.count = 4;
  }
  const Conversations before = conversations;
  const std::vector<Generated> next = generate(model, conversations);
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    INFO("conversation " << i);
    CHECK(next[i].tokens == test::generate_slowly(model, text[i], 4, sampling, before[i].rng));
  }
}

TEST_CASE("Conversations go on from copies of one prefix", "[model][generate]") {
  const Decoder<double> model = make_decoder();
  const Ids prefix = {3, 1, 4, 1, 5, 9, 2, 6};
  Decoder<double>::State state;
  Rng rng(0);
  generate(model, prefix, 0, kGreedy, rng, state);
  const std::vector<Ids> prompts = {{7}, {0, 0}, {7}};
  Conversations conversations;
  for (const Ids& prompt : prompts) {
    conversations.push_back(
        {.prompt = prompt, .until = {.count = 6}, .sampling = kGreedy, .state = state});
  }
  const std::vector<Generated> results = generate(model, conversations);
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    CHECK(results[i].tokens ==
          test::generate_slowly(model, test::joined(prefix, prompts[i]), 6, kGreedy, rng));
    CHECK(conversations[i].state.length == 8 + static_cast<Index>(prompts[i].size()) + 6);
  }
  CHECK(results[0].tokens == results[2].tokens);
  CHECK(state.length == 8);
}

TEST_CASE("Conversations end each by its own conditions", "[model][generate]") {
  const Decoder<double> model = make_decoder();
  const Ids prompt = {6, 1};
  const Sampling sampling = {.temperature = 2.0};
  const Ids all = test::generate_slowly(model, prompt, 12, sampling, Rng(3));
  const auto first_of = [&](Index token) {
    return static_cast<std::size_t>(std::find(all.begin(), all.end(), token) - all.begin());
  };
  Index calls = 0;
  const Conversation<double> plain = {
      .prompt = prompt, .until = {.count = 12}, .sampling = sampling, .rng = Rng(3)};
  Conversations conversations(7, plain);
  conversations[1].until.tokens = {100, all[5]};
  conversations[2].until.texts = {{all[0], all[0], all[0], all[0]}, {all[3], all[4]}};
  conversations[3].until.on_token = [&](Index) { return ++calls < 4; };
  conversations[4].until = {.count = 1};
  conversations[5].until = {.count = 0};
  // For several reasons at once. The prompt is no part of the text.
  conversations[6].until = {.count = 1,
                            .tokens = {all[0]},
                            .texts = {{all[0]}, {prompt[1], all[0]}},
                            .on_token = [](Index) { return false; }};
  const std::vector<Generated> results = generate(model, conversations);
  const auto begins = [&](const Generated& result, std::size_t count) {
    return result.tokens == Ids(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(count));
  };
  CHECK(begins(results[0], 12));
  CHECK(results[0].ending == Ending::kCount);
  CHECK(begins(results[1], first_of(all[5]) + 1));
  CHECK(results[1].ending == Ending::kToken);
  CHECK(results[2].tokens.size() <= 5);
  CHECK(begins(results[2], results[2].tokens.size()));
  CHECK(results[2].ending == Ending::kText);
  CHECK(begins(results[3], 4));
  CHECK(results[3].ending == Ending::kCallback);
  CHECK(calls == 4);
  CHECK(begins(results[4], 1));
  CHECK(results[4].ending == Ending::kCount);
  CHECK(begins(results[5], 0));
  CHECK(results[5].ending == Ending::kCount);
  CHECK(begins(results[6], 1));
  CHECK(results[6].ending == Ending::kToken);
  for (std::size_t i = 0; i < results.size(); ++i) {
    INFO("conversation " << i);
    CHECK(conversations[i].state.length == 2 + static_cast<Index>(results[i].tokens.size()));
  }

  // One conversation has the same conditions.
  Rng rng(3);
  Decoder<double>::State state;
  const Generated one = generate(model, prompt, conversations[1].until, sampling, rng, state);
  CHECK(one.tokens == results[1].tokens);
  CHECK(one.ending == Ending::kToken);
}

TEST_CASE("A text that begins in the prompt does not end a conversation", "[model][generate]") {
  const Decoder<double> model = make_decoder();
  const Ids prompt = {6, 1};
  const Ids all = test::generate_slowly(model, prompt, 5, kGreedy, Rng(0));
  Conversations conversations = {{.prompt = prompt,
                                  .until = {.count = 5, .texts = {{6, 1, all[0]}, {1, all[0]}}},
                                  .sampling = kGreedy}};
  CHECK(generate(model, conversations)[0].ending == Ending::kCount);
}

TEST_CASE("No conversations are no work", "[model][generate]") {
  Conversations none;
  CHECK(generate(make_decoder(), none).empty());
}

TEST_CASE("Conversations may be a vector, an array or a span", "[model][generate]") {
  const Decoder<double> model = make_decoder();
  const Conversation<double> one = {.prompt = {6, 1}, .until = {.count = 4}, .sampling = kGreedy};
  const Ids expected = test::generate_slowly(model, {6, 1}, 4, kGreedy, Rng(0));
  Conversations vector = {one, one};
  CHECK(generate(model, vector)[1].tokens == expected);
  std::array<Conversation<double>, 2> array = {one, one};
  CHECK(generate(model, array)[1].tokens == expected);
  vector = {one, one};
  const std::vector<Generated> of_span = generate(model, std::span(vector).first(1));
  REQUIRE(of_span.size() == 1);
  CHECK(of_span[0].tokens == expected);
  CHECK(vector[1].state.length == 0);
}

TEST_CASE("Conversations are checked before any of them changes", "[model][generate]") {
  const Decoder<double> model = make_decoder();
  const Conversation<double> good = {.prompt = {1, 2}, .until = {.count = 3}, .sampling = {}};
  const auto message = [&](const Conversation<double>& bad) {
    Conversations conversations = {good, bad};
    std::string text = test::message_of<ConfigError>([&] { generate(model, conversations); });
    CHECK(conversations[0].state.length == 0);
    CHECK(conversations[0].rng.position() == 0);
    return text;
  };
  CHECK(message({.prompt = {}, .until = {.count = 3}}) ==
        "generate: prompt is empty, expected at least one token");
  CHECK(message({.prompt = {1}, .until = {.count = -1}}) == "generate: count = -1, expected >= 0");
  CHECK(message({.prompt = {1}, .until = {.count = 1, .texts = {{1}, {}}}}) ==
        "generate: until.texts[1] is empty, expected at least one token");
  CHECK(message({.prompt = {1}, .until = {.count = 1}, .sampling = {.top_p = 2.0}}) ==
        "Sampling: top_p = 2, expected 0 <= top_p <= 1");
  CHECK(message({.prompt = {3, 11}, .until = {.count = 1}}) ==
        "generate: prompt[1] = 11 of conversation 1, expected 0 <= id < 11");
  // Also where the bad one would have had its turn after the others, in passes of its own.
  CHECK(message({.prompt = {-1}, .until = {.count = 1}, .adapters = "other"}) ==
        "generate: prompt[0] = -1 of conversation 1, expected 0 <= id < 11");
}

TEST_CASE("A callback that throws ends it for all", "[model][generate]") {
  const Decoder<double> model = make_decoder();
  Conversations conversations(2, {.prompt = {1, 2}, .until = {.count = 3}});
  conversations[1].until.on_token = [](Index) -> bool { throw std::runtime_error("enough"); };
  CHECK(test::message_of<std::runtime_error>([&] { generate(model, conversations); }) == "enough");
}

}  // namespace weir::conversations_test
