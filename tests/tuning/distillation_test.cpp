// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include <weir/core/verbs.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/tuning/distillation.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::distillation_test {

namespace {

using Targets = std::vector<Index>;
using Mask = std::vector<std::uint8_t>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <class Action>
std::string message(const Action& action) {
  return test::message_of<std::logic_error>(action);
}

}  // namespace

TEST_CASE("DistillationLoss matches values computed apart", "[tuning][distillation][golden]") {
  // Computed in Python with 60 digits from section 2 of arXiv:1503.02531, with the divergence.
  Matrix<double> student(3, 3), teacher(3, 3), expected(3, 3);
  student << 0.5, -1.0, 2.0, 1.5, 0.25, -0.75, -0.5, 0.0, 0.5;
  teacher << 1.0, 0.0, -1.0, 2.0, -0.5, 0.25, 9.0, 9.0, 9.0;
  expected << -0.12693838401756283, -0.12838776842193175, 0.2553261524394946, -0.07688458604413895,
      0.12185869059367889, -0.04497410454953995, 0.0, 0.0, 0.0;
  const DistillationLoss<double> loss({.temperature = 2.5, .hard = 0.3});
  DistillationLoss<double>::Cache cache;
  CHECK(loss.forward(student, teacher, Targets{2, 0, kNoTarget}, cache) ==
        Approx(0.65832223087702744660).epsilon(1e-14));
  CHECK(cache.soft == Approx(0.81789234995338610098).epsilon(1e-14));
  CHECK(cache.hard == Approx(0.28599195303219058636).epsilon(1e-14));
  CHECK(cache.tokens == 2);
  CHECK(test::relative_error(loss.backward(cache), expected) <= 1e-13);
}

TEST_CASE("A student that is its teacher has nothing to learn", "[tuning][distillation]") {
  const auto temperature = GENERATE(0.5, 1.0, 8.0);
  const DistillationLoss<double> loss({.temperature = temperature, .hard = 0.0});
  DistillationLoss<double>::Cache cache;
  const Matrix<double> teacher = test::random_matrix(4, 21, 1);
  // Logits that all move together are the same distribution.
  const Matrix<double> student = teacher.array() + 3.0;
  CHECK(loss.forward(student, teacher, Targets(4, 0), cache) == Approx(0.0).margin(1e-13));
  CHECK(loss.backward(cache).norm() <= 1e-13);
  // Any other has, and the gradient of a row sums to zero.
  CHECK(loss.forward(test::random_matrix(4, 21, 2), teacher, Targets(4, 0), cache) > 0.0);
  CHECK(loss.backward(cache).rowwise().sum().norm() <= 1e-13);
}

TEST_CASE("DistillationLoss of targets alone is the cross entropy", "[tuning][distillation]") {
  const Matrix<double> student = test::random_matrix(5, 9, 1);
  const Targets targets = {3, kNoTarget, 8, 0, 0};
  const DistillationLoss<double> loss({.hard = 1.0});
  DistillationLoss<double>::Cache cache;
  const CrossEntropy<double> other;
  CrossEntropy<double>::Cache other_cache;
  CHECK(loss.forward(student, test::random_matrix(5, 9, 2), targets, cache, 7) ==
        Approx(other.forward(student, targets, other_cache, 7)));
  CHECK(test::relative_error(loss.backward(cache), other.backward(other_cache)) <= 1e-14);
}

TEST_CASE("A high temperature matches logits, as the paper derives", "[tuning][distillation]") {
  // T^2 KL -> |s - a|^2 / 2V for rows without a mean, and its gradient (s - a) / V.
  Matrix<double> student = test::random_matrix(3, 6, 1);
  Matrix<double> teacher = test::random_matrix(3, 6, 2);
  for (auto* m : {&student, &teacher}) m->colwise() -= m->rowwise().mean().eval();
  const DistillationLoss<double> loss({.temperature = 1e4, .hard = 0.0});
  DistillationLoss<double>::Cache cache;
  const Matrix<double> difference = student - teacher;
  CHECK(loss.forward(student, teacher, Targets(3, 0), cache) ==
        Approx(difference.squaredNorm() / (2.0 * 6.0 * 3.0)).epsilon(1e-3));
  CHECK(test::relative_error(loss.backward(cache), difference / (6.0 * 3.0)) <= 1e-3);
}

TEST_CASE("DistillationLoss has the gradient of finite differences",
          "[tuning][distillation][gradient]") {
  const auto config = GENERATE(as<DistillationLossConfig>{},
                               DistillationLossConfig{.temperature = 1.0, .hard = 0.0},
                               DistillationLossConfig{.temperature = 3.0, .hard = 0.4},
                               DistillationLossConfig{.temperature = 0.5, .hard = 1.0});
  const auto tokens = GENERATE(as<Index>{}, 0, 9);
  const DistillationLoss<double> loss(config);
  Matrix<double> student = test::random_matrix(4, 19, 1);
  const Matrix<double> teacher = 2.0 * test::random_matrix(4, 19, 2);
  const Targets targets = {3, kNoTarget, 18, 0};
  DistillationLoss<double>::Cache cache;
  loss.forward(student, teacher, targets, cache, tokens);
  const Matrix<double> analytic = loss.backward(cache, 2.5);
  const Matrix<double> numeric = test::numeric_gradient(
      student, [&] { return 2.5 * loss.forward(student, teacher, targets, cache, tokens); });
  CHECK(test::relative_error(analytic, numeric) <= 1e-6);
  CHECK(analytic.row(1).isZero(0.0));
}

TEST_CASE("HiddenLoss has the gradient of finite differences", "[tuning][distillation][gradient]") {
  const auto mapped = GENERATE(false, true);
  const auto mask = GENERATE(as<Mask>{}, Mask{}, Mask{1, 0, 1, 1});
  const auto tokens = GENERATE(as<Index>{}, 0, 9);
  Rng rng(1);
  const Index width = mapped ? 5 : 7;
  HiddenLoss<double> loss =
      mapped ? HiddenLoss<double>(width, 7, rng, 0.7) : HiddenLoss<double>(0.7);
  Matrix<double> h = test::random_matrix(4, width, 1);
  const Matrix<double> teacher = test::random_matrix(4, 7, 2);
  HiddenLoss<double>::Cache cache;
  const auto objective = [&] { return 2.5 * loss.forward(h, teacher, cache, mask, tokens); };
  objective();
  const Matrix<double> dh = loss.backward(cache, 2.5);
  CHECK(test::relative_error(dh, test::numeric_gradient(h, objective)) <= 1e-6);
  const auto named = parameters(loss);
  REQUIRE(named.size() == (mapped ? 1 : 0));
  for (const auto& [name, parameter] : named) {
    CHECK(name == "map.weight");
    const Matrix<double> analytic = parameter->gradient();
    CHECK(test::relative_error(analytic, test::numeric_gradient(parameter->value, objective)) <=
          1e-6);
  }
}

TEST_CASE("HiddenLoss is the mean square of what differs", "[tuning][distillation]") {
  // Differences (1, 2) and (0, -1): 6 / 4. The masked row may hold anything.
  Matrix<double> h(3, 2), teacher(3, 2);
  h << 2, 4, 1, 1, kNan, 7;
  teacher << 1, 2, 1, 2, 0, 0;
  const Mask mask = {1, 1, 0};
  HiddenLoss<double> loss(3.0);
  HiddenLoss<double>::Cache cache;
  CHECK(loss.forward(h, teacher, cache, mask) == Approx(4.5));
  CHECK(loss.backward(cache).row(2).isZero(0.0));
  Rng rng(1);
  HiddenLoss<double> mapped(2, 2, rng);
  mapped.forward(h, teacher, cache, mask);
  CHECK(mapped.backward(cache).allFinite());
  CHECK(parameters(mapped)[0].parameter->gradient().allFinite());
  CHECK(loss.forward(teacher, teacher, cache) == 0.0);
  CHECK(loss.forward(Matrix<double>(0, 2), Matrix<double>(0, 2), cache) == 0.0);
  CHECK(loss.backward(cache).rows() == 0);
}

TEST_CASE("Distillation of parts adds up to that of the batch", "[tuning][distillation]") {
  const Matrix<double> s = test::random_matrix(6, 9, 1);
  const Matrix<double> a = test::random_matrix(6, 9, 2);
  const DistillationLoss<double> loss;
  DistillationLoss<double>::Cache cache;
  const double whole = loss.forward(s, a, Targets{1, kNoTarget, 3, 4, 8, 6}, cache);
  const Matrix<double> gradient = loss.backward(cache);
  const double first = loss.forward(s.topRows(2), a.topRows(2), Targets{1, kNoTarget}, cache, 5);
  CHECK(test::relative_error(loss.backward(cache), gradient.topRows(2)) <= 1e-14);
  const double rest = loss.forward(s.bottomRows(4), a.bottomRows(4), Targets{3, 4, 8, 6}, cache, 5);
  CHECK(first + rest == Approx(whole));
  CHECK(loss.forward(s.topRows(1), a.topRows(1), Targets{kNoTarget}, cache) == 0.0);
  CHECK(loss.forward(Matrix<double>(0, 9), Matrix<double>(0, 9), Targets{}, cache) == 0.0);
}

TEST_CASE("Distillation allocates nothing once it is warm, and has the same bits on two threads",
          "[tuning][distillation]") {
  const Matrix<float> s = test::random_matrix<float>(300, 101, 1);
  const Matrix<float> a = test::random_matrix<float>(300, 101, 2);
  const Targets targets(300, 7);
  const DistillationLoss<float> loss;
  DistillationLoss<float>::Cache cache;
  Rng rng(1);
  HiddenLoss<float> hidden(101, 101, rng);
  HiddenLoss<float>::Cache hidden_cache;
  const auto run = [&] {
    loss.forward(s, a, targets, cache);
    loss.backward(cache);
    hidden.forward(s, a, hidden_cache);
    hidden.backward(hidden_cache);
  };
  run();
  const Matrix<float> d = cache.d_logits;
  const Matrix<float> dx = hidden_cache.map.dx;
  CHECK(test::count_allocations(run) == 0);
  const test::Threads threads(2);
  run();
  CHECK(cache.d_logits == d);
  CHECK(hidden_cache.map.dx == dx);
}

TEST_CASE("Distillation says what is wrong", "[tuning][distillation]") {
  using Loss = DistillationLoss<double>;
  CHECK(message([] { Loss({.temperature = 0.0}); }) ==
        "DistillationLoss: temperature = 0, expected a finite number > 0");
  CHECK(message([] { Loss({.hard = 1.5}); }) ==
        "DistillationLoss: hard = 1.5, expected 0 <= hard <= 1");
  const Loss loss;
  Loss::Cache cache;
  CHECK(message([&] { loss.backward(cache); }) ==
        "DistillationLoss::backward: the cache is empty, expected a forward pass that succeeded");
  Matrix<double> s = Matrix<double>::Zero(2, 4);
  Matrix<double> a = s;
  const auto forward = [&](const Matrix<double>& teacher, const Targets& targets,
                           Index tokens = 0) {
    return message([&] { loss.forward(s, teacher, targets, cache, tokens); });
  };
  CHECK(forward(a, {0, 1}) == "no exception");
  CHECK(forward(a.leftCols(3), {0, 1}) ==
        "DistillationLoss::forward: teacher is [2, 3], expected [2, 4]");
  CHECK(forward(a, {0}) ==
        "DistillationLoss::forward: targets has 1 entries, expected 2 (one per row of logits)");
  CHECK(forward(a, {0, 4}) ==
        "DistillationLoss::forward: targets[1] = 4, expected 0 <= target < 4 or -100");
  CHECK(forward(a, {0, 1}, -2) == "DistillationLoss::forward: tokens = -2, expected >= 0");
  a(1, 2) = kNan;
  CHECK(forward(a, {0, kNoTarget}) == "no exception");
  CHECK(forward(a, {0, 1}) ==
        "DistillationLoss::forward: row 1 has the divergence nan, expected logits that are finite");
  CHECK_THROWS_AS(loss.backward(cache), StateError);

  CHECK(message([] { HiddenLoss<double>(-1.0); }) ==
        "HiddenLoss: coefficient = -1, expected a finite number >= 0");
  Rng rng(1);
  CHECK(message([&] { HiddenLoss<double>(0, 4, rng); }) == "HiddenLoss: student = 0, expected > 0");
  CHECK(message([&] { HiddenLoss<double>(4, 0, rng); }) == "HiddenLoss: teacher = 0, expected > 0");
  HiddenLoss<double> hidden(4, 3, rng);
  HiddenLoss<double>::Cache hidden_cache;
  const auto differ = [&](const Matrix<double>& h, const Matrix<double>& teacher,
                          const Mask& mask = {}, Index tokens = 0) {
    return message([&] { hidden.forward(h, teacher, hidden_cache, mask, tokens); });
  };
  CHECK(message([&] { hidden.backward(hidden_cache); }) ==
        "HiddenLoss::backward: the cache is empty, expected a forward pass that succeeded");
  CHECK(differ(s, s) == "HiddenLoss::forward: teacher is [2, 4], expected [2, 3]");
  CHECK(differ(s.leftCols(3), s.leftCols(3)) ==
        "HiddenLoss::forward: h is [2, 3], expected [tokens, 4]");
  CHECK(differ(s, s.leftCols(3), {1}) ==
        "HiddenLoss::forward: pass.mask has 1 entries, expected 2 (one per token)");
  CHECK(differ(s, s.leftCols(3), {}, -1) == "HiddenLoss::forward: tokens = -1, expected >= 0");
  CHECK(differ(s, a.rightCols(3)).starts_with("HiddenLoss::forward: row 1 differs by nan"));
  CHECK(message([&] { hidden.backward(hidden_cache); }).starts_with("HiddenLoss::backward: the "));
}

}  // namespace weir::distillation_test
