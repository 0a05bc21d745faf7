// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <weir/model/sampling.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::sampling_test {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

RowVector<double> row(std::vector<double> values) {
  return Eigen::Map<RowVector<double>>(values.data(), static_cast<Index>(values.size()));
}

// Logits whose softmax is `p`.
RowVector<double> log_of(const std::vector<double>& p) {
  return row(p).array().log();
}

RowVector<double> frequencies(const RowVector<double>& logits, const Sampling& sampling,
                              int draws = 20000) {
  Sampler<double> sampler;
  Rng rng(7);
  RowVector<double> counts = RowVector<double>::Zero(logits.size());
  for (int i = 0; i < draws; ++i) counts[sampler.sample(logits, sampling, rng)] += 1.0;
  return counts / draws;
}

RowVector<double> probabilities(const RowVector<double>& logits, const Sampling& sampling) {
  Sampler<double> sampler;
  return sampler.distribution(logits, sampling);
}

void check_close(const RowVector<double>& a, const RowVector<double>& b, double tolerance) {
  INFO(a << " against " << b);
  CHECK((a - b).cwiseAbs().maxCoeff() <= tolerance);
}

}  // namespace

TEST_CASE("Sampler's distribution matches cases worked out by hand", "[model][sampling][golden]") {
  const RowVector<double> logits = log_of({0.1, 0.4, 0.2, 0.3});
  const auto check = [&](const Sampling& sampling, const RowVector<double>& expected) {
    check_close(probabilities(logits, sampling), expected, 1e-14);
  };
  check({}, row({0.1, 0.4, 0.2, 0.3}));
  // Temperature 1/2 squares the probabilities: 1, 16, 4 and 9 parts of 30.
  check({.temperature = 0.5}, row({1.0, 16.0, 4.0, 9.0}) / 30.0);
  check({.top_k = 2}, row({0.0, 4.0, 0.0, 3.0}) / 7.0);
  check({.top_k = 9}, row({0.1, 0.4, 0.2, 0.3}));
  // 0.4 is not enough, 0.4 + 0.3 is.
  check({.top_p = 0.65}, row({0.0, 4.0, 0.0, 3.0}) / 7.0);
  check({.top_p = 0.75}, row({0.0, 4.0, 2.0, 3.0}) / 9.0);
  check({.top_p = 0.95}, row({0.1, 0.4, 0.2, 0.3}));
  check({.top_p = 0.3}, row({0.0, 1.0, 0.0, 0.0}));
  // Of the three best, 4/9 and 3/9 are 7/9 = 0.78: what top_k removed does not count for top_p.
  check({.top_k = 3, .top_p = 0.75}, row({0.0, 4.0, 0.0, 3.0}) / 7.0);
  // The temperature comes first: 16/30 is more than a half.
  check({.temperature = 0.5, .top_p = 0.5}, row({0.0, 1.0, 0.0, 0.0}));
  check({.temperature = 0.0}, row({0.0, 1.0, 0.0, 0.0}));
}

TEST_CASE("Sampler keeps what min_p says of the most probable token", "[model][sampling][golden]") {
  const RowVector<double> logits = log_of({0.1, 0.4, 0.2, 0.3});
  const auto check = [&](const Sampling& sampling, const RowVector<double>& expected) {
    check_close(probabilities(logits, sampling), expected, 1e-14);
  };
  check({.min_p = 0.0}, row({0.1, 0.4, 0.2, 0.3}));
  check({.min_p = 0.24}, row({0.1, 0.4, 0.2, 0.3}));
  check({.min_p = 0.26}, row({0.0, 4.0, 2.0, 3.0}) / 9.0);
  check({.min_p = 0.51}, row({0.0, 4.0, 0.0, 3.0}) / 7.0);
  check({.min_p = 1.0}, row({0.0, 1.0, 0.0, 0.0}));
  // After the temperature, whose ratios are 1/16, 1, 1/4 and 9/16; beside top_k and top_p.
  check({.temperature = 0.5, .min_p = 0.26}, row({0.0, 16.0, 0.0, 9.0}) / 25.0);
  check({.top_k = 3, .min_p = 0.6}, row({0.0, 4.0, 0.0, 3.0}) / 7.0);
  check({.top_p = 0.65, .min_p = 0.1}, row({0.0, 4.0, 0.0, 3.0}) / 7.0);
  check({.temperature = 0.0, .min_p = 1.0}, row({0.0, 1.0, 0.0, 0.0}));
  // All of several equal ones.
  check_close(probabilities(row({1.0, 1.0, 0.0}), {.min_p = 1.0}), row({0.5, 0.5, 0.0}), 1e-15);
}

TEST_CASE("Sampler makes tokens that were there before rarer", "[model][sampling][golden]") {
  // Logits 2, -1, 0, 1 with a penalty of 2 on tokens 0, 1 and 2, however often they were there:
  // 1, -2, 0, 1.
  const RowVector<double> logits = row({2.0, -1.0, 0.0, 1.0});
  const std::vector<Index> before = {1, 0, 0, 2, 1};
  Sampler<double> sampler;
  const RowVector<double> weights = row({1.0, -2.0, 0.0, 1.0}).array().exp();
  check_close(sampler.distribution(logits, {.repetition_penalty = 2.0}, before),
              weights / weights.sum(), 1e-14);
  // Before the temperature, and the choice is among the penalised logits.
  const RowVector<double> sharper = row({2.0, -4.0, 0.0, 2.0}).array().exp();
  check_close(sampler.distribution(logits, {.temperature = 0.5, .repetition_penalty = 2.0}, before),
              sharper / sharper.sum(), 1e-14);
  Rng rng(1);
  CHECK(sampler.sample(logits, {.temperature = 0.0, .repetition_penalty = 3.0}, rng, before) == 3);
  CHECK(sampler.sample(logits, {.temperature = 0.0, .repetition_penalty = 3.0}, rng) == 0);
  CHECK(sampler.sample(logits, {.temperature = 0.0}, rng, before) == 0);
  // Below one, repetition becomes likelier; what is forbidden stays so.
  CHECK(sampler.sample(logits, {.temperature = 0.0, .repetition_penalty = 0.25}, rng,
                       std::vector<int>{3}) == 3);
  const RowVector<double> forbidden = row({-kInfinity, 0.0});
  CHECK(sampler.sample(forbidden, {.repetition_penalty = 0.5}, rng, std::vector<Index>{0}) == 1);
  CHECK(test::message_of<ConfigError>([&] {
          sampler.sample(logits, {.repetition_penalty = 2.0}, rng, std::vector<Index>{0, 4});
        }) == "Sampler::sample: before[1] = 4, expected 0 <= token < 4");
}

TEST_CASE("Sampler draws as often as its distribution says", "[model][sampling]") {
  const auto sampling =
      GENERATE(Sampling{}, Sampling{.temperature = 0.7}, Sampling{.temperature = 2.5, .top_k = 5},
               Sampling{.top_p = 0.8}, Sampling{.temperature = 1.3, .top_k = 6, .top_p = 0.9});
  const RowVector<double> logits = 1.5 * test::random_matrix(1, 9, 3);
  const RowVector<double> expected = probabilities(logits, sampling);
  const RowVector<double> drawn = frequencies(logits, sampling);
  CHECK(expected.sum() == Approx(1.0));
  check_close(drawn, expected, 0.015);  // four standard deviations of the worst case, p = 1/2
  for (Index i = 0; i < expected.size(); ++i) {
    if (expected[i] == 0.0) CHECK(drawn[i] == 0.0);
  }
}

TEST_CASE("Sampler keeps the lowest index of equal logits", "[model][sampling]") {
  const RowVector<double> logits = row({0.0, 2.0, 1.0, 2.0, 2.0, 1.0});
  const RowVector<double> first = row({0.0, 1.0, 0.0, 0.0, 0.0, 0.0});
  const RowVector<double> two = row({0.0, 0.5, 0.0, 0.5, 0.0, 0.0});
  CHECK(probabilities(logits, {.temperature = 0.0}) == first);
  CHECK(probabilities(logits, {.top_k = 1}) == first);
  CHECK(probabilities(logits, {.top_k = 2}) == two);
  CHECK(probabilities(logits, {.top_p = 0.1}) == first);
  CHECK(probabilities(logits, {.top_p = 0.5}) == two);
}

TEST_CASE("Sampler keeps at least one token", "[model][sampling]") {
  const RowVector<double> logits = log_of({0.2, 0.5, 0.3});
  CHECK(probabilities(logits, {.top_p = 0.0}) == row({0.0, 1.0, 0.0}));
  CHECK(probabilities(logits, {.top_p = 1e-300}) == row({0.0, 1.0, 0.0}));
  CHECK(probabilities(row({-3.0}), {.top_k = 4, .top_p = 0.5}) == row({1.0}));
}

TEST_CASE("Sampler never draws a forbidden token", "[model][sampling]") {
  const RowVector<double> logits = row({-kInfinity, 0.0, -kInfinity, std::log(3.0), -kInfinity});
  const RowVector<double> expected = row({0.0, 0.25, 0.0, 0.75, 0.0});
  const auto sampling =
      GENERATE(Sampling{}, Sampling{.top_k = 3}, Sampling{.top_p = 0.9999}, Sampling{.top_k = 4});
  check_close(probabilities(logits, sampling), expected, 1e-15);
  check_close(frequencies(logits, sampling), expected, 0.015);
  CHECK(probabilities(logits, {.temperature = 1e300}) == row({0.0, 0.5, 0.0, 0.5, 0.0}));
}

TEST_CASE("Sampler stands extreme logits and temperatures", "[model][sampling]") {
  const RowVector<double> logits = row({-1e308, 1e308, 1e307});
  CHECK(probabilities(logits, {}) == row({0.0, 1.0, 0.0}));
  CHECK(probabilities(row({0.0, 1.0, 0.5}), {.temperature = 1e-310}) == row({0.0, 1.0, 0.0}));
  check_close(probabilities(row({0.0, 1.0, 0.5}), {.temperature = 1e300}),
              RowVector<double>::Constant(3, 1.0 / 3.0), 1e-15);
}

TEST_CASE("Sampler takes one random number a token, and none if greedy", "[model][sampling]") {
  Sampler<float> sampler;
  Rng rng(1);
  const Matrix<float> logits = test::random_matrix<float>(3, 20, 4);
  Index best = 0;
  logits.row(1).maxCoeff(&best);
  CHECK(sampler.sample(logits.row(1), {.temperature = 0.0}, rng) == best);
  CHECK(rng.position() == 0);
  sampler.sample(logits.row(1), {}, rng);
  sampler.sample(logits.row(2), {.top_k = 3}, rng);
  sampler.sample(logits.row(0), {.top_p = 0.5}, rng);
  CHECK(rng.position() == 3);
}

TEST_CASE("Sampler stops where the running sum passes the random number", "[model][sampling]") {
  const RowVector<double> logits = log_of({0.1, 0.4, 0.2, 0.3});
  Sampler<double> sampler;
  Rng rng(2);
  for (int i = 0; i < 50; ++i) {
    Rng peek = rng;
    const double u = peek.uniform();
    const Index in_order = u < 0.1 ? 0 : u < 0.5 ? 1 : u < 0.7 ? 2 : 3;
    const Index best_first = u < 4.0 / 9.0 ? 1 : u < 7.0 / 9.0 ? 3 : 2;
    const Index nucleus = u < 4.0 / 9.0 ? 1 : u < 6.0 / 9.0 ? 2 : 3;
    Rng same = rng;
    Rng again = rng;
    CHECK(sampler.sample(logits, {}, rng) == in_order);
    CHECK(sampler.sample(logits, {.top_k = 3}, same) == best_first);
    CHECK(sampler.sample(logits, {.top_p = 0.85}, again) == nucleus);
  }
}

TEST_CASE("Sampler depends on the seed alone, not on what it did before", "[model][sampling]") {
  const Matrix<float> logits = test::random_matrix<float>(1, 50, 5);
  const auto sampling = GENERATE(Sampling{}, Sampling{.top_k = 20}, Sampling{.top_p = 0.7});
  Sampler<float> used;
  Sampler<float> fresh;
  Rng warm_up(3);
  used.sample(test::random_matrix<float>(1, 80, 6), {.top_k = 40, .top_p = 0.9}, warm_up);
  used.distribution(logits, {.temperature = 3.0});
  Rng a(8);
  Rng b(8);
  for (int i = 0; i < 20; ++i) {
    CHECK(used.sample(logits, sampling, a) == fresh.sample(logits, sampling, b));
  }
}

TEST_CASE("Sampler agrees with sorting the whole vocabulary", "[model][sampling]") {
  const Matrix<double> logits = test::random_matrix(1, 300, 9);
  const auto k = GENERATE(as<Index>{}, 0, 1, 30, 299);
  const auto top_p = GENERATE(0.05, 0.5, 0.99);
  std::vector<Index> order(300);
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<Index>(i);
  std::sort(order.begin(), order.end(), [&](Index a, Index b) { return logits(a) > logits(b); });
  if (k > 0) order.resize(static_cast<std::size_t>(k));
  double total = 0.0;
  for (const Index token : order) total += std::exp(logits(token));
  RowVector<double> expected = RowVector<double>::Zero(300);
  double sum = 0.0;
  for (const Index token : order) {
    if (sum >= top_p * total) break;
    expected[token] = std::exp(logits(token));
    sum += expected[token];
  }
  check_close(probabilities(logits, {.top_k = k, .top_p = top_p}), expected / sum, 1e-14);
}

TEST_CASE("Sampler finds the nucleus of flat, steep and tied logits", "[model][sampling]") {
  constexpr Index kVocabulary = 3000;
  const Matrix<float> draws = test::random_matrix<float>(1, kVocabulary, 4);
  for (const float steepness : {0.0F, 1e-6F, 0.01F, 1.0F, 30.0F, 1e4F}) {
    // Every third logit is the same as its neighbour's.
    Matrix<float> logits = steepness * draws;
    for (Index i = 1; i < kVocabulary; i += 3) logits(0, i) = logits(0, i - 1);
    std::vector<Index> order(kVocabulary);
    std::iota(order.begin(), order.end(), Index{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](Index a, Index b) { return logits(a) > logits(b); });
    std::vector<double> weights;
    double total = 0.0;
    for (const Index token : order) {
      weights.push_back(
          std::exp(static_cast<double>(logits(token)) - static_cast<double>(logits(order[0]))));
      total += weights.back();
    }
    for (const double top_p : {0.0, 0.001, 0.3, 0.9, 0.999}) {
      Sampler<float> sampler;
      const RowVector<float> p = sampler.distribution(logits, {.top_p = top_p});
      const auto kept = static_cast<std::size_t>((p.array() > 0.0F).count());
      INFO("steepness " << steepness << " top_p " << top_p << " kept " << kept);
      REQUIRE(kept >= 1);
      // The most probable ones, as few as reach the share, to rounding.
      double sum = 0.0;
      for (std::size_t i = 0; i < kept; ++i) {
        CHECK(p[order[i]] > 0.0F);
        sum += weights[i];
      }
      CHECK(sum >= top_p * total * (1.0 - 1e-12));
      if (kept > 1) CHECK(sum - weights[kept - 1] < top_p * total * (1.0 + 1e-12));
    }
  }
}

TEST_CASE("Sampler refuses logits that are not numbers", "[model][sampling]") {
  Sampler<double> sampler;
  Rng rng(1);
  const auto message = [&](const RowVector<double>& logits, const Sampling& sampling) {
    return test::message_of<NonFiniteError>([&] { sampler.sample(logits, sampling, rng); });
  };
  const auto sampling = GENERATE(Sampling{}, Sampling{.temperature = 0.0}, Sampling{.top_k = 1},
                                 Sampling{.top_p = 0.5});
  CHECK(message(row({1.0, 2.0, std::nan("")}), sampling) ==
        "Sampler::sample: logits[2] = nan, expected finite or -inf");
  CHECK(message(row({1.0, kInfinity}), sampling) ==
        "Sampler::sample: logits[1] = inf, expected finite or -inf");
  CHECK(message(row({-kInfinity, -kInfinity}), sampling) ==
        "Sampler::sample: all 2 logits are -inf, expected at least one finite");
  CHECK(rng.position() == 0);
}

TEST_CASE("Sampler refuses impossible settings and shapes", "[model][sampling]") {
  Sampler<double> sampler;
  Rng rng(1);
  const auto message = [&](const Sampling& sampling) {
    return test::message_of<ConfigError>([&] { sampler.sample(row({1.0}), sampling, rng); });
  };
  CHECK(message({.temperature = -1.0}) ==
        "Sampling: temperature = -1, expected a finite number >= 0");
  CHECK(message({.temperature = kInfinity}) ==
        "Sampling: temperature = inf, expected a finite number >= 0");
  CHECK(message({.top_k = -2}) == "Sampling: top_k = -2, expected >= 0");
  CHECK(message({.top_p = std::nan("")}) == "Sampling: top_p = nan, expected 0 <= top_p <= 1");
  CHECK(message({.top_p = 1.5}) == "Sampling: top_p = 1.5, expected 0 <= top_p <= 1");
  CHECK(message({.min_p = -0.5}) == "Sampling: min_p = -0.5, expected 0 <= min_p <= 1");
  CHECK(message({.repetition_penalty = 0.0}) ==
        "Sampling: repetition_penalty = 0, expected a finite number > 0");
  CHECK(test::message_of<ShapeError>([&] { sampler.sample(Matrix<double>(2, 4), {}, rng); }) ==
        "Sampler::sample: logits is [2, 4], expected [1, vocabulary]");
  CHECK(test::message_of<ShapeError>([&] { sampler.distribution(Matrix<double>(1, 0), {}); }) ==
        "Sampler::distribution: logits is [1, 0], expected [1, vocabulary]");
}

}  // namespace weir::sampling_test
