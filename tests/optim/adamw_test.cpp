// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <weir/optim/adamw.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/parameter_set.hpp"
#include "support/rounded_products.hpp"

namespace weir::adamw_test {

namespace {

Matrix<double> column(std::vector<double> values) {
  return Eigen::Map<Matrix<double>>(values.data(), static_cast<Index>(values.size()), 1);
}

// The paper's algorithm 2, one number at a time.
struct ScalarAdamW {
  AdamWConfig config;
  double m = 0.0;
  double v = 0.0;
  int t = 0;

  double step(double w, double g) {
    ++t;
    m = config.beta1 * m + (1.0 - config.beta1) * g;
    v = config.beta2 * v + (1.0 - config.beta2) * g * g;
    const double m_hat = m / (1.0 - std::pow(config.beta1, t));
    const double v_hat = v / (1.0 - std::pow(config.beta2, t));
    return w - config.learning_rate *
                   (m_hat / (std::sqrt(v_hat) + config.epsilon) + config.weight_decay * w);
  }
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

TEST_CASE("AdamW takes two steps worked out by hand", "[optim][adamw][golden]") {
  // learning_rate = weight_decay = 0.1, beta1 = 0.9, beta2 = 0.99, epsilon next to nothing.
  // Step 1, g = (1, -2): m' = g, v' = g^2, so each moves by 0.1 against its sign after the decay
  // by 1 %:  0.99 - 0.1 = 0.89  and  -1.98 + 0.1 = -1.88.
  // Step 2, g = (-1, 2): m = (0.09 - 0.1, -0.18 + 0.2) = (-0.01, 0.02), over 0.19 is
  // (-1/19, 2/19); v' = (1, 4) as before. So m' / sqrt(v') = (-1/19, 1/19).
  Parameter<double> w{column({1.0, -2.0})};
  test::ParameterSet<double> model{{"w", &w}};
  AdamW<double> optimizer(
      {.learning_rate = 0.1, .beta1 = 0.9, .beta2 = 0.99, .epsilon = 1e-14, .weight_decay = 0.1});
  w.gradient() = column({1.0, -2.0});
  optimizer.step(model);
  CHECK(test::relative_error(w.value, column({0.89, -1.88})) <= 1e-12);

  w.gradient() = column({-1.0, 2.0});
  optimizer.step(model);
  const double first = 0.99 * 0.89 + 0.1 / 19.0;
  const double second = -0.99 * 1.88 - 0.1 / 19.0;
  CHECK(test::relative_error(w.value, column({first, second})) <= 1e-12);
}

TEST_CASE("AdamW reproduces ten steps computed to 40 digits", "[optim][adamw][golden]") {
  // loss = ||w - target||^2 / 2 from w = (1, -2, 1/2), target = (1/4, 1, 1/2), learning rate 0.05,
  // the defaults otherwise; recorded from algorithm 2 in multi-precision arithmetic (mpmath).
  const std::vector<double> losses = {4.78125,
                                      4.5633156259533333,
                                      4.3536471546777013,
                                      4.1506918992850135,
                                      3.9562497867834894,
                                      3.7690698045956709,
                                      3.5891024251343328,
                                      3.4167014432824381,
                                      3.2518170397752711,
                                      3.0940064257591929};
  const Matrix<double> target = column({0.25, 1.0, 0.5});
  Parameter<double> w{column({1.0, -2.0, 0.5})};
  test::ParameterSet<double> model{{"w", &w}};
  AdamW<double> optimizer({.learning_rate = 0.05});
  for (const double loss : losses) {
    w.gradient() = w.value - target;
    CHECK(w.grad.squaredNorm() / 2.0 == Approx(loss).epsilon(1e-12));
    optimizer.step(model);
  }
  const Matrix<double> last =
      column({0.47718991192718038, -1.4154019158363271, 0.51454165045453699});
  CHECK(test::relative_error(w.value, last) <= 1e-12);
  CHECK(optimizer.steps() == 10);
}

TEST_CASE("AdamW agrees with a scalar loop across block boundaries", "[optim][adamw]") {
  const AdamWConfig config{.learning_rate = 0.03, .weight_decay = 0.2};
  Parameter<double> large{test::random_matrix(37, 41, 1)};  // three blocks, the last one short
  Parameter<double> small{test::random_matrix(2, 3, 2)};
  Matrix<double> expected = large.value;
  std::vector<ScalarAdamW> scalars(static_cast<std::size_t>(large.value.size()), {config});
  test::ParameterSet<double> model{{"small", &small}, {"large", &large}};
  AdamW<double> optimizer(config);
  for (std::uint64_t step = 0; step < 4; ++step) {
    const Matrix<double> g = test::random_matrix(37, 41, 10 + step);
    large.gradient() += 0.25 * g;  // as two micro-batches do
    large.gradient() += 0.75 * g;
    small.gradient().setOnes();
    for (std::size_t i = 0; i < scalars.size(); ++i) {
      double& w = expected.data()[i];
      w = scalars[i].step(w, g.data()[i]);
    }
    optimizer.step(model);
    CHECK(test::relative_error(large.value, expected) <= 1e-12);
    CHECK(large.grad.isZero(0.0));
    CHECK(small.grad.isZero(0.0));
  }
}

TEST_CASE("AdamW decay is decoupled from the gradient", "[optim][adamw]") {
  Parameter<double> decaying{column({4.0, -8.0})};
  Parameter<double> steady{column({4.0, -8.0})};
  const AdamWConfig config{.learning_rate = 0.5, .weight_decay = 0.25};

  SECTION("a zero gradient shrinks the value by learning_rate * weight_decay") {
    test::ParameterSet<double> model{{"w", &decaying}};
    AdamW<double> optimizer(config);
    decaying.gradient().setZero();
    optimizer.step(model);
    CHECK(decaying.value == column({3.5, -7.0}));
  }
  SECTION("the moments do not see it") {
    test::ParameterSet<double> with_model{{"w", &decaying}};
    AdamW<double> with(config);
    test::ParameterSet<double> without_model{{"w", &steady}};
    AdamW<double> without({.learning_rate = 0.5, .weight_decay = 0.0});
    for (int step = 0; step < 3; ++step) {
      decaying.gradient() = column({1.0, 2.0});
      steady.gradient() = column({1.0, 2.0});
      with.step(with_model);
      without.step(without_model);
    }
    CHECK(with.moments()[0].moments->first == without.moments()[0].moments->first);
    CHECK(with.moments()[0].moments->second == without.moments()[0].moments->second);
  }
}

TEST_CASE("AdamW spares vectors from decay unless told otherwise", "[optim][adamw]") {
  const bool decay_vectors = GENERATE(false, true);
  Parameter<double> bias{Matrix<double>::Constant(1, 3, 2.0)};
  test::ParameterSet<double> model{{"bias", &bias}};
  AdamW<double> optimizer(
      {.learning_rate = 0.5, .weight_decay = 0.5, .decay_vectors = decay_vectors});
  bias.gradient().setZero();
  optimizer.step(model);
  CHECK(bias.value == Matrix<double>::Constant(1, 3, decay_vectors ? 1.5 : 2.0));
}

TEST_CASE("AdamW leaves frozen and unused parameters alone", "[optim][adamw]") {
  const Matrix<double> start = column({1.0, 2.0});
  Parameter<double> frozen{start};
  Parameter<double> unused{start};
  Parameter<double> trained{start};
  test::ParameterSet<double> model{{"frozen", &frozen}, {"unused", &unused}, {"trained", &trained}};
  AdamW<double> optimizer;
  frozen.frozen = true;
  for (int step = 0; step < 3; ++step) {
    frozen.gradient().setOnes();
    trained.gradient().setOnes();
    optimizer.step(model);
  }

  const auto moments = optimizer.moments();
  CHECK(frozen.value == start);
  CHECK(frozen.grad.isZero(0.0));
  CHECK(moments[0].name == "frozen");
  CHECK(moments[0].moments->first.size() == 0);
  CHECK(unused.value == start);
  CHECK(unused.grad.size() == 0);
  CHECK(moments[1].moments->steps == 0);
  CHECK(trained.value != start);
  CHECK(moments[2].moments->steps == 3);

  // Used for the first time, a parameter moves as far as if training began here.
  frozen.frozen = false;
  frozen.gradient().setOnes();
  unused.gradient().setOnes();
  optimizer.step(model);
  Parameter<double> fresh{start};
  test::ParameterSet<double> fresh_model{{"fresh", &fresh}};
  AdamW<double> beginner;
  fresh.gradient().setOnes();
  beginner.step(fresh_model);
  CHECK(frozen.value == fresh.value);
  CHECK(unused.value == fresh.value);
  CHECK(optimizer.steps() == 4);
}

TEST_CASE("AdamW follows a model that is moved, gains and loses parameters", "[optim][adamw]") {
  const auto ones = [](Parameter<double>& w) { w.gradient().setOnes(); };
  Parameter<double> a{column({1.0, 2.0})};
  Parameter<double> b{column({3.0, 4.0})};
  AdamW<double> optimizer({.weight_decay = 0.0});
  AdamW<double> of_a({.weight_decay = 0.0});
  Parameter<double> alone = a;
  const auto step = [&](AdamW<double>& of, std::vector<NamedParameter<double>> named) {
    for (auto& [name, w] : named) ones(*w);
    test::ParameterSet<double> model(std::move(named));
    of.step(model);
  };

  step(optimizer, {{"a", &a}, {"b", &b}});
  Parameter<double> moved = std::move(a);
  const auto steps_of = [&](std::string_view name) { return optimizer.moments(name).steps; };
  step(optimizer, {{"new", &b}, {"a", &moved}});  // b under another name starts anew.
  CHECK(steps_of("new") == 1);
  CHECK(steps_of("b") == 1);
  step(optimizer, {{"b", &b}, {"a", &moved}});
  CHECK(steps_of("a") == 3);
  CHECK(steps_of("b") == 2);
  for (int i = 0; i < 3; ++i) step(of_a, {{"a", &alone}});
  CHECK(moved.value == alone.value);

  optimizer.forget("*");
  CHECK(optimizer.moments().empty());
  CHECK(steps_of("a") == 0);
}

TEST_CASE("AdamW gives groups of parameters their own rates", "[optim][adamw]") {
  Parameter<double> router{column({2.0, 2.0})};
  Parameter<double> gate{column({2.0, 2.0})};
  Parameter<double> other{column({2.0, 2.0})};
  test::ParameterSet<double> model{
      {"layers.0.router.weight", &router}, {"experts.1.gate", &gate}, {"experts.1.up", &other}};
  AdamW<double> optimizer({.learning_rate = 0.5,
                           .weight_decay = 0.25,
                           .groups = {{.pattern = "*.router.*", .learning_rate_factor = 0.5},
                                      {.pattern = "*.gate", .weight_decay = 0.0},
                                      {.pattern = "*", .weight_decay = 1.0}}});
  for (auto& [name, w] : model.named) w->gradient().setZero();
  optimizer.step(model);
  CHECK(router.value(0, 0) == 2.0 * (1.0 - 0.25 * 0.25));
  CHECK(gate.value(0, 0) == 2.0);
  CHECK(other.value(0, 0) == 2.0 * (1.0 - 0.5));
}

TEST_CASE("AdamW allocates nothing after its first step", "[optim][adamw]") {
  if (!test::allocations_are_counted()) return;
  Parameter<float> a{test::random_matrix<float>(40, 30, 1)};
  Parameter<float> b{test::random_matrix<float>(1, 30, 2)};
  test::ParameterSet<float> model{{"layers.0.moe.experts.3.gate", &a},
                                  {"layers.0.norm.weight", &b}};
  AdamW<float> optimizer;
  const auto step = [&] {
    a.gradient().setOnes();
    b.gradient().setOnes();
    optimizer.step(model);
  };
  step();
  CHECK(test::count_allocations([&] {
          for (int i = 0; i < 3; ++i) step();
        }) == 0);
}

TEST_CASE("AdamW descends a quadratic to its minimum", "[optim][adamw]") {
  const Matrix<float> target = test::random_matrix<float>(5, 7, 3);
  const Matrix<float> curvature = test::random_matrix<float>(5, 7, 4).cwiseAbs().array() + 0.1F;
  Parameter<float> w{Matrix<float>::Zero(5, 7)};
  test::ParameterSet<float> model{{"w", &w}};
  AdamW<float> optimizer({.weight_decay = 0.0});
  for (int step = 0; step < 600; ++step) {
    w.gradient() = curvature.cwiseProduct(w.value - target);
    optimizer.set_learning_rate(0.05 * std::exp(-0.01 * step));
    optimizer.step(model);
  }
  CHECK(test::relative_error(w.value, target) <= 1e-3);
}

TEST_CASE("AdamW takes the learning rate of the moment", "[optim][adamw]") {
  Parameter<double> w{column({1.0, 1.0})};
  test::ParameterSet<double> model{{"w", &w}};
  AdamW<double> optimizer({.epsilon = 1e-14, .weight_decay = 0.0});
  CHECK(optimizer.learning_rate() == 1e-3);
  optimizer.set_learning_rate(0.25);
  CHECK(optimizer.config().learning_rate == 0.25);
  w.gradient().setOnes();
  optimizer.step(model);
  CHECK(test::relative_error(w.value, column({0.75, 0.75})) <= 1e-12);
}

TEST_CASE("AdamW continues from saved moments bit for bit", "[optim][adamw]") {
  const auto train = [](AdamW<float>& optimizer, Parameter<float>& w, std::uint64_t seed) {
    test::ParameterSet<float> model{{"w", &w}};
    w.gradient() = test::random_matrix<float>(9, 70, seed);
    optimizer.step(model);
  };
  Parameter<float> w{test::random_matrix<float>(9, 70, 5)};
  AdamW<float> optimizer;
  for (std::uint64_t seed = 0; seed < 3; ++seed) train(optimizer, w, seed);

  Parameter<float> copy = w;
  AdamW<float> resumed;
  resumed.moments("w") = optimizer.moments("w");
  resumed.set_steps(optimizer.steps());
  for (std::uint64_t seed = 3; seed < 6; ++seed) {
    train(optimizer, w, seed);
    train(resumed, copy, seed);
  }
  CHECK(w.value == copy.value);
  CHECK(resumed.steps() == 6);
}

TEST_CASE("AdamW gives the same bits for any number of threads and any order", "[optim][adamw]") {
  const std::vector<Index> rows = {1, 300, 1, 7, 1, 64};
  const auto train = [&](int thread_count, bool backwards) {
    std::vector<Parameter<float>> weights;
    for (const Index r : rows) {
      weights.push_back({test::random_matrix<float>(r, 131, static_cast<std::uint64_t>(r))});
    }
    std::vector<NamedParameter<float>> named;
    for (Parameter<float>& w : weights) named.push_back({"w" + std::to_string(named.size()), &w});
    if (backwards) std::reverse(named.begin(), named.end());
    test::ParameterSet<float> model(named);
    AdamW<float> optimizer({.learning_rate = 0.01});
    set_threads(thread_count);
    for (std::uint64_t step = 0; step < 3; ++step) {
      for (Parameter<float>& w : weights) {
        w.gradient() = test::random_matrix<float>(w.value.rows(), 131, step);
      }
      optimizer.step(model);
    }
    set_threads(1);
    std::vector<Matrix<float>> values;
    for (const Parameter<float>& w : weights) values.push_back(w.value);
    return values;
  };
  const auto expected = train(1, false);
  CHECK(train(std::min(2, hardware_threads()), false) == expected);
  CHECK(train(1, true) == expected);
}

TEST_CASE("AdamW has nothing to do without parameters", "[optim][adamw]") {
  Parameter<float> empty{Matrix<float>(0, 4)};
  test::ParameterSet<float> no_parameters{};
  test::ParameterSet<float> of_nothing{{"empty", &empty}};
  AdamW<float> optimizer;
  optimizer.step(no_parameters);
  CHECK(optimizer.steps() == 1);
  CHECK(optimizer.moments().empty());
  optimizer.step(of_nothing);
  CHECK(optimizer.steps() == 2);
}

TEST_CASE("AdamW lets the nodes of the model act after each step", "[optim][adamw]") {
  Counter counter;
  AdamW<float> optimizer;
  optimizer.step(counter);
  optimizer.step(counter);
  CHECK(counter.count == 2);
}

TEST_CASE("AdamW refuses impossible settings", "[optim][adamw]") {
  Parameter<float> w{Matrix<float>::Zero(2, 3)};
  Parameter<float> other{Matrix<float>::Zero(2, 3)};
  const auto message = [&](const AdamWConfig& config) {
    return test::message_of<ConfigError>([&] { AdamW<float>{config}; });
  };
  CHECK(message({.learning_rate = -1.0}) ==
        "AdamW: learning_rate = -1, expected a finite number >= 0");
  CHECK(message({.beta1 = 1.0}) == "AdamW: beta1 = 1, expected 0 <= beta1 < 1");
  CHECK(message({.beta2 = -0.5}) == "AdamW: beta2 = -0.5, expected 0 <= beta2 < 1");
  CHECK(message({.epsilon = 0.0}) == "AdamW: epsilon = 0, expected a finite number > 0");
  CHECK(message({.weight_decay = HUGE_VAL}) ==
        "AdamW: weight_decay = inf, expected a finite number >= 0");
  CHECK(message({.groups = {{.pattern = "*", .learning_rate_factor = NAN}}}) ==
        "AdamW: learning_rate_factor = nan, expected a finite number >= 0");

  AdamW<float> optimizer;
  test::ParameterSet<float> twice{{"embedding", &w}, {"head", &w}};
  CHECK(test::message_of<ConfigError>([&] { optimizer.step(twice); }) ==
        "AdamW::step: embedding and head are the same parameter, expected each once");
  test::ParameterSet<float> same_name{{"w", &w}, {"w", &other}};
  CHECK(test::message_of<ConfigError>([&] { optimizer.step(same_name); }) ==
        "AdamW::step: two parameters are named w, expected different names");
  CHECK(test::message_of<ConfigError>([&] { optimizer.set_learning_rate(-0.1); }) ==
        "AdamW::set_learning_rate: learning_rate = -0.1, expected a finite number >= 0");
  CHECK(test::message_of<ConfigError>([&] { optimizer.set_steps(-1); }) ==
        "AdamW::set_steps: steps = -1, expected >= 0");
  CHECK(optimizer.learning_rate() == 1e-3);
  CHECK(optimizer.steps() == 0);
}

TEST_CASE("AdamW refuses shapes that changed, before it changes anything", "[optim][adamw]") {
  Parameter<float> first{Matrix<float>::Zero(2, 3)};
  Parameter<float> second{Matrix<float>::Zero(2, 3)};
  test::ParameterSet<float> model{{"first", &first}, {"second", &second}};
  AdamW<float> optimizer;
  first.gradient().setOnes();

  SECTION("a gradient") {
    second.grad.setZero(3, 2);
    CHECK(test::message_of<ShapeError>([&] { optimizer.step(model); }) ==
          "AdamW::step: gradient of second is [3, 2], expected [2, 3]");
  }
  SECTION("moments") {
    optimizer.moments("second").second.setZero(1, 1);
    CHECK(test::message_of<ShapeError>([&] { optimizer.step(model); }) ==
          "AdamW::step: second moment of second is [1, 1], expected [2, 3]");
    optimizer.moments("second").second.resize(0, 0);
    optimizer.moments("second").first.setZero(3, 2);
    CHECK(test::message_of<ShapeError>([&] { optimizer.step(model); }) ==
          "AdamW::step: first moment of second is [3, 2], expected [2, 3]");
  }
  CHECK(first.value.isZero(0.0));
  CHECK(first.grad == Matrix<float>::Ones(2, 3));
  CHECK(optimizer.moments("first").steps == 0);
  CHECK(optimizer.steps() == 0);
}

TEST_CASE("AdamW keeps its moments in 16 bits", "[optim][adamw][precision]") {
  const AdamWConfig config = {.learning_rate = 0.01, .bfloat16_moments = true};
  constexpr Index kRows = 3;
  constexpr Index kCols = 700;  // More than a block.
  Parameter<float> w{test::random_matrix<float>(kRows, kCols, 1)};
  test::ParameterSet<float> model{{"w", &w}};
  AdamW<float> optimizer(config);
  Matrix<double> expected = w.value.cast<double>();
  Matrix<double> m = Matrix<double>::Zero(kRows, kCols);
  Matrix<double> v = m;
  // With moments in full.
  AdamWConfig in_full = config;
  in_full.bfloat16_moments = false;
  Parameter<float> full{w.value};
  test::ParameterSet<float> full_model{{"w", &full}};
  AdamW<float> full_optimizer(in_full);
  for (std::uint64_t t = 1; t <= 30; ++t) {
    const Matrix<float> g = test::random_matrix<float>(kRows, kCols, t);
    w.gradient() = g;
    optimizer.step(model);
    full.gradient() = g;
    full_optimizer.step(full_model);
    // The paper's algorithm; what is remembered is rounded.
    const Matrix<double> d = g.cast<double>();
    m = config.beta1 * m + (1.0 - config.beta1) * d;
    v = config.beta2 * v + (1.0 - config.beta2) * d.cwiseAbs2();
    const double of_m = 1.0 / (1.0 - std::pow(config.beta1, static_cast<double>(t)));
    const double of_v = 1.0 / (1.0 - std::pow(config.beta2, static_cast<double>(t)));
    for (Index i = 0; i < m.size(); ++i) {
      double& value = expected.data()[i];
      value -= config.learning_rate *
               (of_m * m.data()[i] / (std::sqrt(of_v * v.data()[i]) + config.epsilon) +
                config.weight_decay * value);
      m.data()[i] = test::nearest_bfloat16(m.data()[i]);
      v.data()[i] = test::nearest_bfloat16(v.data()[i]);
    }
  }
  CHECK(test::relative_error(w.value.cast<double>(), expected) < 1e-6);
  CHECK(test::relative_error(w.value.cast<double>(), full.value.cast<double>()) > 1e-5);
  const Moments<float>& moments = optimizer.moments("w");
  CHECK(moments.first.size() == 0);
  CHECK(moments.second.size() == 0);
  // To the bit, but for the few of 2100 that float and double round to different neighbours.
  const auto count_different = [](const auto& a, const Matrix<double>& b) {
    return (a.template cast<double>().array() != b.array()).count();
  };
  CHECK(count_different(moments.short_first, m) <= 10);
  CHECK(count_different(moments.short_second, v) <= 10);
  w.gradient().setOnes();
  CHECK(test::count_allocations([&] { optimizer.step(model); }) == 0);

  // They differ from exact ones, and catch up on missed steps as those do.
  AdamWConfig missing = config;
  missing.lazy = true;
  Parameter<float> late{w.value};
  test::ParameterSet<float> with_late{{"w", &late}};
  AdamW<float> lazy(missing);
  late.gradient().setOnes();
  lazy.step(with_late);
  const Matrix<float> before = late.value;
  lazy.step(with_late);
  CHECK(late.value == before);
  lazy.catch_up(with_late);
  CHECK(late.value != before);
}

}  // namespace weir::adamw_test
