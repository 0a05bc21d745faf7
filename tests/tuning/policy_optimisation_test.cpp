// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <vector>

#include <weir/tuning/policy_optimisation.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::policy_optimisation_test {

namespace {

using Ids = std::vector<Index>;
using Batch = PolicyBatch<double>;

constexpr Index kVocab = 5;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Three answers of different lengths, whose policy has moved since they were drawn.
struct Case {
  Batch batch;
  Matrix<double> logits = test::random_matrix(9, kVocab, 1);

  Case() {
    batch.add(Ids{1, 2, 3}, Ids{4, 0}, 1.5);
    batch.add(Ids{0}, Ids{3, 3, 2}, -0.7);
    batch.add(Ids{2}, Ids{1, 4}, 0.2);
    batch.set_old(logits + test::random_matrix(9, kVocab, 4));
    batch.set_reference(logits + 0.5 * test::random_matrix(9, kVocab, 3));
  }
};

double loss_of(const PolicyLoss<double>& loss, const Case& c) {
  PolicyLoss<double>::Cache cache;
  return loss.forward(c.logits, c.batch, cache);
}

}  // namespace

TEST_CASE("Advantages are the rewards of a group in standard deviations", "[tuning][policy]") {
  // Mean 2 and squares 1 + 0 + 1 over G - 1 = 2: a deviation of 1. Mean 0.25, deviation 0.5.
  const std::vector<double> rewards = {1, 2, 3, 7, 7, 7};
  CHECK(group_advantages(rewards, 3) == std::vector<double>{-1, 0, 1, 0, 0, 0});
  CHECK(group_advantages(std::vector<double>{0, 0, 1, 0}, 4)[2] == Approx(1.5));
  CHECK(group_advantages({}, 2).empty());
  const std::vector<double> equal(7, 0.1);
  CHECK(group_advantages(equal, 7) == std::vector<double>(7, 0.0));

  // Neither a shift nor a factor changes them, and other groups do not matter.
  const auto of_first = group_advantages(std::vector<double>{3, -1, 0, 5}, 2);
  const auto moved = group_advantages(std::vector<double>{16, 8, 10, 110}, 2);
  for (std::size_t i = 0; i < 4; ++i) CHECK(of_first[i] == Approx(moved[i]));
}

TEST_CASE("PolicyBatch learns answers, not questions", "[tuning][policy]") {
  Batch batch;
  const std::vector<double> old = {-0.5, -0.25};
  batch.add(Ids{1, 2, 3}, Ids{4, 0}, 1.5, old);
  batch.add(Ids{2}, std::vector<int>{1}, -2.0, std::span(old).first(1));
  CHECK(batch.ids == Ids{1, 2, 3, 4, 2});
  CHECK(batch.targets == Ids{kNoTarget, kNoTarget, 4, 0, 1});
  CHECK(batch.share == std::vector<double>{0, 0, 0.5, 0.5, 1});
  CHECK(batch.advantage == std::vector<double>{1.5, 1.5, 1.5, 1.5, -2});
  CHECK(batch.old == std::vector<double>{0, 0, -0.5, -0.25, -0.5});
  CHECK(batch.answers() == 2);
  CHECK(batch.sequences.length(0) == 4);
  batch.clear();
  CHECK((batch.ids.empty() && batch.old.empty() && batch.answers() == 0));
}

TEST_CASE("PolicyLoss matches values computed apart", "[tuning][policy][golden]") {
  // Computed in Python with 60 digits from eq. 3 and 4 of arXiv:2402.03300; ratios 1.295, 1.072,
  // 0.898 and, clipped since its advantage is negative, 0.319.
  Batch batch;
  batch.add(Ids{7}, Ids{2, 0}, 1.5, std::vector<double>{-0.5, -0.4});
  batch.add(Ids{7, 7}, Ids{1, 2}, -0.75, std::vector<double>{-0.3, -1.0});
  batch.reference = {-0.2, -0.9, 0.0, -0.6, -2.5};
  Matrix<double> logits(5, 3);
  logits << 0.5, -1.0, 2.0, 1.5, 0.25, -0.75, -0.5, 0.0, 0.5, 0.0, 1.0, -1.0, 2.0, -2.0, 0.0;
  Matrix<double> expected(5, 3);
  expected << 0.08532537934748426, 0.019038665558529688, -0.10436404490601393, -0.11010891364511434,
      0.08049606590389123, 0.0296128477412231, 0.0, 0.0, 0.0, -0.04227609996636745,
      0.05782860799690274, -0.01555250803053529, -0.006507066812117536, -0.0001191810859556115,
      0.006626247898073148;
  const PolicyLoss<double> loss({.clip_high = 0.3, .kl = 0.1});
  PolicyLoss<double>::Cache cache;
  CHECK(loss.forward(logits, batch, cache) == Approx(-0.56400340622631671).epsilon(1e-14));
  CHECK(cache.surrogate == Approx(-0.56926008906780042).epsilon(1e-14));
  CHECK(cache.kl == Approx(0.052566828414837053).epsilon(1e-13));
  CHECK(cache.clipped == 0.25);
  CHECK(cache.largest_ratio == Approx(1.2952305411262834));
  CHECK(test::relative_error(loss.backward(cache), expected) <= 1e-13);
}

TEST_CASE("PolicyLoss has the gradient of finite differences", "[tuning][policy][gradient]") {
  // Each part alone, and all of them: ratios that nothing clips, ratios most of which are clipped
  // on one side or the other, and the distance to the reference.
  const auto config = GENERATE(as<PolicyLossConfig>{},
                               PolicyLossConfig{.clip_low = 0.999, .clip_high = 100.0, .kl = 0.0},
                               PolicyLossConfig{.clip_low = 0.1, .clip_high = 0.1, .kl = 0.0},
                               PolicyLossConfig{.clip_low = 0.1, .clip_high = 0.3, .kl = 0.5});
  const auto sign = GENERATE(1.0, -1.0);
  Case c;
  for (double& advantage : c.batch.advantage) advantage *= sign;
  const PolicyLoss<double> loss(config);
  PolicyLoss<double>::Cache cache;
  loss.forward(c.logits, c.batch, cache);
  if (config.clip_low == 0.1) CHECK((cache.clipped > 0.1 && cache.clipped < 0.9));
  const Matrix<double> analytic = loss.backward(cache, 2.5);
  const Matrix<double> numeric =
      test::numeric_gradient(c.logits, [&] { return 2.5 * loss_of(loss, c); });
  CHECK(test::relative_error(analytic, numeric) <= 1e-6);
  CHECK(analytic.topRows(2).isZero(0.0));  // Of a question.
}

TEST_CASE("A policy that has not moved has the gradient of REINFORCE", "[tuning][policy]") {
  Case c;
  c.batch.set_old(c.logits);
  c.batch.set_reference(c.logits);
  const PolicyLoss<double> loss({.kl = 7.0});
  PolicyLoss<double>::Cache cache;
  // Each answer counts its advantage, whatever its length.
  CHECK(loss.forward(c.logits, c.batch, cache) == Approx(-(1.5 - 0.7 + 0.2) / 3.0));
  CHECK(cache.kl == 0.0);
  CHECK(cache.drift == 0.0);
  CHECK(cache.clipped == 0.0);
  CHECK(cache.largest_ratio == 1.0);
  for (Index t = 2; t < 9; ++t) {
    const auto at = static_cast<std::size_t>(t);
    CHECK(cache.d_log_p[t] == Approx(-c.batch.advantage[at] * c.batch.share[at] / 3.0));
  }
}

TEST_CASE("The clip stops a ratio only where the advantage pushes it on", "[tuning][policy]") {
  const auto advantage = GENERATE(1.0, -1.0);
  const auto log_ratio = GENERATE(-1.0, 0.0, 1.0);
  Batch batch;
  batch.add(Ids{0}, Ids{1}, advantage, std::vector<double>{-log_ratio - std::log(3.0)});
  const PolicyLoss<double> loss({.clip_low = 0.2, .clip_high = 0.4, .kl = 0.0});
  PolicyLoss<double>::Cache cache;
  const double value = loss.forward(Matrix<double>::Zero(1, 3), batch, cache);
  const bool stopped = log_ratio * advantage > 0.0;
  CHECK(cache.clipped == (stopped ? 1.0 : 0.0));
  CHECK(loss.backward(cache).isZero(0.0) == stopped);
  const double ratio = stopped ? (advantage > 0.0 ? 1.4 : 0.8) : std::exp(log_ratio);
  CHECK(value == Approx(-ratio * advantage));
}

TEST_CASE("A ratio on the edge of the clip has its gradient", "[tuning][policy]") {
  Batch batch;
  batch.add(Ids{0}, Ids{1}, 1.0, std::vector<double>{-std::log(2.0)});
  const PolicyLoss<double> loss({.clip_high = 0.0, .kl = 0.0});  // The ratio is 1.
  PolicyLoss<double>::Cache cache;
  loss.forward(Matrix<double>::Zero(1, 2), batch, cache);
  CHECK(cache.d_log_p[0] == Approx(-1.0));
}

TEST_CASE("KL is never negative, and estimates the divergence without bias", "[tuning][policy]") {
  // Each token once, weighted by its probability: the mean of the estimates is the divergence.
  const Matrix<double> policy = test::random_matrix(1, kVocab, 5);
  const Matrix<double> reference = test::random_matrix(1, kVocab, 6);
  const PolicyLoss<double> loss({.kl = 1.0});
  PolicyLoss<double>::Cache cache;
  double mean = 0.0, divergence = 0.0;
  for (Index token = 0; token < kVocab; ++token) {
    Batch batch;
    batch.add(Ids{0}, Ids{token}, 0.0);
    batch.set_old(policy);
    batch.set_reference(reference);
    loss.forward(policy, batch, cache);
    CHECK(cache.kl >= 0.0);
    const double p = std::exp(batch.old[0]);
    mean += p * cache.kl;
    divergence += p * (batch.old[0] - batch.reference[0]);
  }
  CHECK(mean == Approx(divergence));
}

TEST_CASE("PolicyLoss of parts adds up to that of the batch", "[tuning][policy]") {
  Case c;
  const PolicyLoss<double> loss;
  PolicyLoss<double>::Cache cache;
  const double whole = loss.forward(c.logits, c.batch, cache);
  const Matrix<double> gradient = loss.backward(cache);
  Batch part;
  part.add(Ids{1, 2, 3}, Ids{4, 0}, 1.5, std::span<const double>(c.batch.old).subspan(2, 2));
  part.reference.assign(c.batch.reference.begin(), c.batch.reference.begin() + 4);
  const double first = loss.forward(c.logits.topRows(4), part, cache, 3);
  CHECK(test::relative_error(loss.backward(cache), gradient.topRows(4)) <= 1e-14);
  part.clear();
  part.add(Ids{0}, Ids{3, 3, 2}, -0.7, std::span<const double>(c.batch.old).subspan(4, 3));
  part.add(Ids{2}, Ids{1, 4}, 0.2, std::span<const double>(c.batch.old).subspan(7, 2));
  part.reference.assign(c.batch.reference.begin() + 4, c.batch.reference.end());
  CHECK(first + loss.forward(c.logits.bottomRows(5), part, cache, 3) == Approx(whole));
  CHECK(test::relative_error(loss.backward(cache), gradient.bottomRows(5)) <= 1e-14);
}

TEST_CASE("PolicyLoss of nothing is zero", "[tuning][policy]") {
  const PolicyLoss<float> loss;
  PolicyLoss<float>::Cache cache;
  CHECK(loss.forward(Matrix<float>(0, 3), {}, cache) == 0.F);
  CHECK(loss.backward(cache).rows() == 0);
}

TEST_CASE("PolicyLoss allocates nothing once it is warm, and has the same bits on two threads",
          "[tuning][policy]") {
  PolicyBatch<float> batch;
  for (Index i = 0; i < 40; ++i)
    batch.add(Ids{i, 3}, Ids{5, i, 7}, static_cast<double>(i % 3) - 1.0);
  const Matrix<float> logits = test::random_matrix<float>(160, 101, 1);
  batch.set_old(test::random_matrix<float>(160, 101, 2));
  batch.set_reference(test::random_matrix<float>(160, 101, 3));
  const PolicyLoss<float> loss;
  PolicyLoss<float>::Cache cache;
  const float value = loss.forward(logits, batch, cache);
  const Matrix<float> gradient = loss.backward(cache);
  CHECK(test::count_allocations([&] {
          loss.forward(logits, batch, cache);
          loss.backward(cache);
        }) == 0);
  const test::Threads threads(2);
  CHECK(loss.forward(logits, batch, cache) == value);
  CHECK(loss.backward(cache) == gradient);
}

TEST_CASE("Policy optimisation says what is wrong", "[tuning][policy]") {
  const auto config = [](PolicyLossConfig c) {
    return test::message_of<ConfigError>([&] { PolicyLoss<double>{c}; });
  };
  CHECK(config({.clip_low = 1.0}) == "PolicyLoss: clip_low = 1, expected 0 <= clip_low < 1");
  CHECK(config({.clip_high = -0.1}) ==
        "PolicyLoss: clip_high = -0.1, expected a finite number >= 0");
  CHECK(config({.kl = kNan}) == "PolicyLoss: kl = nan, expected a finite number >= 0");

  const auto advantages = [](const std::vector<double>& rewards, Index group) {
    return test::message_of<std::logic_error>([&] { group_advantages(rewards, group); });
  };
  CHECK(advantages({1.0}, 1) == "group_advantages: group = 1, expected >= 2");
  CHECK(advantages({1.0, 2.0, 3.0}, 2) ==
        "group_advantages: there are 3 rewards, expected a multiple of group = 2");
  CHECK(advantages({1.0, kNan}, 2) ==
        "group_advantages: rewards[1] = nan, expected a finite number");

  Case c;
  const auto add = [&](const Ids& question, const Ids& answer, double advantage,
                       const std::vector<double>& old) {
    return test::message_of<std::logic_error>(
        [&] { c.batch.add(question, answer, advantage, old); });
  };
  CHECK(add({}, {1}, 0.0, {}) == "PolicyBatch::add: question.count() = 0, expected >= 1");
  CHECK(add({1}, {}, 0.0, {}) == "PolicyBatch::add: answer.count() = 0, expected >= 1");
  CHECK(add({1}, {1}, kNan, {}) ==
        "PolicyBatch::add: answer_advantage = nan, expected a finite number");
  CHECK(add({1}, {1, 2}, 0.0, {-1.0}) ==
        "PolicyBatch::add: old_log_p has 1 entries, expected 2 (one per token of the answer)");
  CHECK(c.batch.answers() == 3);

  const PolicyLoss<double> loss;
  PolicyLoss<double>::Cache cache;
  CHECK(test::message_of<StateError>([&] { loss.backward(cache); }) ==
        "PolicyLoss::backward: the cache is empty, expected a forward pass that succeeded");
  const auto forward = [&](const Batch& batch, const Matrix<double>& logits, Index answers = 0) {
    return test::message_of<std::logic_error>([&] { loss.forward(logits, batch, cache, answers); });
  };
  CHECK(forward(c.batch, c.logits.topRows(8)) ==
        "PolicyLoss::forward: batch.targets has 9 entries, expected 8 (one per row of logits)");
  Batch batch = c.batch;
  batch.reference.clear();
  CHECK(forward(batch, c.logits) ==
        "PolicyLoss::forward: batch.reference has 0 entries, expected 9 (one per row of logits)");
  CHECK(forward(c.batch, c.logits, -1) == "PolicyLoss::forward: answers = -1, expected >= 0");
  CHECK(forward(c.batch, c.logits.leftCols(4)) ==
        "PolicyLoss::forward: targets[2] = 4, expected 0 <= target < 4 or -100");
  batch = c.batch;
  batch.old[8] = -1000.0;
  batch.advantage[8] = -1.0;
  CHECK(forward(batch, c.logits).starts_with("PolicyLoss::forward: row 8 has log p "));
  CHECK_THROWS_AS(loss.backward(cache), StateError);
  Matrix<double> logits = c.logits;
  logits(0, 0) = kNan;  // Of a question: nobody looks at it.
  CHECK(forward(c.batch, logits) == "no exception");
  logits(3, 1) = kNan;
  CHECK(forward(c.batch, logits) ==
        "PolicyLoss::forward: token 0 has the log-probability nan in row 3, expected finite");
}

}  // namespace weir::policy_optimisation_test
