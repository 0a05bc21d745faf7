// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/decoding.hpp>
#include <weir/core/layer.hpp>

#include "attention/grouped_query_reference.hpp"
#include "support/allocations.hpp"
#include "support/caches.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::grouped_query_test {

static_assert(DecodingLayer<GroupedQueryAttention<float>>);
static_assert(DecodingLayer<GroupedQueryAttention<double>>);

namespace {

using Gqa = GroupedQueryAttention<double>;

template <class T = double>
GroupedQueryAttention<T> make(const GroupedQueryConfig& config) {
  return test::random_attention<T>(config);
}

}  // namespace

TEST_CASE("GroupedQueryAttention matches a case worked by hand",
          "[attention][grouped_query][golden]") {
  // One head of two numbers, all projections the identity, theta = 1: position t turns by t
  // radians. x_0 = (1, 0), x_1 = (0, 1). Token 0 sees itself alone, y_0 = x_0. Token 1 has the
  // scores
  //   s_1 = 1 / sqrt(2)                                     (with itself: rotation keeps the norm)
  //   s_0 = R(1)(0, 1) . (1, 0) / sqrt(2) = -sin(1) / sqrt(2)
  // so p_0 = 1 / (1 + exp((1 + sin(1)) / sqrt(2))) = 0.213809 and y_1 = (p_0, 1 - p_0).
  Gqa layer = make({.d_model = 2, .heads = 1, .kv_heads = 1, .rope_theta = 1.0});
  for (auto& [name, parameter] : parameters(layer)) parameter->value.setIdentity();
  const Matrix<double> y = infer(layer, Matrix<double>::Identity(2, 2));

  CHECK(y(0, 0) == Approx(1.0));
  CHECK(y(0, 1) == Approx(0.0).margin(1e-15));
  CHECK(y(1, 0) == Approx(0.213809).epsilon(1e-5));
  CHECK(y(1, 1) == Approx(1.0 - 0.213809).epsilon(1e-5));
}

TEST_CASE("GroupedQueryAttention is the softmax attention of its definition",
          "[attention][grouped_query]") {
  const auto kv_heads = GENERATE(as<Index>{}, 1, 2, 4);
  const auto layout = GENERATE(RopeLayout::kHalfSplit, RopeLayout::kInterleaved);
  const bool bias = GENERATE(false, true);
  Gqa layer = make({.d_model = 10,
                    .heads = 4,
                    .kv_heads = kv_heads,
                    .head_dim = 6,
                    .rope_theta = 100.0,
                    .rope_layout = layout,
                    .qkv_bias = bias,
                    .output_bias = bias});
  Gqa::Cache cache;

  SECTION("one sequence, short or longer than two blocks of keys") {
    for (const Index tokens : {1, 2, 17, 64, 65, 97, 230}) {
      INFO("tokens " << tokens);
      const Matrix<double> x = test::random_matrix(tokens, 10, 2);
      CHECK(test::relative_error(infer(layer, x), test::reference(layer, x)) <= 1e-13);
      CHECK(layer.forward(x, kTraining, cache) == infer(layer, x));
    }
  }
  SECTION("packed sequences, with and without padding") {
    const Sequences sequences({3, 0, 70, 1, 101, 0});
    const Matrix<double> x = test::random_matrix(sequences.tokens(), 10, 3);
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(sequences.tokens()), 1);
    Pass pass{.sequences = &sequences};
    CHECK(test::relative_error(layer.forward(x, pass, cache), test::reference(layer, x, pass)) <=
          1e-13);
    for (const std::size_t padding : {0U, 3U, 4U, 40U, 73U, 100U, 174U}) mask[padding] = 0;
    pass.mask = mask;
    CHECK(test::relative_error(layer.forward(x, pass, cache), test::reference(layer, x, pass)) <=
          1e-13);
  }
}

TEST_CASE("GroupedQueryAttention in float is close to double", "[attention][grouped_query]") {
  const GroupedQueryConfig config{.d_model = 32, .heads = 4, .kv_heads = 2};
  const auto narrow = make<float>(config);
  const auto wide = make<double>(config);
  const Matrix<double> x = 3.0 * test::random_matrix(150, 32, 4);

  const Matrix<double> y = infer(narrow, x.cast<float>()).cast<double>();
  CHECK(test::relative_error(y, infer(wide, x)) <= 1e-5);
}

TEST_CASE("GroupedQueryAttention survives scores far beyond the range of exp",
          "[attention][grouped_query]") {
  auto layer = make<float>({.d_model = 8, .heads = 2, .kv_heads = 1});
  layer.query().value *= 1e3F;
  layer.key().value *= 1e3F;
  GroupedQueryAttention<float>::Cache cache;
  const Matrix<float> x = test::random_matrix<float>(120, 8, 5);

  CHECK(layer.forward(x, kTraining, cache).allFinite());
  CHECK(layer.backward(x, cache).allFinite());
}

TEST_CASE("GroupedQueryAttention does not look ahead", "[attention][grouped_query]") {
  Gqa layer = make({.d_model = 8, .heads = 2, .kv_heads = 1});
  const Index tokens = 140;
  const Matrix<double> x = test::random_matrix(tokens, 8, 6);
  const Matrix<double> before = infer(layer, x);
  for (const Index changed : {1, 63, 64, 95, 96, 139}) {
    INFO("token " << changed);
    Matrix<double> other = x;
    other.row(changed) *= -5.0;
    const Matrix<double> after = infer(layer, other);
    CHECK(after.topRows(changed) == before.topRows(changed));
    CHECK(after.row(changed) != before.row(changed));
  }
}

TEST_CASE("GroupedQueryAttention keeps packed sequences apart", "[attention][grouped_query]") {
  Gqa layer = make({.d_model = 8, .heads = 2, .kv_heads = 2});
  const Sequences sequences({5, 0, 67, 1});
  const Matrix<double> x = test::random_matrix(sequences.tokens(), 8, 7);
  Gqa::Cache cache;
  const Matrix<double> y = layer.forward(x, Pass{.training = true, .sequences = &sequences}, cache);

  for (Index s = 0; s < sequences.count(); ++s) {
    const Matrix<double> alone =
        infer(layer, x.middleRows(sequences.begin(s), sequences.length(s)));
    CHECK(test::relative_error(y.middleRows(sequences.begin(s), sequences.length(s)), alone) <=
          1e-14);
  }
}

TEST_CASE("GroupedQueryAttention does not notice padding before a sequence",
          "[attention][grouped_query]") {
  Gqa layer = make({.d_model = 8, .heads = 2, .kv_heads = 1});
  const Matrix<double> x = test::random_matrix(30, 8, 8);
  std::vector<std::uint8_t> mask(30, 1);
  for (std::size_t t = 0; t < 9; ++t) mask[t] = 0;
  Gqa::Cache cache;
  const Matrix<double> shifted = layer.forward(x, Pass{.training = true, .mask = mask}, cache);

  CHECK(test::relative_error(shifted.bottomRows(21), infer(layer, x.bottomRows(21))) <= 1e-13);
}

TEST_CASE("A query that sees no key gets nothing and gives nothing", "[attention][grouped_query]") {
  Gqa layer = make({.d_model = 8, .heads = 2, .kv_heads = 1});
  const auto tokens = GENERATE(as<Index>{}, 1, 5, 100);
  const Matrix<double> x = test::random_matrix(tokens, 8, 9);
  Gqa::Cache cache;

  SECTION("all tokens are padding") {
    const std::vector<std::uint8_t> mask(static_cast<std::size_t>(tokens), 0);
    CHECK(layer.forward(x, Pass{.training = true, .mask = mask}, cache).isZero(0.0));
    CHECK(layer.backward(x, cache).isZero(0.0));
    for (auto& [name, parameter] : parameters(layer)) CHECK(parameter->grad.isZero(0.0));
  }
  SECTION("the first tokens are padding") {
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(tokens), 0);
    mask.back() = 1;
    const Matrix<double> y = layer.forward(x, Pass{.training = true, .mask = mask}, cache);
    CHECK(y.topRows(tokens - 1).isZero(0.0));
    CHECK(y.row(tokens - 1) != Matrix<double>::Zero(1, 8));
    const Matrix<double> dx = layer.backward(x, cache);
    CHECK(dx.topRows(tokens - 1).isZero(0.0));
    CHECK(dx.allFinite());
  }
}

TEST_CASE("GroupedQueryAttention decodes what it would compute at once",
          "[attention][grouped_query]") {
  const auto kv_heads = GENERATE(as<Index>{}, 1, 4);
  const auto chunk = GENERATE(as<Index>{}, 1, 3, 50, 110, 220);
  const Index tokens = 220;

  SECTION("double") {
    const Gqa layer = make(
        {.d_model = 16, .heads = 4, .kv_heads = kv_heads, .qkv_bias = true, .output_bias = true});
    const Matrix<double> x = test::random_matrix(tokens, 16, 10);
    const Matrix<double> whole = infer(layer, x);
    Gqa::State kv;
    Gqa::Cache cache;
    Matrix<double> y(tokens, 16);
    for (Index t = 0; t < tokens; t += chunk) {
      const Index count = std::min(chunk, tokens - t);
      y.middleRows(t, count) = decode(layer, x.middleRows(t, count), kv, cache);
      CHECK(kv.length() == t + count);
    }
    CHECK(test::relative_error(y, whole) <= 1e-12);
  }
  SECTION("float") {
    const auto layer = make<float>(
        {.d_model = 16, .heads = 4, .kv_heads = kv_heads, .qkv_bias = true, .output_bias = true});
    const Matrix<float> x = test::random_matrix<float>(tokens, 16, 10);
    const Matrix<float> whole = infer(layer, x);
    GroupedQueryAttention<float>::State kv;
    GroupedQueryAttention<float>::Cache cache;
    Matrix<float> y(tokens, 16);
    for (Index t = 0; t < tokens; t += chunk) {
      const Index count = std::min(chunk, tokens - t);
      y.middleRows(t, count) = decode(layer, x.middleRows(t, count), kv, cache);
    }
    CHECK(test::relative_error(y, whole) <= 1e-5);
  }
}

TEST_CASE("GroupedQueryAttention continues a copied and a shortened cache",
          "[attention][grouped_query]") {
  const Gqa layer = make({.d_model = 8, .heads = 2, .kv_heads = 1});
  const Matrix<double> x = test::random_matrix(20, 8, 11);
  Gqa::Cache cache;
  Gqa::State kv;
  decode(layer, x.topRows(12), kv, cache);
  Gqa::State copy = kv;
  const Matrix<double> rest = decode(layer, x.bottomRows(8), kv, cache);

  CHECK(decode(layer, x.bottomRows(8), copy, cache) == rest);
  kv.truncate(12);
  CHECK(decode(layer, x.bottomRows(8), kv, cache) == rest);
  CHECK(decode(layer, Matrix<double>(0, 8), kv, cache).rows() == 0);
  CHECK(kv.length() == 20);
}

TEST_CASE("GroupedQueryAttention decodes several conversations as it does each alone",
          "[attention][grouped_query]") {
  const Gqa layer =
      make({.d_model = 12, .heads = 4, .kv_heads = 2, .head_dim = 6, .qkv_bias = true});
  constexpr std::size_t kCount = 4;
  std::vector<Gqa::State> together(kCount);
  std::vector<Gqa::State> alone(kCount);
  std::vector<Gqa::State*> states;
  for (Gqa::State& state : together) states.push_back(&state);
  Gqa::Cache cache;
  Gqa::Cache other;
  std::uint64_t seed = 20;
  for (const std::vector<Index>& lengths : std::vector<std::vector<Index>>{
           {70, 3, 0, 1}, {1, 1, 1, 1}, {0, 0, 0, 0}, {1, 40, 2, 0}, {1, 1, 1, 1}}) {
    const Sequences sequences(lengths);
    const Matrix<double> x = test::random_matrix(sequences.tokens(), 12, seed++);
    const Matrix<double> y = layer.decode(x, Pass{.sequences = &sequences}, states, cache);
    REQUIRE(y.rows() == x.rows());
    for (Index s = 0; s < sequences.count(); ++s) {
      const Matrix<double> own =
          decode(layer, x.middleRows(sequences.begin(s), sequences.length(s)),
                 alone[static_cast<std::size_t>(s)], other);
      CHECK(test::relative_error(y.middleRows(sequences.begin(s), sequences.length(s)), own) <=
            1e-14);
    }
  }
  for (std::size_t s = 0; s < kCount; ++s) {
    CHECK(test::relative_error(together[s].keys(), alone[s].keys()) <= 1e-14);
  }
  const Sequences none;
  CHECK(layer.decode(Matrix<double>(0, 12), Pass{.sequences = &none}, {}, cache).rows() == 0);
}

TEST_CASE("GroupedQueryAttention decodes several conversations without allocating",
          "[attention][grouped_query][allocation]") {
  const auto layer = make<float>({.d_model = 16, .heads = 4, .kv_heads = 2});
  std::vector<GroupedQueryAttention<float>::State> of_conversation(3);
  std::vector<GroupedQueryAttention<float>::State*> states;
  for (auto& state : of_conversation) states.push_back(&state);
  const Sequences sequences = Sequences::uniform(3, 1);
  const Pass pass{.sequences = &sequences};
  const Matrix<float> x = test::random_matrix<float>(3, 16, 22);
  GroupedQueryAttention<float>::Cache cache;
  layer.decode(x, pass, states, cache);
  for (auto& state : of_conversation) state.reserve(40);
  layer.decode(x, pass, states, cache);
  const auto steps = [&] {
    for (int step = 0; step < 30; ++step) layer.decode(x, pass, states, cache);
  };
  CHECK(test::count_allocations(steps) == 0);
}

TEST_CASE("GroupedQueryAttention gradients agree with finite differences",
          "[attention][grouped_query][gradient]") {
  const auto kv_heads = GENERATE(as<Index>{}, 1, 2, 4);
  const auto layout = GENERATE(RopeLayout::kHalfSplit, RopeLayout::kInterleaved);
  Gqa layer = make({.d_model = 6,
                    .heads = 4,
                    .kv_heads = kv_heads,
                    .head_dim = 4,
                    .rope_layout = layout,
                    .qkv_bias = kv_heads == 2,
                    .output_bias = kv_heads != 1});
  SECTION("one sequence") {
    test::check_gradients(layer, test::random_matrix(7, 6, 12));
  }
  SECTION("packed sequences with padding") {
    const Sequences sequences({4, 0, 1, 6});
    std::vector<std::uint8_t> mask(11, 1);
    mask[0] = mask[4] = mask[7] = 0;
    const Pass pass{.sequences = &sequences, .mask = mask};
    test::check_gradients(layer, test::random_matrix(11, 6, 13), pass);
  }
}

TEST_CASE("GroupedQueryAttention gradients are right across the borders of blocks",
          "[attention][grouped_query][gradient]") {
  Gqa layer = make({.d_model = 2,
                    .heads = 2,
                    .kv_heads = 1,
                    .head_dim = 2,
                    .qkv_bias = true,
                    .output_bias = true});
  const Sequences sequences({131, 20, 70});
  std::vector<std::uint8_t> mask(221, 1);
  for (const std::size_t padding : {0U, 62U, 96U, 97U, 130U, 153U}) mask[padding] = 0;
  const Pass pass{.sequences = &sequences, .mask = mask};
  test::check_gradients(layer, test::random_matrix(sequences.tokens(), 2, 14), pass);
}

TEST_CASE("GroupedQueryAttention accumulates gradients", "[attention][grouped_query]") {
  Gqa layer =
      make({.d_model = 4, .heads = 2, .kv_heads = 1, .qkv_bias = true, .output_bias = true});
  const Matrix<double> x = test::random_matrix(9, 4, 15);
  Gqa::Cache cache;
  layer.forward(x, kTraining, cache);
  layer.backward(x, cache);
  std::vector<Matrix<double>> once;
  for (auto& [name, parameter] : parameters(layer)) once.push_back(parameter->grad);
  layer.forward(x, kTraining, cache);
  layer.backward(x, cache);
  std::size_t i = 0;
  for (auto& [name, parameter] : parameters(layer)) {
    INFO(name);
    CHECK(test::relative_error(parameter->grad, 2.0 * once[i++]) <= 1e-14);
  }
}

TEST_CASE("GroupedQueryAttention gives the same bits on any number of threads",
          "[attention][grouped_query][parallel]") {
  auto layer = make<float>(
      {.d_model = 32, .heads = 4, .kv_heads = 2, .qkv_bias = true, .output_bias = true});
  const Sequences sequences({150, 7, 90});
  const Matrix<float> x = test::random_matrix<float>(sequences.tokens(), 32, 16);
  const auto run = [&] {
    zero_gradients(layer);
    GroupedQueryAttention<float>::Cache cache;
    GroupedQueryAttention<float>::State kv;
    std::vector<Matrix<float>> results;
    results.push_back(layer.forward(x, Pass{.training = true, .sequences = &sequences}, cache));
    results.push_back(layer.backward(x, cache));
    for (auto& [name, parameter] : parameters(layer)) results.push_back(parameter->grad);
    results.push_back(decode(layer, x, kv, cache));
    results.push_back(decode(layer, x.topRows(1), kv, cache));
    return results;
  };
  const auto one = run();
  set_threads(2);
  const auto two = run();
  set_threads(1);

  for (std::size_t i = 0; i < one.size(); ++i) CHECK(one[i] == two[i]);
}

TEST_CASE("GroupedQueryAttention gives the same bits with a cache that has been used",
          "[attention][grouped_query]") {
  Gqa layer = make({.d_model = 8, .heads = 2, .kv_heads = 1});
  Gqa::Cache used;
  Gqa::State kv;
  layer.backward(layer.forward(test::random_matrix(130, 8, 17), kTraining, used), used);
  decode(layer, test::random_matrix(3, 8, 17), kv, used);
  zero_gradients(layer);
  const Matrix<double> x = test::random_matrix(75, 8, 18);
  Gqa::Cache fresh;

  CHECK(layer.forward(x, kTraining, used) == layer.forward(x, kTraining, fresh));
  CHECK(layer.backward(x, used) == layer.backward(x, fresh));
}

TEST_CASE("GroupedQueryAttention accepts no tokens", "[attention][grouped_query]") {
  Gqa layer =
      make({.d_model = 4, .heads = 2, .kv_heads = 1, .qkv_bias = true, .output_bias = true});
  const Matrix<double> none(0, 4);
  Gqa::Cache cache;
  CHECK(test::relative_error(layer.forward(none, kTraining, cache), none) == 0.0);
  CHECK(test::relative_error(layer.backward(none, cache), none) == 0.0);
  for (auto& [name, parameter] : parameters(layer)) CHECK(parameter->grad.isZero(0.0));
  const Sequences sequences({0, 0});
  CHECK(layer.forward(none, Pass{.training = true, .sequences = &sequences}, cache).rows() == 0);
}

TEST_CASE("GroupedQueryAttention names its parameters", "[attention][grouped_query]") {
  Gqa layer = make({.d_model = 12,
                    .heads = 6,
                    .kv_heads = 2,
                    .head_dim = 4,
                    .qkv_bias = true,
                    .output_bias = true});
  std::vector<std::string> shapes;
  for (auto& [name, parameter] : parameters(layer)) {
    shapes.push_back(name + " " + shape_of(parameter->value));
  }
  CHECK(shapes == std::vector<std::string>{"query [24, 12]", "key [8, 12]", "value [8, 12]",
                                           "output [12, 24]", "query_bias [1, 24]",
                                           "key_bias [1, 8]", "value_bias [1, 8]",
                                           "output_bias [1, 12]"});
  Gqa plain = make({.d_model = 12, .heads = 6, .kv_heads = 2});
  CHECK(parameters(plain).size() == 4);
  CHECK(plain.config().head_dim == 2);
}

TEST_CASE("GroupedQueryAttention says what is wrong", "[attention][grouped_query]") {
  const auto message = [](const GroupedQueryConfig& config) {
    return test::message_of<ConfigError>([&] { make(config); });
  };
  CHECK(message({.d_model = 0, .heads = 1, .kv_heads = 1}) ==
        "GroupedQueryAttention: d_model = 0, expected >= 1");
  CHECK(message({.d_model = 8, .heads = 0, .kv_heads = 1}) ==
        "GroupedQueryAttention: heads = 0, expected >= 1");
  CHECK(message({.d_model = 8, .heads = 4}) ==
        "GroupedQueryAttention: kv_heads = 0, expected >= 1");
  CHECK(message({.d_model = 8, .heads = 4, .kv_heads = 3}) ==
        "GroupedQueryAttention: kv_heads = 3, expected a divisor of heads = 4");
  CHECK(message({.d_model = 8, .heads = 3, .kv_heads = 3}) ==
        "GroupedQueryAttention: heads = 3, expected a divisor of d_model = 8 where head_dim is not "
        "given");
  CHECK(message({.d_model = 8, .heads = 2, .kv_heads = 1, .head_dim = -2}) ==
        "GroupedQueryAttention: head_dim = -2, expected >= 0");
  CHECK(message({.d_model = 6, .heads = 2, .kv_heads = 1}) ==
        "GroupedQueryAttention: head_dim = 3, expected an even number");
  CHECK(message({.d_model = 8, .heads = 2, .kv_heads = 1, .rope_theta = 0.0}) ==
        "GroupedQueryAttention: rope_theta = 0, expected a finite number > 0");

  Gqa layer = make({.d_model = 4, .heads = 2, .kv_heads = 1});
  Gqa::Cache cache;
  Gqa::State kv;
  const Matrix<double> x = test::random_matrix(3, 4, 19);
  const Matrix<double> wide = test::random_matrix(3, 5, 19);
  test::check_refused_caches(layer, x, "GroupedQueryAttention::backward");
  CHECK(test::message_of<ShapeError>([&] { infer(layer, wide); }) ==
        "GroupedQueryAttention::forward: x is [3, 5], expected [tokens, 4]");
  CHECK(test::message_of<ShapeError>([&] { decode(layer, wide, kv, cache); }) ==
        "GroupedQueryAttention::decode: x is [3, 5], expected [tokens, 4]");
  const std::vector<std::uint8_t> mask(2, 1);
  CHECK(test::message_of<ShapeError>(
            [&] { layer.forward(x, Pass{.training = true, .mask = mask}, cache); }) ==
        "GroupedQueryAttention::forward: pass.mask has 2 entries, expected 3 (one per token)");
  const Sequences sequences({1, 1});
  CHECK(test::message_of<ShapeError>([&] {
          layer.forward(x, Pass{.training = true, .sequences = &sequences}, cache);
        }) == "GroupedQueryAttention::forward: pass.sequences cover 2 tokens, expected 3");
  layer.forward(x, kTraining, cache);
  decode(layer, x, kv, cache);
  CHECK(test::message_of<StateError>([&] { layer.backward(x, cache); }) ==
        "GroupedQueryAttention::backward: the cache is empty, expected a forward pass that "
        "succeeded");
  kv.clear();
  kv.append(wide, wide);
  CHECK(test::message_of<ShapeError>([&] { decode(layer, x, kv, cache); }) ==
        "GroupedQueryAttention::decode: kv.keys is [3, 5], expected [3, 2]");
  CHECK(kv.length() == 3);

  const auto refusal = [&](const Pass& pass, const std::vector<Gqa::State*>& states) {
    return test::message_of<StateError>([&] { layer.decode(x, pass, states, cache); });
  };
  const Sequences two({1, 2});
  kv.clear();
  CHECK(refusal({.sequences = &two}, {&kv}) ==
        "GroupedQueryAttention::decode: 1 states, expected 2 (one for each sequence)");
  CHECK(refusal({}, {}) ==
        "GroupedQueryAttention::decode: 0 states, expected 1 (one for each sequence)");
  CHECK(refusal({.sequences = &two}, {&kv, nullptr}) ==
        "GroupedQueryAttention::decode: states[1] is null");
  CHECK(
      refusal({.sequences = &two}, {&kv, &kv}) ==
      "GroupedQueryAttention::decode: states[0] and states[1] are the same, expected one for each "
      "sequence");
  const std::vector<std::uint8_t> padding = {1, 0, 1};
  Gqa::State* const one[] = {&kv};
  CHECK(
      test::message_of<ConfigError>([&] { layer.decode(x, Pass{.mask = padding}, one, cache); }) ==
      "GroupedQueryAttention::decode: token 1 is padding, expected none where tokens are kept");
  CHECK(kv.empty());
  layer.forward(x, kTraining, cache);
  CHECK_THROWS_AS(layer.decode(x, Pass{.mask = padding}, one, cache), ConfigError);
  layer.backward(x, cache);  // What was refused has left the cache alone.
}

TEST_CASE("GroupedQueryAttention keeps nothing for backward in a pass that does not train",
          "[attention][grouped_query]") {
  const Gqa layer =
      make({.d_model = 8, .heads = 2, .kv_heads = 1, .clip_qkv = 1.0, .qk_norm = QkNorm::kPerHead});
  const Matrix<double> x = test::random_matrix(5, 8, 20);
  Gqa::Cache cache;
  layer.forward(x, Pass{}, cache);
  Gqa::State kv;
  decode(layer, x, kv, cache);
  CHECK(cache.x.size() == 0);
  CHECK(cache.stages.query_norm.x.size() == 0);
  CHECK(cache.stages.query_outside.empty());
}

TEST_CASE("GroupedQueryAttention begins with the asked-for spread", "[attention][grouped_query]") {
  const auto value = [](double init_scale) {
    Gqa layer = make({.d_model = 8, .heads = 2, .kv_heads = 1, .init_scale = init_scale});
    return Matrix<double>(layer.output().value);
  };
  CHECK(test::relative_error(value(4.0), 2.0 * value(1.0)) <= 1e-15);
}

}  // namespace weir::grouped_query_test
