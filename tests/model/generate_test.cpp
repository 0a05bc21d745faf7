// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/model/generate.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/rms_norm.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/texts.hpp"

namespace weir::generate_test {

namespace {

using Ids = std::vector<Index>;

constexpr Sampling kGreedy{.temperature = 0.0};

Decoder<double> make_decoder() {
  Rng rng(1);
  const RmsNorm<double> norm(8);
  std::vector<Block<double>> layers;
  for (int layer = 0; layer < 2; ++layer) {
    layers.push_back(pre_norm_block<double>(
        norm, GroupedQueryAttention<double>(rng, {.d_model = 8, .heads = 2, .kv_heads = 1}), norm,
        MoELayer(LinearRouter<double>(8, 3, rng, {.init_scale = 1.0}),
                 SoftmaxTopK<double>({.k = 2}), Dropless(), GluBank<double>(8, 3, 6, rng)),
        "moe"));
  }
  return {Embedding<double>(11, 8, rng, {.stddev = 0.5}), std::move(layers), norm,
          Linear<double>(8, 11, rng)};
}

}  // namespace

TEST_CASE("generate draws what the whole sequence would give", "[model][generate]") {
  const auto sampling = GENERATE(as<Sampling>{}, kGreedy, Sampling{},
                                 Sampling{.temperature = 1.5, .top_k = 6, .top_p = 0.9},
                                 Sampling{.min_p = 0.3, .repetition_penalty = 1.5},
                                 Sampling{.temperature = 0.0, .repetition_penalty = 4.0});
  const Decoder<double> model = make_decoder();
  const auto prompt = GENERATE(Ids{4}, Ids{0, 9, 3, 3, 7});
  Rng rng(2);
  CHECK(generate(model, prompt, 12, sampling, rng) ==
        test::generate_slowly(model, prompt, 12, sampling, Rng(2)));
  CHECK(rng.position() == (sampling.temperature == 0.0 ? 0U : 12U));
}

TEST_CASE("generate continues a conversation", "[model][generate]") {
  const Decoder<double> model = make_decoder();
  const Ids first = {1, 2, 3};
  const Ids second = {8, 5};
  Rng rng(3);
  Decoder<double>::State state;
  const Ids answer = generate(model, first, 4, {}, rng, state);
  CHECK(answer == test::generate_slowly(model, first, 4, {}, Rng(3)));
  CHECK(state.length == 7);

  Decoder<double>::State other = state;
  Rng other_rng = rng;
  const Ids all = test::joined(first, answer, second);
  CHECK(generate(model, second, 5, {}, rng, state) ==
        test::generate_slowly(model, all, 5, {}, other_rng));
  CHECK(state.length == 14);

  // A copied state goes on from the same place.
  CHECK(generate(model, second, 5, kGreedy, other_rng, other) ==
        test::generate_slowly(model, all, 5, kGreedy, other_rng));
}

TEST_CASE("generate hands out each token as it comes, and stops when told", "[model][generate]") {
  const Decoder<double> model = make_decoder();
  const Ids prompt = {6, 1};
  Rng rng(4);
  const Ids expected = generate(model, prompt, 9, {}, rng);
  REQUIRE(expected.size() == 9);

  Ids seen;
  Rng again(4);
  const Ids all = generate(model, prompt, 9, {}, again, [&](Index token) {
    seen.push_back(token);
    return true;
  });
  CHECK(all == expected);
  CHECK(seen == expected);

  // The token that ends it is in the result and in the state.
  seen.clear();
  Rng stopped(4);
  Decoder<double>::State state;
  const Ids three = generate(model, prompt, 9, {}, stopped, state, [&](Index token) {
    seen.push_back(token);
    return seen.size() < 3;
  });
  CHECK(three == Ids(expected.begin(), expected.begin() + 3));
  CHECK(seen == three);
  CHECK(stopped.position() == 3);
  CHECK(state.length == 5);
  const Ids more = {2};
  CHECK(generate(model, more, 3, kGreedy, rng, state) ==
        test::generate_slowly(model, test::joined(prompt, three, more), 3, kGreedy, rng));
}

TEST_CASE("generate ends with a text that is all it has said", "[model][generate]") {
  const Decoder<double> model = make_decoder();
  const Ids prompt = {6, 1};
  Rng rng(4);
  const Ids expected = generate(model, prompt, 9, kGreedy, rng);
  for (std::size_t length = 1; length <= 3; ++length) {
    const Ids text(expected.begin(), expected.begin() + static_cast<std::ptrdiff_t>(length));
    Decoder<double>::State state;
    const Generated said =
        generate(model, prompt, Until{.count = 9, .texts = {text}}, kGreedy, rng, state);
    CHECK(said.ending == Ending::kText);
    CHECK(said.tokens == text);
  }
}

TEST_CASE("generate of no tokens adds the prompt to the state", "[model][generate]") {
  const Decoder<double> model = make_decoder();
  const Ids first = {1, 2, 3};
  const Ids second = {4};
  Rng rng(5);
  CHECK(generate(model, first, 0, {}, rng).empty());
  Decoder<double>::State state;
  CHECK(generate(model, first, 0, {}, rng, state).empty());
  CHECK(state.length == 3);
  CHECK(rng.position() == 0);
  CHECK(generate(model, second, 4, kGreedy, rng, state) ==
        test::generate_slowly(model, test::joined(first, second), 4, kGreedy, rng));
}

TEST_CASE("Prompts may be int, as tokenizers give them", "[model][generate]") {
  const Decoder<double> model = make_decoder();
  const std::vector<int> prompt = {6, 1};
  const Ids expected = test::generate_slowly(model, {6, 1}, 5, kGreedy, Rng(0));
  Rng rng(0);
  CHECK(generate(model, prompt, 5, kGreedy, rng) == expected);
  Decoder<double>::State state;
  CHECK(generate(model, prompt, {.count = 5}, kGreedy, rng, state).tokens == expected);
  CHECK(state.length == 7);
}

TEST_CASE("generate works in float", "[model][generate]") {
  Rng rng(6);
  const Decoder<float> model(Embedding<float>(11, 8, rng, {.stddev = 0.5}), {}, RmsNorm<float>(8));
  const Ids tokens = generate(model, Ids{3}, 20, {}, rng);
  CHECK(tokens.size() == 20);
  for (const Index token : tokens) CHECK((token >= 0 && token < 11));
}

TEST_CASE("generate refuses misuse before it changes anything", "[model][generate]") {
  const Decoder<double> model = make_decoder();
  Rng rng(7);
  Decoder<double>::State state;
  generate(model, Ids{1, 2}, 0, {}, rng, state);
  const auto message = [&](const Ids& prompt, Index count, const Sampling& sampling) {
    return test::message_of<ConfigError>(
        [&] { generate(model, prompt, count, sampling, rng, state); });
  };
  CHECK(message({}, 3, {}) == "generate: prompt is empty, expected at least one token");
  CHECK(message({3}, -1, {}) == "generate: count = -1, expected >= 0");
  CHECK(message({3, 11}, 3, {}) ==
        "generate: prompt[1] = 11 of conversation 0, expected 0 <= id < 11");
  CHECK(message({3}, 3, {.temperature = -1.0}) ==
        "Sampling: temperature = -1, expected a finite number >= 0");
  CHECK(message({3}, 0, {.top_p = 2.0}) == "Sampling: top_p = 2, expected 0 <= top_p <= 1");
  CHECK(test::message_of<ConfigError>([&] { generate(model, Ids{}, 3, {}, rng); }) ==
        "generate: prompt is empty, expected at least one token");
  CHECK(state.length == 2);
  CHECK(rng.position() == 0);
  CHECK(generate(model, Ids{3}, 4, kGreedy, rng, state) ==
        test::generate_slowly(model, {1, 2, 3}, 4, kGreedy, rng));
}

TEST_CASE("generate does not draw from NaN", "[model][generate]") {
  Rng rng(8);
  Matrix<double> table = test::random_matrix(5, 4, 9);
  table(2, 1) = std::numeric_limits<double>::quiet_NaN();
  const Decoder<double> model(Embedding<double>(table), {}, RmsNorm<double>(4));
  CHECK_THROWS_AS(generate(model, Ids{2}, 1, {}, rng), NonFiniteError);
}

}  // namespace weir::generate_test
