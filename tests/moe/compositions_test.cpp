// SPDX-License-Identifier: MIT
// Compositions as compositions: every kind of stage together with every other. What travels between
// them (noise, losses, the pass, updates, saved state) must not get lost on the way.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <weir/moe/moe_layer.hpp>
#include <weir/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/same_draws.hpp"
#include "support/stages.hpp"

namespace weir::compositions_test {

namespace {

using test::kModel;
using test::kTokens;
using Moe = test::AnyMoe<double>;
using Combination = test::Combination<double>;

Matrix<double> input(std::uint64_t seed) {
  return test::random_matrix(kTokens, kModel, seed);
}

const Sequences kSequences({4, 2});
const std::vector<std::uint8_t> kMask = {1, 1, 0, 1, 1, 1};

/// One step of training; returns the objective.
double train(Moe& moe, AdamW<double>& optimizer, std::uint64_t step) {
  Rng rng(50 + step);
  PassRecord record;
  Moe::Cache cache;
  const Matrix<double> target = input(200 + step);
  const Matrix<double>& y = moe.forward(
      input(100 + step),
      {.training = true, .sequences = &kSequences, .mask = kMask, .rng = &rng, .record = &record},
      cache);
  const Matrix<double> error = y - target;
  moe.backward(error, cache);
  double reported = 0.0;
  for (const auto& [name, loss] : moe.report(cache).losses) reported += loss;
  CHECK(reported == Approx(record.aux_loss()));
  optimizer.step(moe);
  return 0.5 * error.squaredNorm() + record.aux_loss();
}

/// Copies parameters and buffers by name, as loading a checkpoint does.
void copy_state(Moe& from, Moe& to) {
  const auto values = parameters(from);
  const auto places = parameters(to);
  REQUIRE(values.size() == places.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    REQUIRE(values[i].name == places[i].name);
    places[i].parameter->value = values[i].parameter->value;
    places[i].parameter->grad = values[i].parameter->grad;
  }
  const auto states = buffers(from);
  const auto state_places = buffers(to);
  REQUIRE(states.size() == state_places.size());
  for (std::size_t i = 0; i < states.size(); ++i) {
    REQUIRE(states[i].name == state_places[i].name);
    state_places[i].buffer->value = states[i].buffer->value;
  }
}

/// The gradient that is farthest from finite differences, relative to its size.
struct Mismatch {
  std::string name;
  double error = 0.0;
};

constexpr double kTolerance = 5e-5;

/// Checks the gradients of sum(y * weight) + auxiliary losses, for the input and each parameter. A
/// gradient below 1e-3 is compared as if it were 1e-3.
Mismatch worst_mismatch(test::SameDraws<Moe>& moe, Matrix<double> x) {
  PassRecord record;
  const Pass pass{.training = true,
                  .sequences = &kSequences,
                  .mask = kMask,
                  .aux_scale = 0.7,
                  .record = &record};
  const Matrix<double> weight = test::random_matrix(kTokens, kModel, 12345);
  Moe::Cache space;
  const auto objective = [&] {
    record.clear();
    return moe.forward(x, pass, space).cwiseProduct(weight).sum() + record.aux_loss();
  };
  Mismatch worst;
  const auto compare = [&](const std::string& name, const Matrix<double>& analytic,
                           Matrix<double>& at) {
    const Matrix<double> numeric = test::numeric_gradient(at, objective);
    const double error = (analytic - numeric).norm() / std::max(numeric.norm(), 1e-3);
    if (!(error <= worst.error)) worst = {name, error};
  };
  zero_gradients(moe);
  Moe::Cache cache;
  moe.forward(x, pass, cache);
  compare("the input", moe.backward(weight, cache), x);
  for (auto& [name, parameter] : parameters(moe)) {
    compare(name, parameter->gradient(), parameter->value);
  }
  return worst;
}

}  // namespace

TEST_CASE("Compositions have the gradients of what they report", "[moe][compositions][gradient]") {
  const auto all = test::combinations<double>();
  REQUIRE(all.size() >= 200);
  for (const Combination& combination : all) {
    INFO(combination.name);
    test::SameDraws<Moe> moe{combination.make()};
    // Where a finite difference changes a choice, another input is tried.
    Mismatch best = worst_mismatch(moe, input(1));
    for (std::uint64_t seed = 2; seed < 8 && best.error > kTolerance; ++seed) {
      const Mismatch other = worst_mismatch(moe, input(seed));
      if (other.error < best.error) best = other;
    }
    INFO("gradient of " << best.name);
    CHECK(best.error <= kTolerance);
  }
}

TEST_CASE("Compositions resume from their parameters and buffers", "[moe][compositions]") {
  for (const Combination& combination : test::combinations<double>()) {
    INFO(combination.name);
    Moe moe = combination.make();
    AdamW<double> optimizer({.learning_rate = 0.05});
    for (std::uint64_t step = 0; step < 2; ++step) train(moe, optimizer, step);

    Moe resumed = combination.make();
    copy_state(moe, resumed);
    AdamW<double> resumed_optimizer({.learning_rate = 0.05});
    for (const auto& [name, moments] : optimizer.moments()) {
      resumed_optimizer.moments(name) = *moments;
    }
    resumed_optimizer.set_steps(optimizer.steps());
    for (std::uint64_t step = 2; step < 4; ++step) {
      CHECK(train(moe, optimizer, step) == train(resumed, resumed_optimizer, step));
    }
    const auto expected = parameters(moe);
    const auto actual = parameters(resumed);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      INFO(expected[i].name);
      CHECK(actual[i].parameter->value == expected[i].parameter->value);
    }
  }
}

}  // namespace weir::compositions_test
