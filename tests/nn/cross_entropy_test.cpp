// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/nn/cross_entropy.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::cross_entropy_test {

using Targets = std::vector<Index>;

TEST_CASE("CrossEntropy of uniform logits is log of the vocabulary", "[nn][cross_entropy]") {
  const auto vocab = GENERATE(as<Index>{}, 1, 2, 17, 256);
  const Matrix<double> logits = Matrix<double>::Constant(4, vocab, -3.0);
  CrossEntropy<double>::Cache cache;
  CHECK(CrossEntropy<double>{}.forward(logits, Targets(4, 0), cache) ==
        Approx(std::log(static_cast<double>(vocab))).margin(1e-12));
}

TEST_CASE("CrossEntropy matches tokens worked out by hand", "[nn][cross_entropy]") {
  // Probabilities (3/4, 1/4) and (1/2, 1/2): the mean of -log 1/4 and -log 1/2 is 1.5 log 2.
  // Z is log 4 and log 2: with z_loss 0.1 the penalty is 0.1 (4 + 1)/2 log^2 2.
  Matrix<double> logits(2, 2);
  logits << std::log(3.0), 0.0, 0.0, 0.0;
  const CrossEntropy<double> loss({.z_loss = 0.1});
  CrossEntropy<double>::Cache cache;
  const double log2 = std::log(2.0);
  CHECK(loss.forward(logits, Targets{1, 0}, cache) == Approx(1.5 * log2 + 0.25 * log2 * log2));
  CHECK(cache.nll == Approx(1.5 * log2));
  CHECK(cache.z_loss == Approx(0.25 * log2 * log2));
  CHECK(cache.tokens == 2);

  // Without the penalty the gradient is (p - one_hot) / 2.
  const CrossEntropy<double> plain;
  plain.forward(logits, Targets{1, 0}, cache);
  Matrix<double> expected(2, 2);
  expected << 0.375, -0.375, -0.25, 0.25;
  CHECK(test::relative_error(plain.backward(cache), expected) <= 1e-14);
}

TEST_CASE("CrossEntropy gradient agrees with finite differences", "[nn][cross_entropy][gradient]") {
  const auto z_loss = GENERATE(0.0, 0.3);
  const auto tokens = GENERATE(as<Index>{}, 0, 9);
  const CrossEntropy<double> loss({.ignore_index = -1, .z_loss = z_loss});
  Matrix<double> logits = test::random_matrix(4, 19, 1);
  const Targets targets = {3, -1, 18, 0};
  CrossEntropy<double>::Cache cache;
  loss.forward(logits, targets, cache, tokens);
  const Matrix<double> analytic = loss.backward(cache, 2.5);
  const Matrix<double> numeric = test::numeric_gradient(logits, [&] {
    CrossEntropy<double>::Cache fresh;
    return 2.5 * loss.forward(logits, targets, fresh, tokens);
  });
  CHECK(test::relative_error(analytic, numeric) <= 1e-6);
  CHECK(analytic.row(1).isZero(0.0));
}

TEST_CASE("CrossEntropy does not look at ignored tokens", "[nn][cross_entropy]") {
  const CrossEntropy<float> loss({.z_loss = 1e-3});
  Matrix<float> logits = test::random_matrix<float>(3, 7, 1);
  CrossEntropy<float>::Cache cache;
  const float expected = loss.forward(logits.topRows(2), Targets{2, 5}, cache);
  logits.row(2).setConstant(std::nanf(""));
  CHECK(loss.forward(logits, Targets{2, 5, -100}, cache) == expected);
  CHECK(loss.backward(cache).row(2).isZero(0.F));
}

TEST_CASE("CrossEntropy with a loss mask ignores the targets of masked tokens",
          "[nn][cross_entropy]") {
  const CrossEntropy<double> loss({.z_loss = 1e-3});
  Matrix<double> logits = test::random_matrix(4, 7, 1);
  CrossEntropy<double>::Cache cache;
  const double expected = loss.forward(logits, Targets{2, -100, 5, -100}, cache);
  const Matrix<double> gradient = loss.backward(cache);
  // A masked token may have any target, and any logits.
  logits.row(3).setConstant(std::nan(""));
  const std::vector<std::uint8_t> mask = {1, 0, 1, 0};
  CHECK(loss.forward(logits, Targets{2, 3, 5, 99}, cache, 0, mask) == expected);
  CHECK(cache.tokens == 2);
  CHECK(loss.backward(cache) == gradient);
  // It comes beside ignore_index, and N may be given.
  CHECK(loss.forward(logits, Targets{2, 3, -100, 1}, cache, 4, mask) ==
        Approx(loss.forward(logits.topRows(1), Targets{2}, cache) / 4.0));
  const std::vector<std::uint8_t> none(4, 0);
  CHECK(loss.forward(logits, Targets{2, 3, 5, 1}, cache, 0, none) == 0.0);
  CHECK(test::message_of<ShapeError>([&] {
          loss.forward(logits, Targets{2, 3, 5, 1}, cache, 0, std::vector<std::uint8_t>(3, 1));
        }) == "CrossEntropy::forward: mask has 3 entries, expected 4 (one per token)");
  CHECK_THROWS_AS(loss.backward(cache), StateError);
}

TEST_CASE("CrossEntropy takes targets that are int, and gives its gradient more than once",
          "[nn][cross_entropy]") {
  const CrossEntropy<double> loss;
  const Matrix<double> logits = test::random_matrix(3, 7, 1);
  CrossEntropy<double>::Cache cache;
  const double expected = loss.forward(logits, Targets{2, -100, 5}, cache);
  const Matrix<double> gradient = loss.backward(cache);
  CHECK(loss.forward(logits, std::vector<int>{2, -100, 5}, cache) == expected);
  CHECK(loss.backward(cache) == gradient);
  CHECK(loss.backward(cache, 2.0) == 2.0 * gradient);
}

TEST_CASE("CrossEntropy of nothing is zero", "[nn][cross_entropy]") {
  const CrossEntropy<float> loss({.z_loss = 1e-3});
  CrossEntropy<float>::Cache cache;
  CHECK(loss.forward(test::random_matrix<float>(2, 5, 1), Targets{-100, -100}, cache) == 0.F);
  CHECK(loss.backward(cache).isZero(0.F));
  CHECK(cache.tokens == 0);
  CHECK(loss.forward(Matrix<float>(0, 5), Targets{}, cache) == 0.F);
  CHECK(loss.backward(cache).rows() == 0);
}

TEST_CASE("CrossEntropy of micro-batches adds up to that of the batch", "[nn][cross_entropy]") {
  const CrossEntropy<double> loss({.z_loss = 0.01});
  const Matrix<double> logits = test::random_matrix(6, 9, 1);
  const Targets targets = {1, -100, 3, 4, 8, 6};
  CrossEntropy<double>::Cache cache;
  const double whole = loss.forward(logits, targets, cache);
  const Matrix<double> gradient = loss.backward(cache);
  const Index tokens = cache.tokens;
  CHECK(tokens == 5);

  const double first = loss.forward(logits.topRows(2), Targets{1, -100}, cache, tokens);
  CHECK(test::relative_error(loss.backward(cache), gradient.topRows(2)) <= 1e-14);
  const double rest = loss.forward(logits.bottomRows(4), Targets{3, 4, 8, 6}, cache, tokens);
  CHECK(test::relative_error(loss.backward(cache), gradient.bottomRows(4)) <= 1e-14);
  CHECK(first + rest == Approx(whole));
}

TEMPLATE_TEST_CASE("CrossEntropy survives extreme logits", "[nn][cross_entropy]", float, double) {
  Matrix<TestType> logits(2, 3);
  logits << TestType(1e4), TestType(0), TestType(-1e4), TestType(0), TestType(0),
      -static_cast<TestType>(HUGE_VAL);
  const CrossEntropy<TestType> loss;
  typename CrossEntropy<TestType>::Cache cache;
  CHECK(loss.forward(logits, Targets{1, 0}, cache) == Approx((1e4 + std::log(2.0)) / 2));
  const Matrix<TestType>& d_logits = loss.backward(cache);
  CHECK(d_logits(0, 0) == TestType(0.5));
  CHECK(d_logits(0, 1) == TestType(-0.5));
  CHECK(d_logits(1, 2) == TestType(0));
}

TEST_CASE("CrossEntropy gives the same bits on one thread and on two", "[nn][cross_entropy]") {
  if (hardware_threads() < 2) return;
  const Matrix<float> logits = test::random_matrix<float>(400, 101, 1);
  Targets targets(400);
  for (std::size_t t = 0; t < 400; ++t) targets[t] = static_cast<Index>(t % 101);
  const CrossEntropy<float> loss({.z_loss = 1e-4});
  const auto run = [&](int threads) {
    set_threads(threads);
    CrossEntropy<float>::Cache cache;
    const float value = loss.forward(logits, targets, cache);
    loss.backward(cache);
    set_threads(1);
    return std::vector<Matrix<float>>{Matrix<float>::Constant(1, 1, value), cache.d_logits};
  };
  CHECK(run(1) == run(2));
}

TEST_CASE("CrossEntropy says what is wrong", "[nn][cross_entropy]") {
  const CrossEntropy<float> loss;
  CrossEntropy<float>::Cache cache;
  Matrix<float> logits = Matrix<float>::Zero(2, 4);
  CHECK(test::message_of<StateError>([&] { loss.backward(cache); }) ==
        "CrossEntropy::backward: the cache is empty, expected a forward pass that succeeded");
  CHECK(test::message_of<ShapeError>([&] { loss.forward(logits, Targets{1}, cache); }) ==
        "CrossEntropy::forward: targets has 1 entries, expected 2 (one per token)");
  CHECK(test::message_of<ConfigError>([&] {
          loss.forward(logits, Targets{1, 4}, cache);
        }) == "CrossEntropy::forward: targets[1] = 4, expected 0 <= target < 4 or -100");
  CHECK(test::message_of<ConfigError>([&] {
          loss.forward(logits, Targets{-1, 3}, cache);
        }) == "CrossEntropy::forward: targets[0] = -1, expected 0 <= target < 4 or -100");
  CHECK(test::message_of<ConfigError>([&] {
          loss.forward(logits, Targets{0, 3}, cache, -1);
        }) == "CrossEntropy::forward: tokens = -1, expected >= 0");
  CHECK(test::message_of<ConfigError>([] { CrossEntropy<float>({.z_loss = -1.0}); }) ==
        "CrossEntropy: z_loss = -1, expected a finite number >= 0");

  loss.forward(logits, Targets{0, 3}, cache);
  logits(1, 2) = std::nanf("");
  CHECK_THROWS_AS(loss.forward(logits, Targets{0, 3}, cache), NonFiniteError);
  CHECK_THROWS_AS(loss.backward(cache), StateError);
  logits(1, 2) = HUGE_VALF;
  CHECK_THROWS_AS(loss.forward(logits, Targets{0, 3}, cache), NonFiniteError);
  logits(1, 2) = -HUGE_VALF;
  CHECK(test::message_of<NonFiniteError>([&] {
          loss.forward(logits, Targets{0, 2}, cache);
        }) ==
        "CrossEntropy::forward: row 1 of logits has log sum exp 1.09861 and target logit -inf, "
        "expected finite");
}

}  // namespace weir::cross_entropy_test
