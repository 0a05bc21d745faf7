// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include <weir/core/decoding.hpp>
#include <weir/core/layer.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/depths/mixture_of_depths.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/hash_router.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/threads.hpp"

namespace weir::mixture_of_depths_test {

static_assert(Layer<MixtureOfDepths<Glu<float>>>);

namespace {

using Depths = MixtureOfDepths<Glu<double>>;

Glu<double> inner() {
  Rng rng(4);
  return {4, 6, rng};
}

Depths depths(MixtureOfDepthsConfig config) {
  return {inner(), test::random_matrix(1, 4, 7), config};
}

/// The score of a token is its first number.
Depths by_first_number(MixtureOfDepthsConfig config) {
  Matrix<double> weight = Matrix<double>::Zero(1, 4);
  weight(0, 0) = 1.0;
  return {inner(), weight, config};
}

Matrix<double> with_scores(const std::vector<double>& scores) {
  Matrix<double> x = test::random_matrix(static_cast<Index>(scores.size()), 4, 1);
  for (std::size_t t = 0; t < scores.size(); ++t) x(static_cast<Index>(t), 0) = scores[t];
  return x;
}

using Tokens = List<Index>;

}  // namespace

TEST_CASE("MixtureOfDepths adds the weighted layer to the best tokens and leaves the others",
          "[moe][mixture_of_depths]") {
  const Depths layer = by_first_number({.capacity = 0.5});
  const Matrix<double> x = with_scores({0.3, -2.0, 0.9, 0.1, -0.4});
  Depths::Cache cache;
  const Matrix<double>& y = layer.forward(x, kTraining, cache);
  CHECK(cache.choice.part.token == Tokens{0, 2, 3});  // ceil(2.5) of 5, in order.
  Matrix<double> expected = x;
  for (const Index t : cache.choice.part.token)
    expected.row(t) += x(t, 0) * infer(inner(), x.row(t));
  CHECK(test::relative_error(y, expected) < 1e-14);
  CHECK(y.row(1) == x.row(1));
  CHECK(y.row(4) == x.row(4));
  CHECK(infer(layer, x) == y);
}

TEST_CASE("MixtureOfDepths chooses in each sequence, never padding, of equals the first",
          "[moe][mixture_of_depths]") {
  const Depths layer = by_first_number({.capacity = 0.5});
  const Sequences sequences({3, 0, 4, 1});
  const std::vector<std::uint8_t> mask = {1, 0, 1, 1, 1, 1, 1, 0};
  const Matrix<double> x = with_scores({1.0, 9.0, 2.0, 5.0, 5.0, 6.0, 5.0, 1.0});
  Depths::Cache cache;
  layer.forward(x, {.training = true, .sequences = &sequences, .mask = mask}, cache);
  CHECK(cache.choice.part.token == Tokens{2, 3, 5});
  REQUIRE(cache.choice.part.sequences.count() == 4);
  CHECK(cache.choice.part.sequences.length(0) == 1);
  CHECK(cache.choice.part.sequences.length(1) == 0);
  CHECK(cache.choice.part.sequences.length(2) == 2);
  CHECK(cache.choice.part.sequences.length(3) == 0);
  CHECK(cache.y.row(7) == x.row(7));
}

TEST_CASE("MixtureOfDepths with all tokens is x + r f(x)", "[moe][mixture_of_depths]") {
  const Depths layer = depths({.capacity = 1.0});
  for (const Index tokens : {Index(1), Index(2), Index(9)}) {
    const Matrix<double> x = test::random_matrix(tokens, 4, 1);
    Matrix<double> expected = x;
    const Matrix<double> f = infer(inner(), x);
    for (Index t = 0; t < tokens; ++t) {
      expected.row(t) += x.row(t).dot(test::random_matrix(1, 4, 7).row(0)) * f.row(t);
    }
    CHECK(test::relative_error(infer(layer, x), expected) < 1e-14);
  }
}

TEST_CASE("MixtureOfDepths is not causal, but for its evaluation", "[moe][mixture_of_depths]") {
  Matrix<double> x = with_scores({0.5, 0.1, -0.2, 0.3});
  Matrix<double> changed = x;
  changed(3, 0) = 7.0;
  const Depths layer = by_first_number({.capacity = 0.25});
  CHECK(infer(layer, x).row(0) != infer(layer, changed).row(0));

  const Depths causal = by_first_number({.capacity = 0.25, .causal_evaluation = true});
  CHECK(infer(causal, x).topRows(3) == infer(causal, changed).topRows(3));
  Depths::Cache cache;
  causal.forward(x, {}, cache);
  CHECK(cache.choice.part.token == Tokens{0, 1, 3});
  causal.forward(x, {.training = true}, cache);
  CHECK(cache.choice.part.token == Tokens{0});
}

TEST_CASE("Decoding of MixtureOfDepths never trains", "[moe][mixture_of_depths]") {
  Rng rng(1);
  MoELayer jittered(JitterRouter(LinearRouter<double>(4, 3, rng, {.init_scale = 1.0})),
                    SoftmaxTopK<double>({.k = 1}), Dropless(), GluBank<double>(4, 3, 5, rng));
  Matrix<double> weight = Matrix<double>::Zero(1, 4);
  weight(0, 0) = 1.0;
  const MixtureOfDepths layer(std::move(jittered), weight, {.causal_evaluation = true});
  const Matrix<double> x = with_scores({1.0, -1.0, 2.0});
  decltype(layer)::Cache cache;
  decltype(layer)::State state;
  const Matrix<double> quiet = decode(layer, x, state, cache);
  decltype(layer)::State other;
  decltype(layer)::State* const states[] = {&other};
  // Jitter in training would need a generator, which this pass does not have.
  CHECK(layer.decode(x, kTraining, states, cache) == quiet);
}

TEST_CASE("The predictor's loss is the mean cross entropy of the choice",
          "[moe][mixture_of_depths]") {
  const double r = std::log(3.0);  // sigmoid 3/4
  const Depths layer = by_first_number({.capacity = 0.5, .predictor_loss = 0.2});
  Depths::Cache cache;
  CHECK(test::aux_loss(layer, with_scores({r, -r}), {.training = true, .aux_scale = 0.5}) ==
        Approx(0.1 * std::log(4.0 / 3.0)));
  // sigmoids 3/4, 9/10
  CHECK(test::aux_loss(layer, with_scores({r, 2.0 * r}), kTraining) ==
        Approx(0.1 * (std::log(4.0) + std::log(10.0 / 9.0))));
}

TEST_CASE("MixtureOfDepths gradients agree with finite differences",
          "[moe][mixture_of_depths][gradient]") {
  const Sequences sequences({5, 1, 3});
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 0, 1, 1};
  const Matrix<double> x = test::random_matrix(9, 4, 1);
  Depths plain = depths({.capacity = 0.4});
  test::check_gradients(plain, x);
  Depths predicting = depths({.capacity = 0.4, .predictor_loss = 0.7});
  test::check_gradients(
      predicting, x, {.training = true, .sequences = &sequences, .mask = mask, .aux_scale = 0.6});
  Depths causal = depths({.causal_evaluation = true});
  test::check_gradients(causal, x);
}

TEST_CASE("MixtureOfDepths carries the losses of the layer inside",
          "[moe][mixture_of_depths][gradient]") {
  Rng rng(3);
  MixtureOfDepths layer(
      MoELayer(LinearRouter<double>(4, 3, rng, {.init_scale = 5.0}), SoftmaxTopK<double>({.k = 2}),
               Dropless(), GluBank<double>(4, 3, 5, rng, {.init_scale = 1.0}),
               SwitchLoss<double>({.coefficient = 0.3})),
      test::random_matrix(1, 4, 7), {.capacity = 0.5, .predictor_loss = 0.1});
  test::check_gradients(layer, test::random_matrix(8, 4, 1), {.aux_scale = 0.7});
}

TEST_CASE("MixtureOfDepths tells the record of the mixture inside", "[moe][mixture_of_depths]") {
  Rng rng(5);
  const MixtureOfDepths layer(
      MoELayer(LinearRouter<double>(4, 3, rng), SoftmaxTopK<double>({.k = 1}), Dropless(),
               GluBank<double>(4, 3, 6, rng), SwitchLoss<double>()),
      Matrix<double>(Matrix<double>::Identity(1, 4)), {.capacity = 0.5});
  decltype(layer)::Cache cache;
  PassRecord record(PassRecord::Collects::kLossesAndReports);
  layer.forward(with_scores({3.0, 1.0, 2.0, 0.5}), {.training = true, .record = &record}, cache);
  REQUIRE(record.reports().size() == 1);
  CHECK(record.reports()[0].name == "inner");
  CHECK(record.reports()[0].report.assignments == 2);  // The tokens that were chosen.
}

TEST_CASE("MixtureOfDepths tells the layer inside the ids of the chosen tokens",
          "[moe][mixture_of_depths]") {
  Rng rng(5);
  const std::vector<Index> table = {0, 1, 2};
  const MixtureOfDepths layer(
      MoELayer(HashRouter<double>(4, 3, table), SoftmaxTopK<double>({.k = 1}), Dropless(),
               GluBank<double>(4, 3, 6, rng)),
      Matrix<double>(Matrix<double>::Identity(1, 4)), {.capacity = 0.5});
  decltype(layer)::Cache cache;
  const std::vector<Index> ids = {2, 0, 1, 1};
  layer.forward(with_scores({3.0, 1.0, 2.0, 0.5}), {.training = true, .token_ids = ids}, cache);
  CHECK(cache.choice.part.token == Tokens{0, 2});
  CHECK(cache.inner.routing.expert == List<Index>{2, 1});
}

TEST_CASE("MixtureOfDepths takes no tokens, none that is real and padding of any kind",
          "[moe][mixture_of_depths]") {
  Depths layer = depths({.capacity = 0.5, .predictor_loss = 0.1});
  Depths::Cache cache;
  CHECK(layer.forward(Matrix<double>(0, 4), kTraining, cache).cols() == 4);
  CHECK(layer.backward(Matrix<double>(0, 4), cache).cols() == 4);

  const std::vector<std::uint8_t> none = {0, 0};
  Matrix<double> x = test::random_matrix(2, 4, 1);
  CHECK(layer.forward(x, {.training = true, .mask = none}, cache) == x);
  CHECK(test::aux_loss(layer, x, {.training = true, .mask = none}) == 0.0);
  CHECK(layer.backward(x, cache) == x);

  const std::vector<std::uint8_t> mask = {1, 0};
  x.row(1).setConstant(std::numeric_limits<double>::quiet_NaN());
  CHECK(layer.forward(x, {.training = true, .mask = mask}, cache).row(0).allFinite());
  CHECK(layer.backward(x, cache).row(0).allFinite());
  for (const auto& [name, parameter] : parameters(layer)) CHECK(parameter->grad.allFinite());
}

TEST_CASE("MixtureOfDepths gives the same bits for any number of threads and allocates nothing",
          "[moe][mixture_of_depths]") {
  Rng rng(5);
  MixtureOfDepths layer(Linear<double>(16, 16, rng), 16, rng, {.predictor_loss = 0.1});
  REQUIRE(parameters(layer).size() == 2);
  CHECK(parameters(layer)[0].name == "router");
  CHECK(parameters(layer)[1].name == "inner.weight");
  const Matrix<double> x = test::random_matrix(2000, 16, 1);
  decltype(layer)::Cache cache;
  const auto step = [&] {
    layer.forward(x, kTraining, cache);
    layer.backward(x, cache);
  };
  step();
  step();
  CHECK(test::count_allocations(step) == 0);
  zero_gradients(layer);
  step();
  const Matrix<double> y = cache.y;
  const Matrix<double> dx = cache.dx;
  const Matrix<double> d_router = parameters(layer)[0].parameter->grad;
  zero_gradients(layer);
  const test::Threads threads(3);
  step();
  CHECK(cache.y == y);
  CHECK(cache.dx == dx);
  CHECK(parameters(layer)[0].parameter->grad == d_router);
}

TEST_CASE("MixtureOfDepths says what is wrong with its arguments", "[moe][mixture_of_depths]") {
  Rng rng(1);
  CHECK(test::message_of<ConfigError>([&] { depths({.capacity = 0.0}); }) ==
        "MixtureOfDepths: capacity = 0, expected 0 < capacity <= 1");
  CHECK(test::message_of<ConfigError>([&] { depths({.predictor_loss = -1.0}); }) ==
        "MixtureOfDepths: predictor_loss = -1, expected a finite number >= 0");
  CHECK(test::message_of<ConfigError>([&] { Depths(inner(), 0, rng); }) ==
        "MixtureOfDepths: d_model = 0, expected >= 1");
  CHECK(test::message_of<ShapeError>([&] { Depths(inner(), test::random_matrix(2, 4, 1)); }) ==
        "MixtureOfDepths: weight is [2, 4], expected [1, 4]");

  Depths layer = depths({.capacity = 0.5});
  Depths::Cache cache;
  Matrix<double> x = test::random_matrix(4, 4, 1);
  CHECK(test::message_of<StateError>([&] { layer.backward(x, cache); }) ==
        "MixtureOfDepths::backward: the cache is empty, expected a forward pass that succeeded");
  layer.forward(x, kTraining, cache);
  CHECK(test::message_of<ShapeError>([&] { layer.backward(x.topRows(2), cache); }) ==
        "MixtureOfDepths::backward: dy is [2, 4], expected [4, 4]");
  const MixtureOfDepths narrow(Linear<double>(4, 3, rng), 4, rng);
  CHECK(test::message_of<ShapeError>([&] { infer(narrow, x); }) ==
        "MixtureOfDepths::forward: the inner layer's output is [1, 3], expected [1, 4]");
  x(2, 1) = std::numeric_limits<double>::quiet_NaN();
  CHECK(test::message_of<NonFiniteError>([&] { layer.forward(x, kTraining, cache); }) ==
        "MixtureOfDepths::forward: the score of token 2 is nan, expected a finite number");
}

}  // namespace weir::mixture_of_depths_test
