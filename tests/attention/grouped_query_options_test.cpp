// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <weir/attention/grouped_query.hpp>

#include "attention/grouped_query_reference.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::grouped_query_options_test {

namespace {

using Gqa = GroupedQueryAttention<double>;

struct Option {
  std::string name;
  GroupedQueryConfig config;
};

/// Each option alone, and those of some models together.
std::vector<Option> options(const GroupedQueryConfig& base = {
                                .d_model = 6, .heads = 4, .kv_heads = 2, .head_dim = 4}) {
  std::vector<Option> all;
  const auto add = [&](const std::string& name, auto&& set) {
    all.push_back({name, base});
    set(all.back().config);
  };
  add("query, key and value biases", [](auto& c) { c.qkv_bias = true; });
  add("output bias", [](auto& c) { c.output_bias = true; });
  add("NoPE", [](auto& c) { c.rope = false; });
  add("NoPE with an odd head", [](auto& c) {
    c.rope = false;
    c.head_dim = 3;
  });
  add("yarn", [](auto& c) { c.rope_scaling = Yarn{.factor = 8.0, .original_context = 16}; });
  add("yarn as DeepSeek has it", [](auto& c) {
    c.rope_scaling =
        Yarn{.factor = 8.0, .original_context = 16, .mscale = 0.7, .mscale_all_dim = 0.7};
  });
  add("positions divided by 4", [](auto& c) { c.rope_scaling = LinearScaling{.factor = 4.0}; });
  add("dynamic NTK", [](auto& c) {
    c.rope_scaling = DynamicNtkScaling{.factor = 2.0, .original_context = 16, .length = 80};
  });
  add("Llama 3's scaling",
      [](auto& c) { c.rope_scaling = Llama3Scaling{.factor = 8.0, .original_context = 16}; });
  add("partial rotation", [](auto& c) { c.rotary_dim = 2; });
  add("partial rotation of neighbours in an odd head", [](auto& c) {
    c.head_dim = 7;
    c.rotary_dim = 4;
    c.rope_layout = RopeLayout::kInterleaved;
    c.rope_scaling = LinearScaling{.factor = 2.0};
  });
  add("scale", [](auto& c) { c.scale = 1.3; });
  add("softcap", [](auto& c) { c.softcap = 0.7; });
  add("window", [](auto& c) { c.window = 5; });
  add("window of one", [](auto& c) { c.window = 1; });
  add("chunk", [](auto& c) { c.chunk = 4; });
  add("clip", [](auto& c) { c.clip_qkv = 0.6; });
  add("norm over all heads", [](auto& c) { c.qk_norm = QkNorm::kFull; });
  add("norm of each head", [](auto& c) { c.qk_norm = QkNorm::kPerHead; });
  add("norm without a weight", [](auto& c) {
    c.qk_norm = QkNorm::kL2;
    c.qk_norm_epsilon = 0.01;
  });
  add("sinks", [](auto& c) { c.sinks = true; });
  add("temperature", [](auto& c) {
    c.rope = false;
    c.temperature_scale = 0.5;
    c.temperature_floor = 3;
  });
  add("gpt-oss", [](auto& c) {
    c.qkv_bias = c.output_bias = c.sinks = true;
    c.window = 7;
    c.rope_scaling = Yarn{.factor = 32.0, .original_context = 16, .truncate = false};
  });
  add("Llama 4", [](auto& c) {
    c.qk_norm = QkNorm::kL2;
    c.chunk = 6;
    c.rope_layout = RopeLayout::kInterleaved;
  });
  add("Grok-1", [](auto& c) {
    c.softcap = 3.0;
    c.scale = 0.8;
  });
  add("most together", [](auto& c) {
    c.qkv_bias = c.output_bias = c.sinks = true;
    c.clip_qkv = 1.0;
    c.qk_norm = QkNorm::kPerHead;
    c.softcap = 2.0;
    c.window = 6;
    c.chunk = 9;
  });
  return all;
}

}  // namespace

TEST_CASE("GroupedQueryAttention is its definition with every option",
          "[attention][grouped_query]") {
  const Sequences sequences({12, 0, 75, 1});
  const Matrix<double> x = test::random_matrix(sequences.tokens(), 6, 1);
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(sequences.tokens()), 1);
  for (const std::size_t padding : {0U, 13U, 50U, 51U, 52U, 87U}) mask[padding] = 0;
  for (const Option& option : options()) {
    INFO(option.name);
    Gqa layer = test::random_attention(option.config);
    Gqa::Cache cache;
    Pass pass{.sequences = &sequences};
    CHECK(test::relative_error(layer.forward(x, pass, cache), test::reference(layer, x, pass)) <=
          1e-13);
    pass.mask = mask;
    CHECK(test::relative_error(layer.forward(x, pass, cache), test::reference(layer, x, pass)) <=
          1e-13);
    CHECK(test::relative_error(infer(layer, x), test::reference(layer, x)) <= 1e-13);
  }
}

TEST_CASE("GroupedQueryAttention gradients agree with finite differences for every option",
          "[attention][grouped_query][gradient]") {
  const Sequences sequences({8, 0, 2});
  std::vector<std::uint8_t> mask(10, 1);
  mask[0] = mask[5] = 0;
  const Pass pass{.sequences = &sequences, .mask = mask};
  for (const Option& option : options({.d_model = 2, .heads = 2, .kv_heads = 1, .head_dim = 4})) {
    INFO(option.name);
    Gqa layer = test::random_attention(option.config);
    test::check_gradients(layer, test::random_matrix(10, 2, 2), pass);
  }
}

TEST_CASE("GroupedQueryAttention decodes what it would compute at once with every option",
          "[attention][grouped_query]") {
  // Beyond the window and the slack of the state, which moves its rows in between.
  const Index tokens = 190;
  const auto chunk = GENERATE(as<Index>{}, 1, 3, 40, 190);
  const Matrix<double> x = test::random_matrix(tokens, 6, 3);
  for (const Option& option : options()) {
    INFO(option.name);
    const Gqa layer = test::random_attention(option.config);
    const Matrix<double> whole = infer(layer, x);
    Gqa::State kv;
    Gqa::Cache cache;
    Matrix<double> y(tokens, 6);
    for (Index t = 0; t < tokens; t += chunk) {
      const Index count = std::min(chunk, tokens - t);
      y.middleRows(t, count) = decode(layer, x.middleRows(t, count), kv, cache);
    }
    CHECK(kv.length() == tokens);
    CHECK(test::relative_error(y, whole) <= 1e-12);
    // A draft that was not accepted, and a copy that goes on by itself.
    kv.truncate(tokens - 30);
    Gqa::State copy = kv;
    CHECK(test::relative_error(decode(layer, x.bottomRows(30), kv, cache), whole.bottomRows(30)) <=
          1e-12);
    CHECK(test::relative_error(decode(layer, x.middleRows(tokens - 30, 7), copy, cache),
                               whole.middleRows(tokens - 30, 7)) <= 1e-12);
  }
}

TEST_CASE("GroupedQueryAttention in float is close to double with every option",
          "[attention][grouped_query]") {
  const Matrix<double> x = test::random_matrix(150, 6, 14);
  const Matrix<double> dy = test::random_matrix(150, 6, 15);
  for (const Option& option : options()) {
    INFO(option.name);
    auto wide = test::random_attention<double>(option.config);
    auto narrow = test::random_attention<float>(option.config);
    Gqa::Cache cache;
    GroupedQueryAttention<float>::Cache narrow_cache;
    GroupedQueryAttention<float>::State kv;
    const Matrix<double> y = wide.forward(x, kTraining, cache);
    const Matrix<double> narrow_y =
        narrow.forward(x.cast<float>(), kTraining, narrow_cache).cast<double>();
    CHECK(test::relative_error(narrow_y, y) <= 1e-5);
    CHECK(
        test::relative_error(narrow.backward(dy.cast<float>(), narrow_cache).cast<double>().eval(),
                             wide.backward(dy, cache)) <= 1e-5);
    const Matrix<double> decoded = decode(narrow, x.cast<float>(), kv, narrow_cache).cast<double>();
    CHECK(test::relative_error(decoded, y) <= 1e-5);
  }
}

TEST_CASE("GroupedQueryAttention decodes conversations of different lengths behind a window",
          "[attention][grouped_query]") {
  const Gqa layer = test::random_attention(
      {.d_model = 6, .heads = 2, .kv_heads = 1, .head_dim = 4, .window = 20, .sinks = true});
  constexpr std::size_t kCount = 3;
  const Matrix<double> x = test::random_matrix(400, 6, 4);
  const Matrix<double> whole = infer(layer, x);
  std::vector<Gqa::State> conversations(kCount);
  std::vector<Gqa::State*> states;
  for (Gqa::State& state : conversations) states.push_back(&state);
  Gqa::Cache cache;
  std::vector<Index> lengths = {0, 0, 0};
  for (const std::vector<Index>& step : std::vector<std::vector<Index>>{
           {200, 3, 0}, {1, 1, 1}, {1, 60, 1}, {30, 100, 0}, {1, 1, 1}, {1, 1, 1}, {4, 0, 90}}) {
    const Sequences sequences(step);
    Matrix<double> rows(sequences.tokens(), 6);
    Matrix<double> expected(sequences.tokens(), 6);
    for (std::size_t s = 0; s < kCount; ++s) {
      const auto begin = sequences.begin(static_cast<Index>(s));
      rows.middleRows(begin, step[s]) = x.middleRows(lengths[s], step[s]);
      expected.middleRows(begin, step[s]) = whole.middleRows(lengths[s], step[s]);
      lengths[s] += step[s];
    }
    const Matrix<double>& y = layer.decode(rows, Pass{.sequences = &sequences}, states, cache);
    CHECK(test::relative_error(y, expected) <= 1e-12);
  }
}

TEST_CASE("The state of a window is bounded, and always gives 64 tokens back",
          "[attention][grouped_query]") {
  const Index window = 40;
  const auto layer = test::random_attention<float>(
      {.d_model = 4, .heads = 1, .kv_heads = 1, .head_dim = 2, .window = window});
  const auto chunk = GENERATE(as<Index>{}, 1, 17, 200);
  const Matrix<float> x = test::random_matrix<float>(chunk, 4, 5);
  GroupedQueryAttention<float>::State kv;
  GroupedQueryAttention<float>::Cache cache;
  const Index page = Pages::kRows;
  const Index bound = window + 64 + page + chunk;
  for (Index t = 0; t < 2000; t += chunk) {
    decode(layer, x, kv, cache);
    REQUIRE(kv.held() <= bound);
    REQUIRE(kv.capacity() <= std::max(bound + page, 12 * page));  // A quarter would do.
    GroupedQueryAttention<float>::State copy = kv;
    copy.truncate(std::max<Index>(0, kv.length() - 64));
    REQUIRE(copy.first() <= std::max<Index>(0, copy.length() - window + 1));
  }
  const auto steps = [&] {
    for (int step = 0; step < 200; ++step) decode(layer, x, kv, cache);
  };
  steps();  // Pages begin everywhere once.
  CHECK(test::count_allocations(steps) == 0);
}

TEST_CASE("The state of chunks holds one chunk", "[attention][grouped_query]") {
  const Gqa layer = test::random_attention(
      {.d_model = 4, .heads = 1, .kv_heads = 1, .head_dim = 2, .chunk = 100});
  const Matrix<double> x = test::random_matrix(1, 4, 6);
  const Index page = Pages::kRows;
  Gqa::State kv;
  Gqa::Cache cache;
  for (Index t = 0; t < 1000; ++t) {
    decode(layer, x, kv, cache);
    REQUIRE(kv.held() <= 100 + 64 + page + 1);
  }
  // The last 64 tokens may be taken back: none is of an earlier chunk.
  CHECK(kv.first() == 900 / page * page);
}

TEST_CASE("Clamped queries, keys and values pass no gradient where they were outside",
          "[attention][grouped_query]") {
  Gqa layer = test::random_attention(
      {.d_model = 4, .heads = 1, .kv_heads = 1, .head_dim = 4, .clip_qkv = 1e-3});
  const Matrix<double> x = test::random_matrix(5, 4, 7);
  Gqa::Cache cache;
  layer.forward(x, kTraining, cache);
  CHECK(cache.v.cwiseAbs().maxCoeff() == 1e-3);
  CHECK(layer.backward(x, cache).norm() <= 1e-2);
  layer.value().value.setConstant(10.0);
  layer.query().value.setConstant(10.0);
  layer.key().value.setConstant(10.0);
  const Matrix<double> ones = Matrix<double>::Ones(5, 4);
  layer.forward(ones, kTraining, cache);
  CHECK(layer.backward(x, cache).isZero(0.0));

  Matrix<double> nan = x;
  nan(0, 0) = std::numeric_limits<double>::quiet_NaN();
  CHECK(infer(layer, nan).hasNaN());
}

TEST_CASE("GroupedQueryAttention forgets scale with a norm of queries and keys",
          "[attention][grouped_query]") {
  const auto norm = GENERATE(QkNorm::kFull, QkNorm::kPerHead, QkNorm::kL2);
  Gqa layer = test::random_attention({.d_model = 6,
                                      .heads = 2,
                                      .kv_heads = 1,
                                      .head_dim = 4,
                                      .qk_norm = norm,
                                      .qk_norm_epsilon = 1e-12});
  const Matrix<double> x = test::random_matrix(40, 6, 8);
  const Matrix<double> before = infer(layer, x);
  layer.query().value *= 7.0;
  layer.key().value *= 0.2;
  CHECK(test::relative_error(infer(layer, x), before) <= 1e-9);
}

TEST_CASE("GroupedQueryAttention without rotation does not see the order of earlier tokens",
          "[attention][grouped_query]") {
  const Matrix<double> x = test::random_matrix(10, 6, 9);
  Matrix<double> swapped = x;
  swapped.row(2) = x.row(5);
  swapped.row(5) = x.row(2);
  GroupedQueryConfig config{.d_model = 6, .heads = 2, .kv_heads = 1, .head_dim = 4, .rope = false};
  const Gqa unordered = test::random_attention(config);
  CHECK(test::relative_error(infer(unordered, swapped).bottomRows(1),
                             infer(unordered, x).bottomRows(1)) <= 1e-13);
  config.rope = true;
  const Gqa ordered = test::random_attention(config);
  CHECK(test::relative_error(infer(ordered, swapped).bottomRows(1),
                             infer(ordered, x).bottomRows(1)) > 1e-3);
}

TEST_CASE("A window lets nothing through but what is in it", "[attention][grouped_query]") {
  const auto window = GENERATE(as<Index>{}, 1, 10, 70);
  const Gqa layer = test::random_attention(
      {.d_model = 6, .heads = 2, .kv_heads = 1, .head_dim = 4, .window = window});
  const Matrix<double> x = test::random_matrix(150, 6, 10);
  const Matrix<double> before = infer(layer, x);
  for (const Index changed : {0, 3, 64, 79}) {
    Matrix<double> other = x;
    other.row(changed) *= -2.0;
    const Matrix<double> after = infer(layer, other);
    const Index end = changed + window;
    CHECK(after.bottomRows(150 - end) == before.bottomRows(150 - end));
    CHECK(after.row(end - 1) != before.row(end - 1));
  }
}

TEST_CASE("GroupedQueryAttention with every option gives the same bits on any number of threads",
          "[attention][grouped_query][parallel]") {
  const Sequences sequences({70, 7});
  const Matrix<double> x = test::random_matrix(sequences.tokens(), 6, 11);
  for (const Option& option : options()) {
    INFO(option.name);
    Gqa layer = test::random_attention(option.config);
    const auto run = [&] {
      zero_gradients(layer);
      Gqa::Cache cache;
      Gqa::State kv;
      std::vector<Matrix<double>> results;
      results.push_back(layer.forward(x, Pass{.training = true, .sequences = &sequences}, cache));
      results.push_back(layer.backward(x, cache));
      for (auto& [name, parameter] : parameters(layer)) results.push_back(parameter->grad);
      results.push_back(decode(layer, x, kv, cache));
      results.push_back(decode(layer, x.topRows(1), kv, cache));
      return results;
    };
    const auto one = run();
    const test::Threads threads(2);
    const auto two = run();
    for (std::size_t i = 0; i < one.size(); ++i) CHECK(one[i] == two[i]);
  }
}

TEST_CASE("GroupedQueryAttention with every option allocates nothing once it has run",
          "[attention][grouped_query][allocation]") {
  const Matrix<double> x = test::random_matrix(70, 6, 12);
  for (const Option& option : options()) {
    INFO(option.name);
    Gqa layer = test::random_attention(option.config);
    Gqa::Cache cache;
    const auto step = [&] {
      layer.forward(x, kTraining, cache);
      layer.backward(x, cache);
    };
    step();
    CHECK(test::count_allocations(step) == 0);
  }
}

TEST_CASE("GroupedQueryAttention names the parameters of its options",
          "[attention][grouped_query]") {
  const auto names = [](const GroupedQueryConfig& config) {
    Gqa layer = test::random_attention(config);
    std::vector<std::string> found;
    for (auto& [name, parameter] : parameters(layer)) {
      found.push_back(name + " " + shape_of(parameter->value));
    }
    return std::vector<std::string>(found.begin() + 4, found.end());
  };
  using Names = std::vector<std::string>;
  GroupedQueryConfig config{.d_model = 6, .heads = 4, .kv_heads = 2, .head_dim = 4};
  CHECK(names(config).empty());
  config.sinks = true;
  config.output_bias = true;
  config.qk_norm = QkNorm::kFull;
  CHECK(names(config) ==
        Names{"output_bias [1, 6]", "query_norm [1, 16]", "key_norm [1, 8]", "sinks [1, 4]"});
  config.qk_norm = QkNorm::kPerHead;
  CHECK(names(config) ==
        Names{"output_bias [1, 6]", "query_norm [1, 4]", "key_norm [1, 4]", "sinks [1, 4]"});
  config.qk_norm = QkNorm::kL2;
  config.qkv_bias = true;
  config.output_bias = false;
  CHECK(names(config) ==
        Names{"query_bias [1, 16]", "key_bias [1, 8]", "value_bias [1, 8]", "sinks [1, 4]"});
}

TEST_CASE("GroupedQueryAttention begins with biases and sinks of zeros and norms of ones",
          "[attention][grouped_query]") {
  Rng rng(1);
  Gqa layer(rng, {.d_model = 6,
                  .heads = 4,
                  .kv_heads = 2,
                  .head_dim = 4,
                  .qkv_bias = true,
                  .output_bias = true,
                  .qk_norm = QkNorm::kFull,
                  .sinks = true});
  std::vector<std::string> found;
  for (auto& [name, parameter] : parameters(layer)) {
    const Matrix<double>& value = parameter->value;
    if (value.isZero(0.0)) found.push_back(name + " " + shape_of(value) + " zeros");
    if (value.isOnes(0.0)) found.push_back(name + " " + shape_of(value) + " ones");
  }
  CHECK(found == std::vector<std::string>{"query_bias [1, 16] zeros", "key_bias [1, 8] zeros",
                                          "value_bias [1, 8] zeros", "output_bias [1, 6] zeros",
                                          "query_norm [1, 16] ones", "key_norm [1, 8] ones",
                                          "sinks [1, 4] zeros"});
  // A layer as it begins runs, with the biases and without: they change nothing yet.
  const Matrix<double> x = test::random_matrix(5, 6, 1);
  Rng same(1);
  Gqa plain(same, {.d_model = 6,
                   .heads = 4,
                   .kv_heads = 2,
                   .head_dim = 4,
                   .qk_norm = QkNorm::kFull,
                   .sinks = true});
  CHECK(infer(layer, x) == infer(plain, x));
  test::check_gradients(layer, x);
}

TEST_CASE("GroupedQueryAttention with fold_scale begins with the scores of the usual scale",
          "[attention][grouped_query]") {
  GroupedQueryConfig config{.d_model = 6, .heads = 4, .kv_heads = 2, .head_dim = 4};
  Rng rng(5);
  const Gqa usual(rng, config);
  config.scale = 1.0;
  config.fold_scale = true;
  rng = Rng(5);
  const Gqa folded(rng, config);
  // 1 / sqrt(4) goes from the scale to the queries.
  CHECK(folded.query().value == 0.5 * usual.query().value);
  CHECK(folded.key().value == usual.key().value);
  const Matrix<double> x = test::random_matrix(9, 6, 1);
  CHECK(test::relative_error(infer(folded, x), infer(usual, x)) <= 1e-14);
}

TEST_CASE("GroupedQueryAttention says what is wrong with its options",
          "[attention][grouped_query]") {
  const GroupedQueryConfig base{.d_model = 6, .heads = 4, .kv_heads = 2, .head_dim = 4};
  const auto message = [&](auto&& set) {
    GroupedQueryConfig config = base;
    set(config);
    return test::message_of<ConfigError>([&] { test::random_attention(config); });
  };
  const std::string layer = "GroupedQueryAttention: ";
  CHECK(message([](auto& c) { c.window = -1; }) == layer + "window = -1, expected >= 0");
  CHECK(message([](auto& c) { c.chunk = -2; }) == layer + "chunk = -2, expected >= 0");
  CHECK(message([](auto& c) { c.softcap = -1.0; }) ==
        layer + "softcap = -1, expected a finite number >= 0");
  CHECK(message([](auto& c) { c.scale = std::nan(""); }) ==
        layer + "scale = nan, expected a finite number >= 0");
  CHECK(message([](auto& c) { c.fold_scale = true; }) ==
        layer + "fold_scale without scale, expected both");
  CHECK(message([](auto& c) { c.clip_qkv = HUGE_VAL; }) ==
        layer + "clip_qkv = inf, expected a finite number >= 0");
  CHECK(message([](auto& c) {
          c.qk_norm = QkNorm::kFull;
          c.qk_norm_epsilon = 0.0;
        }) == layer + "qk_norm_epsilon = 0, expected a finite number > 0");
  CHECK(message([](auto& c) {
          c.qk_norm = QkNorm::kL2;
          c.rope = false;
        }) == layer + "qk_norm = kL2 without rope, expected both");
  CHECK(message([](auto& c) {
          c.rope_scaling = Yarn{.factor = 2.0};
          c.rope = false;
        }) == layer + "rope_scaling without rope, expected both");
  CHECK(message([](auto& c) { c.rope_scaling = Yarn{.factor = 0.5}; }) ==
        "Rope: yarn.factor = 0.5, expected a finite number >= 1");
  CHECK(message([](auto& c) {
          c.rope_scaling = Yarn{.factor = 2.0};
          c.rope_theta = 1.0;
        }) == "Rope: theta = 1, expected > 1 with a Yarn");
  CHECK(message([](auto& c) {
          c.rotary_dim = 2;
          c.rope = false;
        }) == layer + "rotary_dim without rope, expected both");
  CHECK(message([](auto& c) { c.rotary_dim = 3; }) ==
        layer + "rotary_dim = 3, expected an even number");
  CHECK(message([](auto& c) { c.rotary_dim = 6; }) ==
        layer + "rotary_dim = 6, expected 0 <= rotary_dim <= 4");
  CHECK(
      message([](auto& c) { c.rotary_dim = -2; }).starts_with(layer + "rotary_dim = -2, expected"));
  CHECK(message([](auto& c) { c.temperature_scale = 0.1; }) ==
        layer + "temperature_scale = 0.1 with rope, expected it only without");
  CHECK(message([](auto& c) { c.temperature_scale = -0.1; }) ==
        layer + "temperature_scale = -0.1, expected a finite number >= 0");
  CHECK(message([](auto& c) { c.temperature_floor = 0; }) ==
        layer + "temperature_floor = 0, expected >= 1");

  GroupedQueryConfig config = base;
  config.window = 5;
  const Gqa narrow = test::random_attention(config);
  config.window = 150;
  const Gqa wide = test::random_attention(config);
  Gqa::State kv;
  Gqa::Cache cache;
  const Matrix<double> x = test::random_matrix(200, 6, 13);
  decode(narrow, x, kv, cache);
  decode(narrow, x.topRows(1), kv, cache);
  CHECK(
      test::message_of<StateError>([&] { decode(wide, x, kv, cache); }) ==
      "GroupedQueryAttention::decode: kv begins at position 96, expected 52 or before: it is of a "
      "layer with a smaller window");
  CHECK(test::message_of<StateError>([&] { kv.truncate(135); }) ==
        "KvCache::truncate: length = 135, expected 0 or at least 136: the tokens before position "
        "96 have been forgotten");
  CHECK(kv.length() == 201);
  kv.truncate(136);
  CHECK(kv.length() == 136);
}

}  // namespace weir::grouped_query_options_test
