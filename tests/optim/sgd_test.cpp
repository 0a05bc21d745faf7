// SPDX-License-Identifier: MIT
#include <algorithm>
#include <string>
#include <vector>

#include <weir/optim/sgd.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/parameter_set.hpp"
#include "support/threads.hpp"

namespace weir::sgd_test {

namespace {

Matrix<double> pair(double a, double b) {
  Matrix<double> m(2, 1);
  m << a, b;
  return m;
}

struct Case {
  SgdConfig config;
  double a, b;  ///< After three steps.
};

// Counts how often it may act.
struct Counter {
  using Scalar = float;
  void update_self() { ++count; }
  template <class Self, class Visit>
  static void visit(Self& /*self*/, Visit& /*visit*/) {}
  int count = 0;
};

}  // namespace

TEST_CASE("Sgd takes three steps computed elsewhere", "[optim][sgd][golden]") {
  // PyTorch's documented algorithm, and SGDW's decay, one number at a time.
  const std::vector<Case> cases = {
      {{.learning_rate = 0.1}, 0.85, -2.075},
      {{.learning_rate = 0.1, .momentum = 0.9}, 0.8545, -2.2685},
      {{.learning_rate = 0.1, .momentum = 0.9, .nesterov = true, .weight_decay = 0.1},
       0.641448646,
       -2.147305972},
      {{.learning_rate = 0.1, .momentum = 0.9, .dampening = 0.5, .weight_decay = 0.1},
       0.8188135,
       -2.1850195},
      {{.learning_rate = 0.1,
        .momentum = 0.9,
        .nesterov = true,
        .weight_decay = 0.1,
        .decoupled = true},
       0.6897445,
       -2.252182},
      {{.learning_rate = 0.1, .weight_decay = 0.1, .decoupled = true}, 0.820294, -2.013358}};
  for (std::size_t i = 0; i < cases.size(); ++i) {
    INFO(i);
    Parameter<double> w{pair(1.0, -2.0)};
    test::ParameterSet<double> model{{"w", &w}};
    Sgd<double> optimizer(cases[i].config);
    for (const auto& g : {pair(0.5, 1.0), pair(-1.0, 0.25), pair(2.0, -0.5)}) {
      w.gradient() = g;
      optimizer.step(model);
      CHECK(w.grad == pair(0.0, 0.0));
    }
    CHECK(test::relative_error(w.value, pair(cases[i].a, cases[i].b)) < 1e-14);
    CHECK(optimizer.velocities().size() == (cases[i].config.momentum > 0.0 ? 1 : 0));
  }
}

TEST_CASE("Sgd follows its groups and spares vectors if told so", "[optim][sgd]") {
  Parameter<double> a{pair(1.0, 1.0)};
  Parameter<double> b = a;
  Parameter<double> v{Matrix<double>::Ones(1, 2)};
  test::ParameterSet<double> model{{"a", &a}, {"b", &b}, {"v", &v}};
  Sgd<double> optimizer(
      {.weight_decay = 0.5, .decay_vectors = false, .groups = {{"b", 2.0, 0.25}}});
  optimizer.set_learning_rate(0.5);
  for (Parameter<double>* p : {&a, &b, &v}) p->gradient().setOnes();
  optimizer.step(model);
  CHECK(a.value == pair(0.25, 0.25));    // 1 - 0.5 (1 + 0.5)
  CHECK(b.value == pair(-0.25, -0.25));  // 1 - 1 (1 + 0.25)
  CHECK(v.value == Matrix<double>::Constant(1, 2, 0.5));
}

TEST_CASE("Sgd leaves frozen and unused parameters alone", "[optim][sgd]") {
  Parameter<float> frozen{test::random_matrix<float>(3, 4, 1)};
  Parameter<float> unused{test::random_matrix<float>(3, 4, 2)};
  frozen.frozen = true;
  frozen.gradient().setOnes();
  const Matrix<float> before[] = {frozen.value, unused.value};
  test::ParameterSet<float> model{{"frozen", &frozen}, {"unused", &unused}};
  Sgd<float> optimizer({.momentum = 0.9, .weight_decay = 0.1});
  optimizer.step(model);
  CHECK(frozen.value == before[0]);
  CHECK(unused.value == before[1]);
  CHECK(frozen.grad == Matrix<float>::Zero(3, 4));
  CHECK(optimizer.velocities().empty());
}

TEST_CASE("Sgd continues from saved velocities bit for bit", "[optim][sgd]") {
  const SgdConfig config = {.momentum = 0.9, .dampening = 0.25};
  const auto train = [](Sgd<float>& optimizer, Parameter<float>& w, std::uint64_t seed) {
    test::ParameterSet<float> model{{"w", &w}};
    w.gradient() = test::random_matrix<float>(9, 7, seed);
    optimizer.step(model);
  };
  Parameter<float> w{test::random_matrix<float>(9, 7, 5)};
  Sgd<float> optimizer(config);
  for (std::uint64_t seed = 0; seed < 3; ++seed) train(optimizer, w, seed);
  Parameter<float> copy = w;
  Sgd<float> resumed(config);
  resumed.velocity("w") = optimizer.velocity("w");
  resumed.set_steps(optimizer.steps());
  for (std::uint64_t seed = 3; seed < 6; ++seed) {
    train(optimizer, w, seed);
    train(resumed, copy, seed);
  }
  CHECK(w.value == copy.value);
  CHECK(resumed.steps() == 6);
}

TEST_CASE(
    "Sgd allocates nothing after its first step and has the same bits on any number of "
    "threads",
    "[optim][sgd]") {
  const auto train = [](int threads) {
    Parameter<float> w{test::random_matrix<float>(130, 140, 1)};
    test::ParameterSet<float> model{{"w", &w}};
    Sgd<float> optimizer({.momentum = 0.9, .nesterov = true});
    const test::Threads several(threads);
    for (std::uint64_t step = 0; step < 3; ++step) {
      w.gradient() = test::random_matrix<float>(130, 140, step);
      const long allocations = test::count_allocations([&] { optimizer.step(model); });
      if (step > 0) CHECK(allocations == 0);
    }
    return w.value;
  };
  CHECK(train(1) == train(2));
}

TEST_CASE("Sgd that runs out of memory changes nothing", "[optim][sgd][memory]") {
  if (!test::allocations_are_counted()) return;
  const auto train = [](bool starve) {
    Parameter<float> a{test::random_matrix<float>(30, 40, 1), Matrix<float>::Ones(30, 40)};
    Parameter<float> b{test::random_matrix<float>(20, 40, 2), Matrix<float>::Ones(20, 40)};
    test::ParameterSet<float> model{{"a", &a}, {"b", &b}};
    Sgd<float> optimizer({.momentum = 0.9, .dampening = 0.5});
    long failures = 0;
    if (starve) {
      while (test::runs_out_of_memory(failures + 1, [&] { optimizer.step(model); })) {
        ++failures;
        CHECK(a.grad == Matrix<float>::Ones(30, 40));
      }
      CHECK(failures > 1);
    } else {
      optimizer.step(model);
    }
    return std::vector<Matrix<float>>{a.value, b.value};
  };
  // A velocity that was made before memory ran out is zero, not the gradient.
  const auto plain = train(false);
  const auto starved = train(true);
  CHECK(plain[1] == starved[1]);
  CHECK(plain[0] == starved[0]);
}

TEST_CASE("Sgd lets the nodes of the model act after each step", "[optim][sgd]") {
  Counter counter;
  Sgd<float> optimizer;
  optimizer.step(counter);
  CHECK(counter.count == 1);
  CHECK(optimizer.steps() == 1);
}

TEST_CASE("Sgd refuses impossible settings and shapes that changed", "[optim][sgd]") {
  const auto message = [](const SgdConfig& config) {
    return test::message_of<ConfigError>([&] { Sgd<float> optimizer(config); });
  };
  CHECK(message({.learning_rate = -1.0}) ==
        "Sgd: learning_rate = -1, expected a finite number >= 0");
  CHECK(message({.momentum = 1.0}) == "Sgd: momentum = 1, expected 0 <= momentum < 1");
  CHECK(message({.weight_decay = -1.0}) == "Sgd: weight_decay = -1, expected a finite number >= 0");
  CHECK(message({.dampening = 2.0}) == "Sgd: dampening = 2, expected 0 <= dampening <= 1");
  CHECK(message({.nesterov = true}) ==
        "Sgd: nesterov with momentum = 0 and dampening = 0, expected momentum > 0 and dampening = "
        "0");
  CHECK(message({.groups = {{"*", 1.0, -0.5}}}) ==
        "Sgd: weight_decay = -0.5, expected a finite number >= 0");
  Sgd<float> set;
  CHECK(test::message_of<ConfigError>([&] { set.set_learning_rate(-0.5); }) ==
        "Sgd::set_learning_rate: learning_rate = -0.5, expected a finite number >= 0");
  CHECK(test::message_of<ConfigError>([&] { set.set_steps(-1); }) ==
        "Sgd::set_steps: steps = -1, expected >= 0");
  Parameter<float> v{Matrix<float>::Ones(1, 3), Matrix<float>::Ones(1, 3)};
  Parameter<float> w{Matrix<float>::Ones(2, 3), Matrix<float>::Ones(2, 2)};
  test::ParameterSet<float> model{{"v", &v}, {"w", &w}};
  Sgd<float> optimizer;
  CHECK(test::message_of<ShapeError>([&] { optimizer.step(model); }) ==
        "Sgd::step: gradient of w is [2, 2], expected [2, 3]");
  CHECK(v.value == Matrix<float>::Ones(1, 3));
  w.grad.setZero(2, 3);
  Sgd<float> moving({.momentum = 0.5});
  moving.step(model);
  moving.velocities().back().velocity->setZero(3, 2);
  CHECK(test::message_of<ShapeError>([&] { moving.step(model); }) ==
        "Sgd::step: velocity of w is [3, 2], expected [2, 3]");
}

}  // namespace weir::sgd_test
