// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <weir/optim/muon.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/parameter_set.hpp"
#include "support/threads.hpp"

namespace weir::muon_test {

namespace {

Matrix<double> two_by_three(std::initializer_list<double> numbers) {
  Matrix<double> m(2, 3);
  std::copy(numbers.begin(), numbers.end(), m.data());
  return m;
}

// Counts how often it may act.
struct Counter {
  using Scalar = float;
  void update_self() { ++count; }
  template <class Self, class Visit>
  static void visit(Self& /*self*/, Visit& /*visit*/) {}
  int count = 0;
};

}  // namespace

TEST_CASE("Muon takes two steps computed elsewhere", "[optim][muon][golden]") {
  // Plain double arithmetic, without matrix library: momentum 0.95, five iterations, rate 0.02,
  // decay 0.1, scale 0.2 sqrt(3).
  const auto nesterov = GENERATE(true, false);
  Parameter<double> w{two_by_three({0.1, -0.2, 0.3, 0.4, 0.5, -0.6})};
  test::ParameterSet<double> model{{"w", &w}};
  Muon<double> optimizer({.learning_rate = 0.02, .nesterov = nesterov});
  w.gradient() = two_by_three({1.0, 2.0, -1.0, 0.5, -1.5, 3.0});
  optimizer.step(model);
  CHECK(w.grad == Matrix<double>::Zero(2, 3));
  w.gradient() = two_by_three({-0.5, 1.0, 0.25, 2.0, 0.0, -1.0});
  optimizer.step(model);
  const Matrix<double> expected =
      nesterov ? two_by_three({0.09562419658425492, -0.20984513740587543, 0.29873615250479313,
                               0.38917809140543513, 0.5006949203099501, -0.6038939941513025})
               : two_by_three({0.09428527182761182, -0.20987179598984473, 0.29938021603906556,
                               0.39109114636272524, 0.5010176488448874, -0.6062344223527673});
  CHECK(test::relative_error(w.value, expected) < 1e-14);
  CHECK(optimizer.steps() == 2);
}

TEST_CASE("Muon's updates do not depend on the scale of the gradients", "[optim][muon]") {
  const auto trained = [](float scale) {
    Parameter<float> w{Matrix<float>::Zero(6, 9)};
    test::ParameterSet<float> model{{"w", &w}};
    Muon<float> optimizer({.weight_decay = 0.0});
    for (std::uint64_t step = 0; step < 3; ++step) {
      w.gradient() = scale * test::random_matrix<float>(6, 9, step);
      optimizer.step(model);
    }
    return w.value;
  };
  CHECK(test::relative_error(trained(1e-12F), trained(1.0F)) < 1e-4);
  CHECK(test::relative_error(trained(1e12F), trained(1.0F)) < 1e-4);
}

TEST_CASE("Muon's updates have the root mean square of AdamW's, whatever the shape",
          "[optim][muon]") {
  const auto [rows, cols] =
      GENERATE(values<std::pair<Index, Index>>({{16, 16}, {8, 64}, {64, 8}, {30, 50}}));
  Parameter<double> w{Matrix<double>::Zero(rows, cols)};
  w.gradient() = test::random_matrix(rows, cols, 1);
  test::ParameterSet<double> model{{"w", &w}};
  Muon<double> optimizer({.learning_rate = 1.0});
  optimizer.step(model);
  const double mean_square = w.value.squaredNorm() / static_cast<double>(rows * cols);
  CHECK(std::sqrt(mean_square) > 0.2 * 0.65);
  CHECK(std::sqrt(mean_square) < 0.2 * 1.25);
}

TEST_CASE("Muon leaves vectors, embeddings and heads to AdamW", "[optim][muon]") {
  const std::vector<std::string> names = {"embedding.weight", "layers.0.norm.weight",
                                          "layers.0.attention.query", "head.weight"};
  std::vector<Parameter<double>> weights;
  std::vector<NamedParameter<double>> named;
  for (std::size_t i = 0; i < names.size(); ++i) {
    weights.push_back({test::random_matrix(i == 1 ? 1 : 4, 5, i)});
  }
  for (std::size_t i = 0; i < names.size(); ++i) named.push_back({names[i], &weights[i]});
  std::vector<Parameter<double>> others = {weights[0], weights[1], weights[3]};
  test::ParameterSet<double> model(named);
  test::ParameterSet<double> rest{
      {names[0], &others[0]}, {names[1], &others[1]}, {names[3], &others[2]}};
  Muon<double> muon({.learning_rate = 0.01});
  AdamW<double> adamw({.learning_rate = 0.01});
  for (std::uint64_t step = 0; step < 3; ++step) {
    for (Parameter<double>& w : weights) {
      w.gradient() = test::random_matrix(w.value.rows(), 5, 10 + step);
    }
    for (Parameter<double>& w : others) {
      w.gradient() = test::random_matrix(w.value.rows(), 5, 10 + step);
    }
    muon.step(model);
    adamw.step(rest);
  }
  CHECK(weights[0].value == others[0].value);
  CHECK(weights[1].value == others[1].value);
  CHECK(weights[3].value == others[2].value);
  REQUIRE(muon.momenta().size() == 1);
  CHECK(muon.momenta()[0].name == "layers.0.attention.query");
  CHECK(muon.adamw().moments().size() == 3);
}

TEST_CASE("Muon follows its groups and the rate of the moment", "[optim][muon]") {
  Parameter<double> a{Matrix<double>::Identity(3, 3)};
  Parameter<double> b = a;
  Parameter<double> c{Matrix<double>::Ones(1, 3)};
  test::ParameterSet<double> model{{"a", &a}, {"b", &b}, {"c", &c}};
  Muon<double> optimizer({.weight_decay = 0.5,
                          .groups = {{.pattern = "b", .weight_decay = 0.0},
                                     {.pattern = "c", .learning_rate_factor = 0.0}}});
  optimizer.set_learning_rate(0.25);
  for (Parameter<double>* p : {&a, &b, &c}) p->gradient().setZero();
  optimizer.step(model);  // Zero gradients: decay alone.
  CHECK(test::relative_error(a.value, Matrix<double>(0.875 * Matrix<double>::Identity(3, 3))) <
        1e-15);
  CHECK(b.value == Matrix<double>::Identity(3, 3));
  CHECK(c.value == Matrix<double>::Ones(1, 3));
  CHECK(optimizer.adamw().learning_rate() == 0.25);
}

TEST_CASE("Muon leaves frozen and unused parameters alone", "[optim][muon]") {
  Parameter<float> frozen{test::random_matrix<float>(3, 4, 1)};
  Parameter<float> unused{test::random_matrix<float>(3, 4, 2)};
  frozen.frozen = true;
  frozen.gradient().setOnes();
  const Matrix<float> before[] = {frozen.value, unused.value};
  test::ParameterSet<float> model{{"frozen", &frozen}, {"unused", &unused}};
  Muon<float> optimizer;
  optimizer.step(model);
  CHECK(frozen.value == before[0]);
  CHECK(unused.value == before[1]);
  CHECK(frozen.grad == Matrix<float>::Zero(3, 4));
  CHECK(optimizer.momenta().empty());
}

TEST_CASE("Muon continues from saved momenta bit for bit", "[optim][muon]") {
  const auto train = [](Muon<float>& optimizer, Parameter<float>& w, std::uint64_t seed) {
    test::ParameterSet<float> model{{"w", &w}};
    w.gradient() = test::random_matrix<float>(9, 7, seed);
    optimizer.step(model);
  };
  Parameter<float> w{test::random_matrix<float>(9, 7, 5)};
  Muon<float> optimizer;
  for (std::uint64_t seed = 0; seed < 3; ++seed) train(optimizer, w, seed);
  Parameter<float> copy = w;
  Muon<float> resumed;
  resumed.momentum("w") = optimizer.momentum("w");
  resumed.set_steps(optimizer.steps());
  for (std::uint64_t seed = 3; seed < 6; ++seed) {
    train(optimizer, w, seed);
    train(resumed, copy, seed);
  }
  CHECK(w.value == copy.value);
  CHECK(resumed.steps() == 6);
  resumed.forget("*");
  CHECK(resumed.momenta().empty());
}

TEST_CASE(
    "Muon allocates nothing after its first step and has the same bits on any number of "
    "threads",
    "[optim][muon]") {
  Parameter<float> a{test::random_matrix<float>(40, 30, 1)};
  Parameter<float> b{test::random_matrix<float>(12, 60, 2)};
  Parameter<float> c{test::random_matrix<float>(1, 30, 3)};
  const auto train = [&](int threads) {
    Parameter<float> own[] = {a, b, c};
    test::ParameterSet<float> model{
        {"layers.0.moe.experts.3.gate", &own[0]}, {"b", &own[1]}, {"c", &own[2]}};
    Muon<float> optimizer;
    const test::Threads several(threads);
    long allocations = 0;
    for (std::uint64_t step = 0; step < 3; ++step) {
      for (Parameter<float>& w : own) {
        w.gradient();
        w.grad = test::random_matrix<float>(w.value.rows(), w.value.cols(), step);
      }
      allocations = test::count_allocations([&] { optimizer.step(model); });
    }
    if (threads == 1) CHECK(allocations == 0);
    return std::vector<Matrix<float>>{own[0].value, own[1].value, own[2].value};
  };
  CHECK(train(1) == train(2));
}

TEST_CASE("Muon descends a quadratic to its minimum", "[optim][muon]") {
  const Matrix<float> target = test::random_matrix<float>(5, 7, 3);
  Parameter<float> w{Matrix<float>::Zero(5, 7)};
  test::ParameterSet<float> model{{"w", &w}};
  Muon<float> optimizer({.weight_decay = 0.0});
  for (int step = 0; step < 600; ++step) {
    w.gradient() = w.value - target;
    optimizer.set_learning_rate(0.2 * std::exp(-0.015 * step));
    optimizer.step(model);
  }
  CHECK(test::relative_error(w.value, target) <= 1e-2);
}

TEST_CASE("Muon lets the nodes of the model act after each step", "[optim][muon]") {
  Counter counter;
  Muon<float> optimizer;
  optimizer.step(counter);
  optimizer.step(counter);
  CHECK(counter.count == 2);
}

TEST_CASE("Muon refuses impossible settings and shapes that changed", "[optim][muon]") {
  const auto message = [](const MuonConfig& config) {
    return test::message_of<ConfigError>([&] { Muon<float> optimizer(config); });
  };
  CHECK(message({.momentum = 1.0}) == "Muon: momentum = 1, expected 0 <= momentum < 1");
  CHECK(message({.weight_decay = -1.0}) ==
        "Muon: weight_decay = -1, expected a finite number >= 0");
  CHECK(message({.iterations = 0}) == "Muon: iterations = 0, expected >= 1");
  CHECK(message({.update_scale = 0.0}) == "Muon: update_scale = 0, expected a finite number > 0");
  CHECK(message({.groups = {{.pattern = "*", .learning_rate_factor = -1.0}}}) ==
        "Muon: learning_rate_factor = -1, expected a finite number >= 0");
  CHECK(message({.adamw_epsilon = 0.0}) == "Muon: adamw_epsilon = 0, expected a finite number > 0");
  CHECK(message({.learning_rate = -1.0}) ==
        "Muon: learning_rate = -1, expected a finite number >= 0");
  CHECK(message({.adamw_beta1 = 1.0}) == "Muon: adamw_beta1 = 1, expected 0 <= adamw_beta1 < 1");
  CHECK(message({.adamw_beta2 = -0.5}) ==
        "Muon: adamw_beta2 = -0.5, expected 0 <= adamw_beta2 < 1");
  Muon<float> set;
  CHECK(test::message_of<ConfigError>([&] { set.set_learning_rate(-0.5); }) ==
        "Muon::set_learning_rate: learning_rate = -0.5, expected a finite number >= 0");
  CHECK(test::message_of<ConfigError>([&] { set.set_steps(-1); }) ==
        "Muon::set_steps: steps = -1, expected >= 0");
  Parameter<float> w{Matrix<float>::Ones(2, 3), Matrix<float>::Ones(2, 2)};
  Parameter<float> v{Matrix<float>::Ones(1, 3), Matrix<float>::Ones(1, 3)};
  test::ParameterSet<float> model{{"v", &v}, {"w", &w}};
  Muon<float> optimizer;
  CHECK(test::message_of<ShapeError>([&] { optimizer.step(model); }) ==
        "Muon::step: gradient of w is [2, 2], expected [2, 3]");
  CHECK(v.value == Matrix<float>::Ones(1, 3));
  CHECK(v.grad == Matrix<float>::Ones(1, 3));
  w.grad.setZero(2, 3);
  Muon<float> moving;
  moving.step(model);
  moving.momenta().back().momentum->setZero(3, 2);
  CHECK(test::message_of<ShapeError>([&] { moving.step(model); }) ==
        "Muon::step: momentum of w is [3, 2], expected [2, 3]");
}

}  // namespace weir::muon_test
