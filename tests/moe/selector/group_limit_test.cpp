// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <weir/moe/selector/group_limit.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "moe/selector/selected.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::group_limit_test {

namespace {

constexpr double kGone = -std::numeric_limits<double>::infinity();

std::vector<double> candidates(const GroupLimit& groups, const std::vector<double>& scores) {
  const auto experts = static_cast<Index>(scores.size());
  const double* const left = groups.candidates(scores.data(), experts);
  return {left, left + experts};
}

/// The same by sorting the groups.
std::vector<double> reference(const GroupLimit& groups, std::vector<double> scores) {
  const auto size = static_cast<std::ptrdiff_t>(scores.size()) / groups.count;
  std::vector<double> of_group;
  for (Index g = 0; g < groups.count; ++g) {
    std::vector<double> own(scores.begin() + g * size, scores.begin() + (g + 1) * size);
    std::sort(own.rbegin(), own.rend());
    of_group.push_back(std::accumulate(own.begin(), own.begin() + groups.summed, 0.0));
  }
  std::vector<Index> order(of_group.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) {
    return of_group[static_cast<std::size_t>(a)] > of_group[static_cast<std::size_t>(b)];
  });
  for (auto g = order.begin() + groups.allowed; g != order.end(); ++g) {
    std::fill_n(scores.begin() + *g * size, size, kGone);
  }
  return scores;
}

}  // namespace

TEST_CASE("GroupLimit keeps the groups worked out by hand", "[moe][selector][group_limit]") {
  const std::vector<double> scores = {0.1, 0.9, 0.6, 0.5, 0.0, 0.7};
  // By the maximum 0.9, 0.6, 0.7; by the sum of two 1.0, 1.1, 0.7.
  CHECK(candidates({.count = 3, .allowed = 1}, scores) ==
        std::vector<double>{0.1, 0.9, kGone, kGone, kGone, kGone});
  CHECK(candidates({.count = 3, .allowed = 1, .summed = 2}, scores) ==
        std::vector<double>{kGone, kGone, 0.6, 0.5, kGone, kGone});
  CHECK(candidates({.count = 3, .allowed = 2}, scores) ==
        std::vector<double>{0.1, 0.9, kGone, kGone, 0.0, 0.7});
  CHECK(candidates({.count = 3, .allowed = 2, .summed = 2}, scores) ==
        std::vector<double>{0.1, 0.9, 0.6, 0.5, kGone, kGone});
}

TEST_CASE("GroupLimit gives scores back untouched where it does not limit",
          "[moe][selector][group_limit]") {
  const std::vector<double> scores = {0.1, 0.9, 0.6, 0.5};
  CHECK(GroupLimit{}.candidates(scores.data(), 4) == scores.data());
  CHECK(GroupLimit{.count = 2, .allowed = 2, .summed = 2}.candidates(scores.data(), 4) ==
        scores.data());
}

TEST_CASE("GroupLimit prefers the first of equal groups", "[moe][selector][group_limit]") {
  const Index allowed = GENERATE(1, 2, 3);
  const std::vector<double> equal(8, -0.5);
  const auto left = candidates({.count = 4, .allowed = allowed, .summed = 2}, equal);
  for (Index e = 0; e < 8; ++e) {
    CHECK((left[static_cast<std::size_t>(e)] == -0.5) == (e < 2 * allowed));
  }
}

TEST_CASE("GroupLimit takes forbidden experts and groups of nothing else",
          "[moe][selector][group_limit]") {
  CHECK(candidates({.count = 2, .allowed = 1}, {kGone, kGone, kGone, -3.0}) ==
        std::vector<double>{kGone, kGone, kGone, -3.0});
  CHECK(candidates({.count = 2, .allowed = 1, .summed = 2}, {kGone, 5.0, -4.0, -3.0}) ==
        std::vector<double>{kGone, kGone, -4.0, -3.0});
}

TEST_CASE("GroupLimit agrees with sorting the groups", "[moe][selector][group_limit]") {
  Rng rng(1);
  for (int i = 0; i < 300; ++i) {
    const Index count = 1 + rng.below(9);
    const Index size = 1 + rng.below(12);
    const GroupLimit groups = {
        .count = count, .allowed = 1 + rng.below(count), .summed = 1 + rng.below(size)};
    std::vector<double> scores;
    for (Index e = 0; e < count * size; ++e) {
      scores.push_back(static_cast<double>(rng.below(5)) - 2.0);  // Many ties.
    }
    INFO(count << " groups of " << size << ", " << groups.allowed << " allowed");
    CHECK(candidates(groups, scores) == reference(groups, scores));
  }
}

TEST_CASE("Selectors choose from the groups that are allowed", "[moe][selector][group_limit]") {
  const Index summed = GENERATE(1, 2);
  const GroupLimit groups = {.count = 4, .allowed = 2, .summed = summed};
  const Matrix<double> logits = test::random_matrix(40, 16, 2);
  const auto check = [&](const auto& selector, const auto& unlimited) {
    const Routing<double> routing = test::route(selector, logits);
    CHECK(routing.probabilities == test::route(unlimited, logits).probabilities);
    for (Index t = 0; t < 40; ++t) {
      std::vector<Index> visited;
      for (const Index e : routing.experts_of(t)) visited.push_back(e / 4);
      std::sort(visited.begin(), visited.end());
      CHECK(std::unique(visited.begin(), visited.end()) - visited.begin() <= 2);
    }
  };
  check(SoftmaxTopK<double>({.k = 4, .groups = groups}), SoftmaxTopK<double>({.k = 4}));
  check(TopKSoftmax<double>({.k = 4, .groups = groups}), TopKSoftmax<double>({.k = 4}));
  check(SigmoidTopK<double>(16, {.k = 4, .groups = groups}), SigmoidTopK<double>(16, {.k = 4}));
}

TEST_CASE("SigmoidTopK limits groups by biased scores, also negative ones",
          "[moe][selector][group_limit]") {
  // Scores 1/2 each; biased -1/2, -1/4 | -3, 1/8 | -3, -3. By the sum of two the first group wins:
  // with 0 in place of -infinity experts of other groups would come before its own.
  SigmoidTopK<double> selector(6, {.k = 2, .groups = {.count = 3, .allowed = 1, .summed = 2}});
  selector.selection_bias().value << -1.0, -0.75, -3.5, -0.375, -3.5, -3.5;
  const Routing<double> routing = test::route(selector, Matrix<double>::Zero(1, 6));
  CHECK(routing.expert == std::vector<Index>{1, 0});
  CHECK(routing.weight == std::vector<double>{0.5, 0.5});
}

TEST_CASE("Gradients with a group limit agree with finite differences",
          "[moe][selector][group_limit][gradient]") {
  const GroupLimit groups = {.count = 3, .allowed = 2, .summed = 2};
  const Matrix<double> logits = test::random_matrix(5, 9, 3);
  const auto check = [&](const auto& selector) { test::check_selector_gradient(selector, logits); };
  check(SoftmaxTopK<double>({.k = 3, .scale = 16.0, .groups = groups}));
  check(TopKSoftmax<double>({.k = 3, .groups = groups}));
  check(SigmoidTopK<double>(9, {.k = 3, .scale = 2.5, .groups = groups}));
}

TEST_CASE("GroupLimit names the setting that does not fit", "[moe][selector][group_limit]") {
  const auto message = [](const GroupLimit& groups, Index k) {
    return test::message_of<ConfigError>([&] { groups.check("Selector", 16, k); });
  };
  CHECK(message({.count = 0}, 2) == "Selector: groups.count = 0, expected >= 1");
  CHECK(message({.count = 3}, 2) ==
        "Selector: groups.count = 3, expected a divisor of experts = 16");
  CHECK(message({.count = 4, .allowed = 5}, 2) ==
        "Selector: groups.allowed = 5, expected 1 <= allowed <= groups.count = 4");
  CHECK(message({.count = 4, .allowed = 0}, 2) ==
        "Selector: groups.allowed = 0, expected 1 <= allowed <= groups.count = 4");
  CHECK(message({.count = 4, .allowed = 2, .summed = 5}, 2) ==
        "Selector: groups.summed = 5, expected 1 <= summed <= experts / groups.count = 4");
  CHECK(message({.count = 4, .allowed = 2}, 9) ==
        "Selector: k = 9, expected k <= 8, the experts of 2 groups");
  CHECK(message({.count = 4, .allowed = 2}, 8) == "no exception");
  CHECK(test::message_of<ConfigError>([] {
          SoftmaxTopK<double>({.groups = {.count = 3}}).check(16);
        }) == "SoftmaxTopK: groups.count = 3, expected a divisor of experts = 16");
  CHECK(test::message_of<ConfigError>([] {
          TopKSoftmax<double>({.groups = {.count = 3}}).check(16);
        }) == "TopKSoftmax: groups.count = 3, expected a divisor of experts = 16");
  CHECK(test::message_of<ConfigError>([] {
          const SigmoidTopK<double> made(16, {.groups = {.count = 3}});
        }) == "SigmoidTopK: groups.count = 3, expected a divisor of experts = 16");
}

}  // namespace weir::group_limit_test
