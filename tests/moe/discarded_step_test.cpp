// SPDX-License-Identifier: MIT
// A step that is given up leaves no trace: the next ones are those of a training that never saw it.
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/verbs.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/global_batch_loss.hpp>
#include <weir/moe/balance/quantile_balance.hpp>
#include <weir/moe/balance/relu_l1_loss.hpp>
#include <weir/moe/capacity/adaptive_capacity.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/relu_routing.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/optim/clip.hpp>
#include <weir/optim/muon.hpp>
#include <weir/optim/sgd.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::discarded_step_test {

namespace {

constexpr Index kExperts = 4;

template <class S, class C, class... L>
auto layer_of(const S& selector, const C& capacity, const L&... balancers) {
  Rng rng(3);
  const GluBank<double> bank(4, kExperts, 3, rng);
  return MoELayer(LinearRouter<double>(test::random_matrix(kExperts, 4, 1)), selector, capacity,
                  bank, balancers...);
}

template <class M>
void backward_of_batch(M& layer, std::uint64_t seed, double dy_scale = 1.0) {
  typename M::Cache cache;
  layer.forward(test::random_matrix(10, 4, seed), kTraining, cache);
  layer.backward(dy_scale * test::random_matrix(10, 4, seed + 100), cache);
}

/// All numbers that training moves.
template <class M>
std::vector<Matrix<double>> state_of(M& layer) {
  std::vector<Matrix<double>> state;
  for (const auto& [name, parameter] : parameters(layer)) state.push_back(parameter->value);
  for (const auto& [name, buffer] : buffers(layer)) state.push_back(buffer->value);
  return state;
}

/// Trains three steps of two micro-batches. Before each one another batch is given up, in the way
/// that `give_up(layer)` has, which says whether it did anything.
template <class M, class GiveUp>
std::vector<Matrix<double>> train(M layer, GiveUp&& give_up) {
  AdamW<double> optimizer({.learning_rate = 0.05});
  for (std::uint64_t step = 0; step < 3; ++step) {
    give_up(layer, step);
    backward_of_batch(layer, 10 * step);
    backward_of_batch(layer, 10 * step + 1);
    clip_global_norm(layer, 1.0);
    optimizer.step(layer);
  }
  return state_of(layer);
}

/// \param counts   Whether the batch would change the bits of the others' steps if it counted.
template <class M>
void check_discards(const M& layer, bool counts = true) {
  const auto expected = train(layer, [](M&, std::uint64_t) {});
  CHECK(train(layer, [](M& trained, std::uint64_t step) {
          backward_of_batch(trained, 10 * step + 5);
          discard(trained);
        }) == expected);
  // A non-finite gradient: clip_global_norm gives the step up by itself.
  CHECK(train(layer, [](M& trained, std::uint64_t step) {
          backward_of_batch(trained, 10 * step + 5);
          backward_of_batch(trained, 10 * step + 6, std::numeric_limits<double>::quiet_NaN());
          CHECK_THROWS_AS(clip_global_norm(trained, 1.0), NonFiniteError);
        }) == expected);
  // That the batch would have counted otherwise.
  CHECK((train(layer,
               [](M& trained, std::uint64_t step) {
                 backward_of_batch(trained, 10 * step + 5);
                 zero_gradients(trained);
               }) != expected ||
         !counts));
}

}  // namespace

TEST_CASE("A step that is given up counts in no balancing rule", "[moe][balance][discard]") {
  check_discards(layer_of(SigmoidTopK<double>(kExperts), Dropless(),
                          BiasBalance<double>({.rate = 0.1, .rule = BiasRule::kProportional})));
  check_discards(layer_of(BiasedSoftmaxTopK<double>(kExperts), Dropless(),
                          QuantileBalance<double>({.momentum = 0.5})));
  check_discards(layer_of(BiasedSoftmaxTopK<double>(kExperts), Dropless(),
                          GlobalBatchLoss<double>({.coefficient = 0.5})));
  check_discards(layer_of(ReluRouting<double>(), Dropless(),
                          ReluL1Loss<double>({.k = 2, .initial = 0.1, .multiplier = 1.5})),
                 false);
}

TEST_CASE("ReluL1Loss forgets a step that is given up", "[moe][balance][discard]") {
  ReluL1Loss<double> loss({.k = 1, .initial = 1.0, .multiplier = 2.0});
  ReluRouting<double> selector;
  Routing<double> routing;
  ReluRouting<double>::Cache cache;
  selector.forward(Matrix<double>::Ones(4, 3), kTraining, routing, cache);
  loss.observe(routing);  // 12 assignments of 4 tokens.
  loss.discard_self();
  selector.forward(-Matrix<double>::Ones(4, 3), kTraining, routing, cache);
  loss.observe(routing);  // None of 4.
  loss.update(selector);
  CHECK(loss.coefficient() == 0.5);  // Not 2: eight are not counted against twelve.
}

TEST_CASE("A step that is given up counts in no capacity", "[moe][capacity][discard]") {
  const AdaptiveCapacity<double> capacity({.least = 0.1, .rate = 0.5, .minimum = 1});
  check_discards(layer_of(SigmoidTopK<double>(kExperts), capacity));
  check_discards(layer_of(SigmoidTopK<double>(kExperts), RenormaliseKept(capacity)));
}

namespace {

/// A layer with an expert, the last one, that only `batch_for_all` reaches.
auto layer_with_idle_expert() {
  auto layer = layer_of(SigmoidTopK<double>(kExperts, {.k = 1}), Dropless());
  layer.selector().selection_bias().value << 0.0, 0.0, 0.0, -10.0;
  return layer;
}

template <class M>
void batch_for_all(M& layer, std::uint64_t seed) {
  const Matrix<double> bias = layer.selector().selection_bias().value;
  layer.selector().selection_bias().value << 0.0, 0.0, 0.0, 10.0;
  backward_of_batch(layer, seed);
  layer.selector().selection_bias().value = bias;
}

/// Two steps, a batch for all that is given up or not there, two more steps.
template <class M, class Optimizer>
std::vector<Matrix<double>> train_around(M& layer, Optimizer& optimizer, bool given_up) {
  for (std::uint64_t step = 0; step < 4; ++step) {
    if (step == 2 && given_up) {
      batch_for_all(layer, 50);
      discard(layer);
    }
    backward_of_batch(layer, step);
    optimizer.step(layer);
  }
  return state_of(layer);
}

template <class Optimizer>
void check_idle_expert(const Optimizer& fresh) {
  auto layer = layer_with_idle_expert();
  auto other = layer;
  const std::vector<Matrix<double>> begin = state_of(layer);
  Optimizer optimizer = fresh;
  Optimizer same = fresh;
  const std::vector<Matrix<double>> expected = train_around(layer, optimizer, false);
  CHECK(train_around(other, same, true) == expected);
  CHECK(optimizer.steps() == same.steps());
  const auto states = optimizer.saved_states();
  const auto same_states = same.saved_states();
  REQUIRE(states.size() == same_states.size());
  for (std::size_t i = 0; i < states.size(); ++i) {
    INFO(states[i].parameter);
    CHECK(states[i].parameter == same_states[i].parameter);
    CHECK(states[i].parameter.find("experts.3") == std::string::npos);
    for (std::size_t m = 0; m < states[i].matrices.size(); ++m) {
      CHECK(*states[i].matrices[m].second == *same_states[i].matrices[m].second);
    }
    if (states[i].steps != nullptr) CHECK(*states[i].steps == *same_states[i].steps);
  }
  // The idle expert has not even decayed; the others have been trained.
  const auto all = parameters(layer);
  for (std::size_t i = 0; i < all.size(); ++i) {
    INFO(all[i].name);
    const bool idle = all[i].name.find("experts.3") != std::string::npos;
    CHECK(idle == (all[i].parameter->value == begin[i]));
    CHECK(idle == (all[i].parameter->grad.size() == 0));
  }

  // Once a step with a batch for all was taken, a step that is given up leaves zeros, which decay.
  batch_for_all(layer, 60);
  optimizer.step(layer);
  const Matrix<double> trained = parameters(layer).back().parameter->value;
  batch_for_all(layer, 61);
  discard(layer);
  backward_of_batch(layer, 62);
  optimizer.step(layer);
  CHECK(parameters(layer).back().parameter->value != trained);
}

}  // namespace

TEST_CASE("A step that is given up leaves an expert that it reached first as it was",
          "[moe][optim][discard]") {
  check_idle_expert(AdamW<double>({.learning_rate = 0.05, .weight_decay = 0.1}));
  check_idle_expert(Sgd<double>({.learning_rate = 0.05, .momentum = 0.9, .weight_decay = 0.1}));
  check_idle_expert(Muon<double>({.learning_rate = 0.05, .weight_decay = 0.1}));
}

}  // namespace weir::discarded_step_test
