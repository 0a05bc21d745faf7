// SPDX-License-Identifier: MIT
// Parameters that miss steps of AdamW because no backward pass reached them.
#include <cmath>
#include <vector>

#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/optim/adamw.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/parameter_set.hpp"
#include "support/threads.hpp"

namespace weir::adamw_state_test {

namespace {

constexpr AdamWConfig kPlain = {.learning_rate = 0.05, .epsilon = 1e-14, .weight_decay = 0.2};

AdamWConfig lazy(AdamWConfig config = kPlain) {
  config.lazy = true;
  return config;
}

// Two optimizers side by side, each with parameters of its own.
struct Pair {
  explicit Pair(const AdamWConfig& config) : plain(config), lazily(lazy(config)) {}

  // A step in which `b` is reached only if `both`.
  void step(std::uint64_t seed, bool both) {
    for (test::ParameterSet<double>* model : {&plain_model, &lazy_model}) {
      for (auto& [name, parameter] : model->named) {
        if (name == "b" && !both) continue;
        parameter->gradient() += test::random_matrix(20, 40, seed);
      }
    }
    plain.step(plain_model);
    lazily.step(lazy_model);
  }

  Parameter<double> plain_a{test::random_matrix(20, 40, 1)}, lazy_a = plain_a;
  Parameter<double> plain_b{test::random_matrix(20, 40, 2)}, lazy_b = plain_b;
  test::ParameterSet<double> plain_model{{"a", &plain_a}, {"b", &plain_b}};
  test::ParameterSet<double> lazy_model{{"a", &lazy_a}, {"b", &lazy_b}};
  AdamW<double> plain, lazily;
};

}  // namespace

TEST_CASE("A parameter that missed steps catches up on them", "[optim][adamw][lazy]") {
  const auto missed = GENERATE(1, 2, 30);
  const auto epsilon = GENERATE(1e-14, 1e-8);
  AdamWConfig config = kPlain;
  config.epsilon = epsilon;
  Pair pair(config);
  pair.step(10, true);
  pair.step(11, true);
  CHECK(pair.lazy_b.value == pair.plain_b.value);
  const Matrix<double> left = pair.lazy_b.value;
  const Matrix<double> first = pair.lazily.moments("b").first;
  for (int step = 0; step < missed; ++step) {
    pair.plain.set_learning_rate(0.05 / (1 + step));
    pair.lazily.set_learning_rate(0.05 / (1 + step));
    pair.step(20 + static_cast<std::uint64_t>(step), false);
    CHECK(pair.lazy_b.value == left);
    CHECK(pair.lazily.moments("b").first == first);
    CHECK(pair.lazily.moments("b").steps == pair.plain.moments("b").steps);
    CHECK(pair.lazy_a.value == pair.plain_a.value);
  }
  CHECK(test::relative_error(left, pair.plain_b.value) > 1e-3);
  // v is about one: epsilon weighs by its ratio to beta2^(n/2).
  const double tolerance = 1e-12 + 10.0 * epsilon;
  SECTION("in the next step that reaches it") {
    pair.step(60, true);
    CHECK(test::relative_error(pair.lazy_b.value, pair.plain_b.value) <= tolerance);
    const Moments<double>& moments = pair.lazily.moments("b");
    CHECK(test::relative_error(moments.first, pair.plain.moments("b").first) <= 1e-13);
    CHECK(test::relative_error(moments.second, pair.plain.moments("b").second) <= 1e-13);
    pair.step(61, true);
    CHECK(test::relative_error(pair.lazy_b.value, pair.plain_b.value) <= tolerance);
  }
  SECTION("when it is asked to") {
    pair.lazily.catch_up(pair.lazy_model);
    CHECK(test::relative_error(pair.lazy_b.value, pair.plain_b.value) <= tolerance);
    const Matrix<double> caught_up = pair.lazy_b.value;
    pair.lazily.catch_up(pair.lazy_model);  // There is nothing more.
    CHECK(pair.lazy_b.value == caught_up);
    CHECK(pair.lazily.steps() == pair.plain.steps());
    pair.step(60, false);
    pair.step(61, true);
    CHECK(test::relative_error(pair.lazy_b.value, pair.plain_b.value) <= tolerance);
  }
  SECTION("with what was saved meanwhile") {
    AdamW<double> resumed = pair.lazily.without_states();
    for (const SavedState<double>& saved : pair.lazily.saved_states()) {
      const SavedState<double> to = resumed.saved_state(saved.parameter);
      CHECK(saved.matrices.size() == (saved.parameter == "b" ? 3 : 2));
      for (const auto& [what, matrix] : saved.matrices) {
        for (const auto& [known, place] : to.matrices) {
          if (known == what) *place = *matrix;
        }
      }
      *to.steps = *saved.steps;
    }
    pair.lazily = resumed;
    pair.step(60, true);
    CHECK(test::relative_error(pair.lazy_b.value, pair.plain_b.value) <= tolerance);
  }
}

TEST_CASE("A missed step is worked out by hand", "[optim][adamw][lazy][golden]") {
  // learning_rate = weight_decay = 0.1, beta1 = 0.9, beta2 = 0.81, so that m / sqrt(v) stays as it
  // is; epsilon next to nothing. Step 1, g = 1: w = 0.99 - 0.1 = 0.89. Missed step 2: m = 0.09 over
  // 0.19 is 9/19; v = 0.1539 over 0.3439 is 81/181.
  Parameter<double> w{Matrix<double>::Constant(2, 1, 1.0)};
  test::ParameterSet<double> model{{"w", &w}};
  AdamW<double> optimizer({.learning_rate = 0.1,
                           .beta1 = 0.9,
                           .beta2 = 0.81,
                           .epsilon = 1e-14,
                           .weight_decay = 0.1,
                           .lazy = true});
  w.gradient().setOnes();
  optimizer.step(model);
  optimizer.step(model);
  CHECK(w.value(0, 0) == Approx(0.89).epsilon(1e-13));
  optimizer.catch_up(model);
  const double ratio = 9.0 / 19.0 / std::sqrt(81.0 / 181.0);
  CHECK(w.value(0, 0) == Approx(0.99 * 0.89 - 0.1 * ratio).epsilon(1e-12));
}

TEST_CASE("A lazy step treats all other parameters as a plain one", "[optim][adamw][lazy]") {
  Parameter<double> never{test::random_matrix(3, 4, 1)};
  Parameter<double> frozen{test::random_matrix(3, 4, 2)};
  Parameter<double> given_up{test::random_matrix(3, 4, 3)};
  test::ParameterSet<double> model{{"never", &never}, {"frozen", &frozen}, {"given_up", &given_up}};
  const Matrix<double> before = never.value;
  AdamW<double> optimizer(lazy());
  frozen.gradient().setOnes();
  given_up.gradient().setOnes();
  optimizer.step(model);
  const Matrix<double> still = frozen.value;
  const Matrix<double> left = given_up.value;
  frozen.frozen = true;
  frozen.gradient().setOnes();
  given_up.gradient().setOnes();
  discard(model);  // The batch is taken back: nothing was reached.
  CHECK(!given_up.reached);
  frozen.gradient().setOnes();
  optimizer.step(model);
  CHECK(never.value == before);
  CHECK(frozen.value == still);
  CHECK(frozen.grad.isZero(0.0));
  CHECK(given_up.value == left);
  optimizer.catch_up(model);
  CHECK(given_up.value != left);
  CHECK(frozen.value == still);
  given_up.gradient().setOnes();
  zero_gradients(model);
  CHECK(!given_up.reached);
  given_up.gradient();
  CHECK(given_up.reached);
  update(model);
  CHECK(!given_up.reached);
}

TEST_CASE("Lazy steps allocate nothing and do not depend on threads", "[optim][adamw][lazy]") {
  const auto run = [](int count) {
    const test::Threads threads(count);
    Pair pair(kPlain);
    for (std::uint64_t step = 0; step < 4; ++step) pair.step(step, step % 2 == 0);
    Matrix<double> gradient = test::random_matrix(20, 40, 9);
    CHECK(test::count_allocations([&] {
            for (int step = 0; step < 4; ++step) {
              if (step % 2 == 0) pair.lazy_b.gradient() += gradient;
              pair.lazy_a.gradient() += gradient;
              pair.lazily.step(pair.lazy_model);
            }
          }) == 0);
    return pair.lazy_b.value;
  };
  CHECK(run(1) == run(3));
}

TEST_CASE("Lazily trained experts do what others do, a little later", "[optim][adamw][lazy]") {
  // Few tokens and many experts: most experts have no token in most steps. Both learn the same
  // map; they differ only by experts that come back from some missed steps.
  constexpr Index kModel = 8;
  constexpr Index kExperts = 16;
  Rng rng(1);
  const MoELayer layer(LinearRouter<double>(kModel, kExperts, rng, {.init_scale = 1.0}),
                       TopKSoftmax<double>({.k = 1}), Dropless(),
                       GluBank<double>(kModel, kExperts, 16, rng));
  const Matrix<double> map = test::random_matrix(kModel, kModel, 2);
  const auto train = [&](bool lazily, double& loss, Index& missed) {
    auto model = layer;
    AdamW<double> optimizer({.learning_rate = 0.01, .lazy = lazily});
    typename decltype(model)::Cache cache;
    for (std::uint64_t step = 0; step < 200; ++step) {
      const Matrix<double> x = test::random_matrix(6, kModel, 100 + step);
      const Matrix<double> error = model.forward(x, kTraining, cache) - x * map;
      model.backward(error / 6.0, cache);
      for (auto& [name, parameter] : parameters(model)) missed += parameter->reached ? 0 : 1;
      optimizer.step(model);
    }
    optimizer.catch_up(model);
    const Matrix<double> x = test::random_matrix(500, kModel, 3);
    loss = (infer(model, x) - x * map).squaredNorm() / 500.0;
    double size = 0.0;
    std::vector<Matrix<double>> values;
    for (auto& [name, parameter] : parameters(model)) {
      size += parameter->value.squaredNorm();
      values.push_back(parameter->value);
    }
    return std::pair(values, std::sqrt(size));
  };
  double plain_loss = 0.0;
  double lazy_loss = 0.0;
  Index plain_missed = 0;
  Index lazy_missed = 0;
  const auto [plain, size] = train(false, plain_loss, plain_missed);
  const auto [late, unused] = train(true, lazy_loss, lazy_missed);
  static_cast<void>(unused);
  double distance = 0.0;
  for (std::size_t p = 0; p < plain.size(); ++p) distance += (plain[p] - late[p]).squaredNorm();
  const double start = (map.squaredNorm() + 1.0);
  INFO("loss " << plain_loss << " and " << lazy_loss << " of about " << start << ", "
               << static_cast<double>(lazy_missed) / 200.0 / 49.0 << " missed, distance "
               << std::sqrt(distance) / size);
  CHECK(lazy_missed > 200 * 49 / 2);
  CHECK(plain_loss < 0.5 * start);
  CHECK(std::abs(lazy_loss - plain_loss) <= 0.05 * plain_loss);
  CHECK(std::sqrt(distance) / size <= 0.1);
  CHECK(distance > 0.0);
}

}  // namespace weir::adamw_state_test
