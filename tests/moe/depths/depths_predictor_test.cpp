// SPDX-License-Identifier: MIT
// Mixture of depths in decoding: a choice that is predicted from the token alone.
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/model/any_layer.hpp>
#include <weir/moe/depths/mixture_of_depths.hpp>
#include <weir/moe/depths/token_predictor.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>
#include <weir/optim/adamw.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/threads.hpp"

namespace weir::depths_predictor_test {

namespace {

using Attention = GroupedQueryAttention<double>;
using Predicted = MixtureOfDepths<Glu<double>, TokenPredictor<double>>;
using Tokens = List<Index>;

static_assert(Layer<Predicted>);
static_assert(DecodingLayer<MixtureOfDepths<Attention>>);
static_assert(DecodingLayer<MixtureOfDepths<Glu<float>>>);
static_assert(Predicted::Choice::kHasPredictor &&
              !MixtureOfDepths<Glu<float>>::Choice::kHasPredictor);

Glu<double> glu() {
  Rng rng(4);
  return {4, 6, rng};
}

TokenPredictor<double> network() {
  Rng rng(9);
  return {4, 5, rng, {.bias = true, .init_scale = 6.0}};
}

Predicted predicted(MixtureOfDepthsConfig config) {
  return {glu(), test::random_matrix(1, 4, 7), config, network()};
}

/// A predictor whose logit is the second number of a token.
Linear<double> second_number() {
  Matrix<double> weight = Matrix<double>::Zero(1, 4);
  weight(0, 1) = 1.0;
  return Linear<double>(weight);
}

Matrix<double> by_first_number() {
  Matrix<double> weight = Matrix<double>::Zero(1, 4);
  weight(0, 0) = 1.0;
  return weight;
}

Attention attention() {
  Rng rng(11);
  return {rng, {.d_model = 4, .heads = 2, .kv_heads = 1}};
}

/// Decodes x in pieces of the given sizes.
template <class L>
Matrix<double> decoded(const L& layer, const Matrix<double>& x, const std::vector<Index>& pieces) {
  typename L::State state;
  typename L::Cache cache;
  Matrix<double> y(x.rows(), x.cols());
  Index at = 0;
  for (const Index count : pieces) {
    y.middleRows(at, count) = decode(layer, x.middleRows(at, count), state, cache);
    at += count;
  }
  REQUIRE(at == x.rows());
  return y;
}

}  // namespace

TEST_CASE("A predictor of its own decides in evaluation, the scores in training",
          "[moe][mixture_of_depths][depths_predictor]") {
  const MixtureOfDepths layer(glu(), by_first_number(),
                              {.capacity = 0.5, .causal_evaluation = true}, second_number());
  Matrix<double> x = test::random_matrix(4, 4, 1);
  x.col(0) << 3.0, 1.0, 2.0, 0.5;
  x.col(1) << -0.1, 0.2, 0.3, 0.0;
  decltype(layer)::Cache cache;
  const Matrix<double>& y = layer.forward(x, {}, cache);
  CHECK(cache.choice.part.token == Tokens{1, 2});
  // What the layer adds is weighted with the score, not with the prediction.
  Matrix<double> expected = x;
  for (const Index t : {1, 2}) expected.row(t) += x(t, 0) * infer(glu(), x.row(t));
  CHECK(test::relative_error(y, expected) <= 1e-14);
  layer.forward(x, {.training = true}, cache);
  CHECK(cache.choice.part.token == Tokens{0, 2});

  const MixtureOfDepths ranking(glu(), by_first_number(), {.capacity = 0.5}, second_number());
  decltype(ranking)::Cache other;
  ranking.forward(x, kTraining, other);
  CHECK(other.choice.part.token == Tokens{0, 2});
}

TEST_CASE("The predictor's loss is that of its own logits",
          "[moe][mixture_of_depths][depths_predictor]") {
  const MixtureOfDepths layer(glu(), by_first_number(),
                              {.capacity = 0.5, .predictor_loss = 0.2, .causal_evaluation = true},
                              second_number());
  Matrix<double> x = test::random_matrix(2, 4, 1);
  x.col(0) << 1.0, 2.0;
  x.col(1) << std::log(3.0), std::log(9.0);  // sigmoids 3/4, 9/10; the second is chosen.
  CHECK(test::aux_loss(layer, x, {.training = true, .aux_scale = 0.5}) ==
        Approx(0.05 * (std::log(4.0) + std::log(10.0 / 9.0))));
  CHECK(test::aux_loss(layer, x, {}) == 0.0);
}

TEST_CASE("Training a predictor of its own leaves everything else as it was",
          "[moe][mixture_of_depths][depths_predictor][gradient]") {
  const Sequences sequences({5, 1, 3});
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 0, 1, 1};
  const Pass pass{.training = true, .sequences = &sequences, .mask = mask, .aux_scale = 0.6};
  const Matrix<double> x = test::random_matrix(9, 4, 1);
  const Matrix<double> dy = test::random_matrix(9, 4, 2);
  Predicted layer = predicted({.capacity = 0.4, .predictor_loss = 0.7});
  MixtureOfDepths plain(glu(), test::random_matrix(1, 4, 7), {.capacity = 0.4});
  Predicted::Cache cache;
  decltype(plain)::Cache expected;
  CHECK(layer.forward(x, pass, cache) == plain.forward(x, pass, expected));
  CHECK(test::aux_loss(layer, x, pass) > 0.0);
  CHECK(test::aux_loss(plain, x, pass) == 0.0);
  CHECK(layer.backward(dy, cache) == plain.backward(dy, expected));
  for (std::size_t i = 0; i < parameters(plain).size(); ++i) {
    CHECK(parameters(layer)[i].parameter->grad == parameters(plain)[i].parameter->grad);
  }

  // The predictor's own gradient; y does not depend on it.
  const auto all = parameters(layer);
  REQUIRE(all.size() == parameters(plain).size() + 4);
  for (std::size_t i = parameters(plain).size(); i < all.size(); ++i) {
    INFO(all[i].name);
    CHECK(all[i].name.substr(0, 10) == "predictor.");
    const Matrix<double> numeric = test::numeric_gradient(
        all[i].parameter->value, [&] { return test::aux_loss(layer, x, pass); });
    CHECK(test::relative_error(all[i].parameter->gradient(), numeric) <= 1e-7);
    CHECK(numeric.norm() > 1e-4);
  }
}

TEST_CASE("A predictor learns the choice it is told",
          "[moe][mixture_of_depths][depths_predictor]") {
  Rng rng(3);
  MixtureOfDepths layer(glu(), by_first_number(),
                        {.capacity = 0.25, .predictor_loss = 1.0, .causal_evaluation = true},
                        TokenPredictor<double>(4, 8, rng));
  AdamW<double> optimizer({.learning_rate = 0.03, .weight_decay = 0.0});
  const Matrix<double> x = test::random_matrix(128, 4, 5);
  const Matrix<double> none = Matrix<double>::Zero(128, 4);
  decltype(layer)::Cache cache;
  for (int step = 0; step < 120; ++step) {
    layer.forward(x, {.training = true}, cache);
    layer.backward(none, cache);
    optimizer.step(layer);
  }
  const List<std::uint8_t> ranked = cache.choice.part.chosen;
  layer.forward(x, {}, cache);
  Index same = 0;
  for (Index t = 0; t < ranked.count(); ++t) {
    same += ranked[t] == cache.choice.part.chosen[t] ? 1 : 0;
  }
  CHECK(same >= 122);
}

TEST_CASE("Decoding a mixture of depths is its causal evaluation, however it is cut",
          "[moe][mixture_of_depths][depths_predictor]") {
  const Matrix<double> x = test::random_matrix(12, 4, 6);
  const auto check = [&](const auto& layer) {
    typename std::remove_cvref_t<decltype(layer)>::Cache cache;
    const Matrix<double> whole = layer.forward(x, {}, cache);
    REQUIRE(cache.choice.part.token.size() > 1);
    REQUIRE(cache.choice.part.token.size() < 10);
    CHECK(test::relative_error(decoded(layer, x, {12}), whole) <= 1e-13);
    CHECK(test::relative_error(decoded(layer, x, std::vector<Index>(12, 1)), whole) <= 1e-13);
    CHECK(test::relative_error(decoded(layer, x, {5, 0, 1, 6}), whole) <= 1e-13);
    // Behind an interface, too.
    using L = std::remove_cvref_t<decltype(layer)>;
    const AnyLayer<double> any{L(layer)};
    CHECK(test::relative_error(decoded(any, x, {7, 1, 4}), whole) <= 1e-13);
  };
  const MixtureOfDepthsConfig config{.capacity = 0.25, .causal_evaluation = true};
  check(MixtureOfDepths(attention(), by_first_number(), config));
  check(MixtureOfDepths(attention(), by_first_number(), config, second_number()));
  check(MixtureOfDepths(AnyLayer<double>(attention()), by_first_number(), config, network()));
  check(MixtureOfDepths(glu(), by_first_number(), config, second_number()));
}

TEST_CASE("Only chosen tokens reach the state of decoding",
          "[moe][mixture_of_depths][depths_predictor]") {
  const MixtureOfDepths layer(attention(), by_first_number(), {.causal_evaluation = true});
  Matrix<double> x = test::random_matrix(5, 4, 8);
  x.col(0) << -1.0, 1.0, -1.0, 0.0, 2.0;
  decltype(layer)::State state;
  decltype(layer)::Cache cache;
  const Index lengths[] = {0, 1, 1, 1, 2};
  for (Index t = 0; t < 5; ++t) {
    const Matrix<double> token = x.row(t);
    const Matrix<double>& y = decode(layer, token, state, cache);
    CHECK(state.inner.length() == lengths[t]);
    CHECK(state.length() == t + 1);
    if (x(t, 0) <= 0.0) CHECK(y == token);
  }
}

TEST_CASE("Mixtures of depths decode several sequences at once, and take tokens back",
          "[moe][mixture_of_depths][depths_predictor]") {
  const MixtureOfDepths layer(attention(), by_first_number(), {.causal_evaluation = true});
  using Layer = std::remove_cvref_t<decltype(layer)>;
  const Matrix<double> x = test::random_matrix(9, 4, 3);
  const Matrix<double> other = test::random_matrix(9, 4, 5);
  Layer::Cache cache;
  const Matrix<double> first = layer.forward(x, {}, cache);
  const Matrix<double> second = layer.forward(other, {}, cache);

  Layer::State a;
  Layer::State b;
  Layer::State* const states[] = {&a, &b};
  Matrix<double> together(7, 4);
  together << x.topRows(5), other.topRows(2);
  Sequences sequences({5, 2});
  const Matrix<double> begun = layer.decode(together, {.sequences = &sequences}, states, cache);
  CHECK(test::relative_error(begun.topRows(5), first.topRows(5)) <= 1e-13);
  CHECK(test::relative_error(begun.bottomRows(2), second.topRows(2)) <= 1e-13);

  // Two tokens of the first are taken back, and others, then the same ones, take their place.
  decode(layer, test::random_matrix(3, 4, 17), a, cache);
  a.truncate(3);
  CHECK(a.length() == 3);
  together.resize(13, 4);
  together << x.bottomRows(6), other.bottomRows(7);
  sequences = Sequences({6, 7});
  const Matrix<double> ended = layer.decode(together, {.sequences = &sequences}, states, cache);
  CHECK(test::relative_error(ended.topRows(6), first.bottomRows(6)) <= 1e-13);
  CHECK(test::relative_error(ended.bottomRows(7), second.bottomRows(7)) <= 1e-13);

  CHECK(test::message_of<ConfigError>([&] { a.truncate(10); }) ==
        "MixtureOfDepths::State::truncate: length = 10, expected 0 <= length <= 9");
  CHECK(test::message_of<StateError>([&] { layer.decode(x, {}, states, cache); }) ==
        "MixtureOfDepths::decode: 2 states, expected 1 (one for each sequence)");
}

TEST_CASE("A predictor sees no padding", "[moe][mixture_of_depths][depths_predictor]") {
  Predicted layer = predicted({.capacity = 0.5, .predictor_loss = 0.4});
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  Matrix<double> x = test::random_matrix(3, 4, 1);
  x.row(1).setConstant(std::numeric_limits<double>::quiet_NaN());
  Predicted::Cache cache;
  layer.forward(x, {.training = true, .mask = mask}, cache);
  CHECK(std::isfinite(test::aux_loss(layer, x, {.training = true, .mask = mask})));
  layer.backward(Matrix<double>::Ones(3, 4), cache);
  for (const auto& [name, parameter] : parameters(layer)) CHECK(parameter->grad.allFinite());

  const std::vector<std::uint8_t> none = {0, 0, 0};
  CHECK(test::aux_loss(layer, x, {.training = true, .mask = none}) == 0.0);
  layer.forward(Matrix<double>(0, 4), kTraining, cache);
  CHECK(layer.backward(Matrix<double>(0, 4), cache).rows() == 0);
}

TEST_CASE(
    "A mixture of depths with a predictor gives the same bits for any number of threads and "
    "allocates nothing",
    "[moe][mixture_of_depths][depths_predictor]") {
  Rng rng(5);
  MixtureOfDepths layer(Linear<double>(16, 16, rng), 16, rng,
                        {.predictor_loss = 0.1, .causal_evaluation = true},
                        TokenPredictor<double>(16, 8, rng));
  const Matrix<double> x = test::random_matrix(600, 16, 1);
  decltype(layer)::Cache cache;
  decltype(layer)::State state;
  const auto train = [&] {
    layer.forward(x, {.training = true}, cache);
    layer.backward(x, cache);
  };
  const auto continue_anew = [&] {
    state.truncate(0);
    decode(layer, x, state, cache);
  };
  train();
  train();
  CHECK(test::count_allocations(train) == 0);
  continue_anew();
  CHECK(test::count_allocations(continue_anew) == 0);
  const Matrix<double> y = cache.y;
  zero_gradients(layer);
  train();
  const Matrix<double> dx = cache.dx;
  const Matrix<double> d_in = parameters(layer)[2].parameter->grad;
  zero_gradients(layer);
  const test::Threads threads(3);
  train();
  CHECK(cache.dx == dx);
  CHECK(parameters(layer)[2].parameter->grad == d_in);
  continue_anew();
  CHECK(cache.y == y);
}

TEST_CASE("Decoding a mixture of depths says what does not fit",
          "[moe][mixture_of_depths][depths_predictor]") {
  Rng rng(1);
  Predicted layer = predicted({.causal_evaluation = false});
  Predicted::State state;
  Predicted::Cache cache;
  Matrix<double> x = test::random_matrix(3, 4, 1);
  CHECK(test::message_of<ConfigError>([&] { decode(layer, x, state, cache); }) ==
        "MixtureOfDepths::decode: causal_evaluation = false, expected true: a token cannot be "
        "ranked among later ones");

  const MixtureOfDepths wide(glu(), by_first_number(), {.causal_evaluation = true},
                             Linear<double>(4, 2, rng));
  decltype(wide)::State wide_state;
  decltype(wide)::Cache wide_cache;
  CHECK(test::message_of<ShapeError>([&] { wide.forward(x, {}, wide_cache); }) ==
        "MixtureOfDepths::forward: the predictor's output is [3, 2], expected [3, 1]");
  CHECK(test::message_of<ShapeError>([&] { decode(wide, x, wide_state, wide_cache); }) ==
        "MixtureOfDepths::decode: the predictor's output is [3, 2], expected [3, 1]");
  CHECK(test::message_of<ShapeError>([&] {
          decode(wide, test::random_matrix(1, 3, 1), wide_state, wide_cache);
        }) == "MixtureOfDepths::decode: x is [1, 3], expected [tokens, 4]");

  Predicted causal = predicted({.causal_evaluation = true});
  decode(causal, x, state, cache);
  CHECK(test::message_of<StateError>([&] { causal.backward(x, cache); }) ==
        "MixtureOfDepths::backward: the cache is empty, expected a forward pass that succeeded");
  const MixtureOfDepths divided(
      glu(), by_first_number(), {.causal_evaluation = true},
      Linear<double>(Matrix<double>::Constant(1, 4, std::numeric_limits<double>::infinity())));
  x.row(0).setOnes();
  CHECK(test::message_of<NonFiniteError>([&] { infer(divided, x); }) ==
        "MixtureOfDepths::forward: the prediction for token 0 is inf, expected a finite number");
}

TEST_CASE("A mixture of depths with a predictor in single precision is that in double",
          "[moe][mixture_of_depths][depths_predictor]") {
  const auto build = [](auto zero) {
    using T = decltype(zero);
    Rng rng(23);
    return MixtureOfDepths(Linear<T>(4, 4, rng), 4, rng,
                           {.capacity = 0.5, .predictor_loss = 0.3, .causal_evaluation = true},
                           TokenPredictor<T>(4, 6, rng));
  };
  auto exact = build(0.0);
  auto rounded = build(0.0F);
  const Matrix<double> x = test::random_matrix(20, 4, 24);
  const Matrix<float> x_rounded = x.cast<float>();
  decltype(exact)::Cache cache;
  decltype(rounded)::Cache other;
  const Matrix<double> y = exact.forward(x, {.training = true}, cache);
  CHECK(test::relative_error(rounded.forward(x_rounded, {.training = true}, other).cast<double>(),
                             y) <= 1e-5);
  CHECK(test::aux_loss(rounded, x_rounded, kTraining) ==
        Approx(test::aux_loss(exact, x, kTraining)).epsilon(1e-5));
  exact.backward(x, cache);
  rounded.backward(x_rounded, other);
  for (std::size_t i = 0; i < parameters(exact).size(); ++i) {
    CHECK(test::relative_error(parameters(rounded)[i].parameter->grad.cast<double>(),
                               parameters(exact)[i].parameter->grad) <= 1e-5);
  }
  decltype(rounded)::State state;
  CHECK(decode(rounded, x_rounded, state, other).allFinite());
}

}  // namespace weir::depths_predictor_test
