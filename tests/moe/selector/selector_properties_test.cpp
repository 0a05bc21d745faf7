// SPDX-License-Identifier: MIT
// What holds for every selector, whatever the sizes: thousands of random configurations.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include <weir/core/init.hpp>
#include <weir/moe/selector/biased_probability_top_k.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/expert_choice.hpp>
#include <weir/moe/selector/hierarchical_top_k.hpp>
#include <weir/moe/selector/relaxed_top_k.hpp>
#include <weir/moe/selector/relu_routing.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/sinkhorn.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/sparse_mixer.hpp>
#include <weir/moe/selector/straight_through.hpp>
#include <weir/moe/selector/threshold.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/moe/selector/top_p.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::selector_properties_test {

namespace {

constexpr int kDraws = 400;

/// What the weights of a token have to sum to, where that is a convention.
enum class Sum { kOne, kAtMostOne, kAny };

struct Setting {
  explicit Setting(std::uint64_t seed) : rng(seed) {
    experts = 2 + rng.below(15);
    k = 1 + rng.below(experts);
    const Index tokens = rng.below(12);
    logits = normal_init<double>(tokens, experts, 2.0, rng);
    for (Index t = 0; t < tokens; ++t) mask.push_back(rng.uniform() < 0.8 ? 1 : 0);
  }

  Rng rng;
  Index experts = 0, k = 0;
  Matrix<double> logits;
  std::vector<std::uint8_t> mask;
};

/// The weight of each expert for each token, [tokens, experts].
Matrix<double> dense(const Routing<double>& routing) {
  Matrix<double> weights = Matrix<double>::Zero(routing.tokens(), routing.experts());
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      weights(t, routing.expert[a]) += routing.weight[a];
    }
  }
  return weights;
}

bool experts_differ(const Routing<double>& routing, Index t) {
  std::vector<Index> chosen(routing.expert.begin() + routing.first(t),
                            routing.expert.begin() + routing.last(t));
  std::sort(chosen.begin(), chosen.end());
  const bool in_range =
      chosen.empty() || (chosen.front() >= 0 && chosen.back() < routing.experts());
  return in_range && std::adjacent_find(chosen.begin(), chosen.end()) == chosen.end();
}

/// Calls `make(setting)` for a selector in each of many settings, and checks what it does.
/// \param fixed_k   Whether each token gets exactly k experts.
template <class Make>
void check_selector(Make&& make, Sum sum, bool fixed_k) {
  for (std::uint64_t seed = 1; seed <= kDraws; ++seed) {
    INFO("seed " << seed);
    Setting s(seed);
    const auto selector = make(s);
    const Routing<double> routing = test::route(selector, s.logits, {.mask = s.mask});
    const Matrix<double> weights = dense(routing);
    for (Index t = 0; t < routing.tokens(); ++t) {
      const Index count = routing.last(t) - routing.first(t);
      const bool padding = s.mask[static_cast<std::size_t>(t)] == 0;
      REQUIRE(experts_differ(routing, t));
      if (fixed_k) REQUIRE(count == (padding ? 0 : s.k));
      if (padding) {
        REQUIRE(count == 0);
        REQUIRE(routing.probabilities.row(t).isZero(0.0));
        continue;
      }
      REQUIRE(weights.row(t).minCoeff() >= 0.0);
      if (sum == Sum::kOne) REQUIRE(weights.row(t).sum() == Approx(1.0));
      if (sum == Sum::kAtMostOne) REQUIRE(weights.row(t).sum() <= 1.0 + 1e-12);
      const double belief = routing.probabilities.row(t).sum();
      REQUIRE((std::abs(belief - 1.0) <= 1e-9 || (count == 0 && belief == 0.0)));
    }

    // The tokens in the opposite order.
    const Matrix<double> reversed = s.logits.colwise().reverse();
    const std::vector<std::uint8_t> reversed_mask(s.mask.rbegin(), s.mask.rend());
    const Matrix<double> other = dense(test::route(selector, reversed, {.mask = reversed_mask}));
    REQUIRE(test::relative_error(Matrix<double>(other.colwise().reverse()), weights) <= 1e-12);
  }
}

}  // namespace

TEST_CASE("Token-choice selectors keep their conventions in any setting", "[moe][selector]") {
  check_selector([](const Setting& s) { return TopKSoftmax<double>({.k = s.k}); }, Sum::kOne, true);
  check_selector([](const Setting& s) { return SoftmaxTopK<double>({.k = s.k}); }, Sum::kAtMostOne,
                 true);
  check_selector(
      [](const Setting& s) { return SoftmaxTopK<double>({.k = s.k, .renormalise = true}); },
      Sum::kOne, true);
  check_selector([](const Setting& s) { return SigmoidTopK<double>(s.experts, {.k = s.k}); },
                 Sum::kOne, true);
  check_selector([](const Setting& s) { return RelaxedTopK<double>({.k = s.k}); }, Sum::kOne, true);
  check_selector(
      [](const Setting& s) { return StraightThrough<double>({.k = s.k, .renormalise = true}); },
      Sum::kOne, true);
  check_selector(  // Groups of one expert, k of them.
      [](const Setting& s) {
        return HierarchicalTopK<double>({.groups = s.experts, .group_k = s.k, .k = 1});
      },
      Sum::kOne, true);
  check_selector(
      [](Setting& s) {
        BiasedSoftmaxTopK<double> selector(s.experts, {.k = s.k});
        selector.selection_bias().value = normal_init<double>(1, s.experts, 0.3, s.rng);
        return selector;
      },
      Sum::kAtMostOne, true);
  check_selector(
      [](Setting& s) {
        BiasedProbabilityTopK<double> selector(s.experts, {.k = s.k});
        selector.selection_bias().value = normal_init<double>(1, s.experts, 0.3, s.rng);
        return selector;
      },
      Sum::kOne, true);
}

TEST_CASE("Selectors of variable k keep their conventions in any setting", "[moe][selector]") {
  check_selector([](Setting& s) { return TopP<double>({.threshold = s.rng.uniform(0.1, 1.0)}); },
                 Sum::kAtMostOne, false);
  check_selector(
      [](Setting& s) {
        return Threshold<double>({.k = s.k, .k_min = 1, .threshold = s.rng.uniform()});
      },
      Sum::kAtMostOne, false);
  check_selector([](const Setting&) { return ReluRouting<double>(); }, Sum::kAny, false);
  check_selector([](Setting& s) { return SparseMixer<double>({.epsilon = s.rng.uniform()}); },
                 Sum::kAny, false);
}

TEST_CASE("Selectors that look at the batch do not depend on the order of its tokens",
          "[moe][selector]") {
  check_selector([](const Setting&) { return ExpertChoice<double>(); }, Sum::kAny, false);
  check_selector([](const Setting& s) { return Sinkhorn<double>({.k = s.k}); }, Sum::kAny, true);
}

TEST_CASE("With k = experts the choice is the dense mixture", "[moe][selector]") {
  for (std::uint64_t seed = 1; seed <= kDraws; ++seed) {
    INFO("seed " << seed);
    const Setting s(seed);
    const Matrix<double> p = softmax<double>(s.logits);
    const auto error = [&](const auto& selector) {
      return test::relative_error(dense(test::route(selector, s.logits)), p);
    };
    REQUIRE(error(TopKSoftmax<double>({.k = s.experts})) <= 1e-14);
    REQUIRE(error(SoftmaxTopK<double>({.k = s.experts})) <= 1e-14);
    REQUIRE(error(SoftmaxTopK<double>({.k = s.experts, .renormalise = true})) <= 1e-14);
    REQUIRE(error(BiasedSoftmaxTopK<double>(s.experts, {.k = s.experts})) <= 1e-14);
    REQUIRE(error(BiasedProbabilityTopK<double>(s.experts, {.k = s.experts})) <= 1e-14);
    REQUIRE(error(TopP<double>({.threshold = 1.0})) <= 1e-12);
  }
}

}  // namespace weir::selector_properties_test
