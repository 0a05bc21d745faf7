// SPDX-License-Identifier: MIT
// What every selector of k experts has to do, whatever its formula.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "moe/selector/selected.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::selector_test {
using test::route;

static_assert(Selector<SoftmaxTopK<float>, float>);
static_assert(Selector<TopKSoftmax<float>, float>);
static_assert(Selector<SigmoidTopK<float>, float>);

namespace {

/// Calls `body(selector)` for each weight convention.
template <class T, class Body>
void for_each_selector(Index experts, Index k, Body&& body) {
  const auto run = [&](const std::string& name, const auto& selector) {
    INFO(name);
    body(selector);
  };
  run("softmax, raw", SoftmaxTopK<T>({.k = k}));
  run("softmax, scaled", SoftmaxTopK<T>({.k = k, .scale = 16.0}));
  run("softmax, renormalised", SoftmaxTopK<T>({.k = k, .renormalise = true, .scale = 1.5}));
  run("softmax, norm 2", SoftmaxTopK<T>({.k = k, .renormalise = true, .norm = 2.0}));
  run("softmax, norm 50", SoftmaxTopK<T>({.k = k, .renormalise = true, .norm = 50.0}));
  run("top-k softmax", TopKSoftmax<T>({.k = k}));
  run("top-k softmax, scaled", TopKSoftmax<T>({.k = k, .scale = 2.5}));
  run("sigmoid, renormalised", SigmoidTopK<T>(experts, {.k = k, .scale = 2.5}));
  run("sigmoid, raw", SigmoidTopK<T>(experts, {.k = k, .renormalise = false, .scale = 0.5}));
  SigmoidTopK<T> biased(experts, {.k = k});
  biased.selection_bias().value = T(0.3) * test::random_matrix<T>(1, experts, 99);
  run("sigmoid, biased", biased);
  run("sqrt-softplus", SigmoidTopK<T>(experts, {.k = k, .score = ScoreFunction::kSqrtSoftplus}));
  run("sqrt-softplus, raw",
      SigmoidTopK<T>(experts,
                     {.k = k, .renormalise = false, .score = ScoreFunction::kSqrtSoftplus}));
}

template <class T>
using Objective = test::RoutingObjective<T>;

}  // namespace

TEST_CASE("Selectors give each token k different experts", "[moe][selector]") {
  const auto k = GENERATE(as<Index>{}, 1, 2, 5, 20);
  const Matrix<double> logits = test::random_matrix(30, 20, 1);

  for_each_selector<double>(20, k, [&](const auto& selector) {
    const Routing<double> routing = route(selector, logits);
    REQUIRE(routing.tokens() == 30);
    REQUIRE(routing.assignments() == 30 * k);
    CHECK(routing.logits == logits);
    CHECK(std::count(routing.kept.begin(), routing.kept.end(), 1) == 30 * k);
    CHECK(*std::min_element(routing.weight.begin(), routing.weight.end()) > 0.0);
    for (Index t = 0; t < 30; ++t) {
      REQUIRE(routing.first(t) == t * k);
      REQUIRE(routing.last(t) == (t + 1) * k);
      std::vector<Index> chosen(routing.expert.begin() + t * k,
                                routing.expert.begin() + (t + 1) * k);
      std::sort(chosen.begin(), chosen.end());
      CHECK(chosen.front() >= 0);
      CHECK(chosen.back() < 20);
      CHECK(std::adjacent_find(chosen.begin(), chosen.end()) == chosen.end());
      CHECK(routing.probabilities.row(t).sum() == Approx(1.0));
    }
  });
}

TEST_CASE("Selectors list the best choice first", "[moe][selector]") {
  Matrix<double> logits(2, 5);
  logits << 0.1, 2.0, -1.0, 1.0, 3.0,  //
      -0.5, -4.0, -0.1, -0.3, -0.2;

  for_each_selector<double>(5, 3, [&](auto selector) {
    if constexpr (requires { selector.selection_bias(); }) {
      selector.selection_bias().value.setZero();
    }
    CHECK(route(selector, logits).expert == std::vector<Index>{4, 1, 3, 2, 4, 3});
  });
}

TEST_CASE("Selectors break ties in favour of the lowest index", "[moe][selector]") {
  const auto k = GENERATE(as<Index>{}, 1, 3, 18, 20);
  const Matrix<float> equal = Matrix<float>::Constant(3, 20, -0.7F);
  Matrix<float> mixed = equal;
  mixed(1, 11) = mixed(1, 7) = 2.0F;  // Both before the others, 7 before 11.

  for_each_selector<float>(20, k, [&](auto selector) {
    if constexpr (requires { selector.selection_bias(); }) {
      selector.selection_bias().value.setZero();
    }
    const Routing<float> routing = test::select(selector, equal).routing;
    for (Index a = 0; a < routing.assignments(); ++a) {
      CHECK(routing.expert[a] == a % k);
      CHECK(routing.weight[a] == routing.weight[0]);
    }
    const Routing<float> other = test::select(selector, mixed).routing;
    CHECK(other.expert[k] == 7);
    if (k > 1) CHECK(other.expert[k + 1] == 11);
    if (k > 2) CHECK(other.expert[k + 2] == 0);
  });
}

TEST_CASE("Selectors allocate nothing the second time", "[moe][selector]") {
  if (!test::allocations_are_counted()) return;
  const Matrix<double> logits = test::random_matrix(20, 8, 7);
  for_each_selector<double>(8, 3, [&](const auto& selector) {
    CHECK(test::count_step_allocations(selector, logits) == 0);
  });
}

TEST_CASE("Selectors take no token, one token, one expert", "[moe][selector]") {
  const auto tokens = GENERATE(as<Index>{}, 0, 1);
  const auto experts = GENERATE(as<Index>{}, 1, 7);
  const Matrix<double> logits = test::random_matrix(tokens, experts, 2);

  for_each_selector<double>(experts, 1, [&](const auto& selector) {
    auto selected = test::select(selector, logits);
    const Routing<double>& routing = selected.routing;
    CHECK(routing.tokens() == tokens);
    CHECK(routing.experts() == experts);
    CHECK(routing.assignments() == tokens);
    CHECK(routing.offsets.size() == static_cast<std::size_t>(tokens) + 1);
    CHECK(routing.probabilities.sum() == Approx(static_cast<double>(tokens)));

    const auto objective = Objective<double>::random(routing, 3);
    const Matrix<double> d_logits = objective.logit_gradient(selector, selected);
    CHECK(d_logits.rows() == tokens);
    CHECK(d_logits.allFinite());
  });
}

TEST_CASE("Selectors give padding no assignment, no probability, no gradient", "[moe][selector]") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Matrix<double> logits = test::random_matrix(5, 6, 4);
  logits.row(0).setConstant(nan);
  logits(3, 2) = -std::numeric_limits<double>::infinity();
  const std::vector<std::uint8_t> mask = {0, 1, 1, 0, 1};
  const Pass pass{.training = true, .mask = mask};
  Matrix<double> real(3, 6);
  real << logits.row(1), logits.row(2), logits.row(4);

  for_each_selector<double>(6, 2, [&](const auto& selector) {
    auto selected = test::select(selector, logits, pass);
    const Routing<double>& padded = selected.routing;
    const Routing<double> packed = route(selector, real);
    CHECK(padded.offsets == std::vector<Index>{0, 0, 2, 4, 4, 6});
    CHECK(padded.expert == packed.expert);
    CHECK(padded.weight == packed.weight);
    CHECK(padded.probabilities.row(0).isZero(0.0));
    CHECK(padded.probabilities.row(3).isZero(0.0));
    CHECK(padded.probabilities.row(4) == packed.probabilities.row(2));

    RoutingGradient<double> gradient = Objective<double>::random(padded, 5).gradient(padded);
    gradient.logits.setConstant(0.25);
    selector.backward(padded, gradient, selected.cache);
    CHECK(gradient.logits.row(0) == RowVector<double>::Constant(6, 0.25));
    CHECK(gradient.logits.row(3) == RowVector<double>::Constant(6, 0.25));
    CHECK(gradient.logits.allFinite());
  });
}

TEST_CASE("Selectors keep nothing of the routing before", "[moe][selector]") {
  const std::vector<std::uint8_t> mask(9, 0);
  const Matrix<double> logits = test::random_matrix(4, 6, 6);

  for_each_selector<double>(6, 2, [&](const auto& selector) {
    const Pass other{.training = true, .mask = mask};
    auto reused = test::select(selector, test::random_matrix(9, 6, 7), other);
    selector.forward(test::random_matrix(30, 6, 7), {}, reused.routing, reused.cache);
    reused.routing.kept.assign(reused.routing.assignments(), 0);
    reused.routing.applied = reused.routing.weight;
    selector.forward(logits, kTraining, reused.routing, reused.cache);

    auto fresh = test::select(selector, logits);
    CHECK(reused.routing.offsets == fresh.routing.offsets);
    CHECK(reused.routing.expert == fresh.routing.expert);
    CHECK(reused.routing.weight == fresh.routing.weight);
    CHECK(reused.routing.applied.empty());
    CHECK(reused.routing.kept == fresh.routing.kept);
    CHECK(reused.routing.probabilities == fresh.routing.probabilities);
    CHECK_FALSE(reused.routing.rows.has_padding());
    CHECK(reused.routing.rows.sequences().count() == 1);
    CHECK(reused.routing.rows.count() == 4);
    const auto objective = Objective<double>::random(fresh.routing, 8);
    CHECK(objective.logit_gradient(selector, reused) == objective.logit_gradient(selector, fresh));
  });
}

TEST_CASE("Selector gradients agree with finite differences", "[moe][selector][gradient]") {
  const auto k = GENERATE(as<Index>{}, 1, 3, 6);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1, 0};
  for_each_selector<double>(6, k, [&](const auto& selector) {
    test::check_selector_gradient(selector, test::random_matrix(8, 6, 8),
                                  {.training = true, .mask = mask});
  });
}

TEST_CASE("Selector gradients are added to those of the logits", "[moe][selector]") {
  const Matrix<double> logits = test::random_matrix(3, 6, 10);

  for_each_selector<double>(6, 2, [&](const auto& selector) {
    auto [routing, cache] = test::select(selector, logits);
    RoutingGradient<double> alone = Objective<double>::random(routing, 11).gradient(routing);
    RoutingGradient<double> added = alone;
    const Matrix<double> before = test::random_matrix(3, 6, 12);
    added.logits = before;
    selector.backward(routing, alone, cache);
    selector.backward(routing, added, cache);
    CHECK(test::relative_error(added.logits, before + alone.logits) <= 1e-14);
  });
}

TEST_CASE("Selectors refuse logits that are not finite", "[moe][selector]") {
  const double inf = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const Matrix<double> good = test::random_matrix(3, 5, 13);
  const auto with = [&](double value) {
    Matrix<double> logits = good;
    logits(2, 4) = value;
    return logits;
  };
  const auto message = [&](const auto& selector, const Matrix<double>& logits) {
    return test::message_of<NonFiniteError>([&] { route(selector, logits); });
  };
  const SoftmaxTopK<double> softmax;
  CHECK(message(softmax, with(nan)) == "SoftmaxTopK: logits[2, 4] = nan, expected a finite number");
  CHECK(message(softmax, with(-inf)) ==
        "SoftmaxTopK: logits[2, 4] = -inf, expected a finite number");
  CHECK(message(TopKSoftmax<double>(), with(inf)) ==
        "TopKSoftmax: logits[2, 4] = inf, expected a finite number");
  CHECK(message(SigmoidTopK<double>(5), with(nan)) ==
        "SigmoidTopK: logits[2, 4] = nan, expected a finite number");

  for_each_selector<double>(5, 2, [&](const auto& selector) {
    auto [routing, cache] = test::select(selector, good);
    CHECK_THROWS_AS(selector.forward(with(nan), {}, routing, cache), NonFiniteError);
    CHECK(routing.logits == good);  // Nothing was changed.
    CHECK(routing.assignments() == 6);
  });
}

TEST_CASE("Selectors refuse a pass that does not fit", "[moe][selector]") {
  const Matrix<double> logits = test::random_matrix(3, 5, 14);
  const std::vector<std::uint8_t> mask(4, 1);
  const Sequences two = Sequences::uniform(2, 1);
  CHECK(test::message_of<ShapeError>([&] {
          route(TopKSoftmax<double>(), logits, {.mask = mask});
        }) == "TopKSoftmax: pass.mask has 4 entries, expected 3 (one per token)");
  CHECK(test::message_of<ShapeError>([&] {
          route(SigmoidTopK<double>(5), logits, {.sequences = &two});
        }) == "SigmoidTopK: pass.sequences cover 2 tokens, expected 3");
}

TEST_CASE("Selectors stay finite for extreme logits", "[moe][selector]") {
  Matrix<float> logits(7, 6);
  logits.row(0).setConstant(1e4F);
  logits.row(1).setConstant(-1e4F);
  logits.row(2) << 1e4F, -1e4F, 0.0F, 1e4F, -1e4F, 1.0F;
  logits.row(3) << -1e4F, -1e4F, -1e4F, -1e4F, -1e4F, 1e4F;
  logits.row(4) << 88.0F, -88.0F, 104.0F, -104.0F, 0.0F, -89.0F;
  logits.row(5).setConstant(-88.0F);
  logits.row(6).setConstant(std::numeric_limits<float>::lowest());
  const auto k = GENERATE(as<Index>{}, 1, 3, 6);

  for_each_selector<float>(6, k, [&](const auto& selector) {
    auto selected = test::select(selector, logits);
    const Routing<float>& routing = selected.routing;
    for (const float weight : routing.weight) {
      CHECK(std::isfinite(weight));
      CHECK(weight >= 0.0F);
    }
    CHECK(routing.probabilities.allFinite());
    CHECK(routing.probabilities.minCoeff() >= 0.0F);
    CHECK(routing.probabilities.rowwise().sum().maxCoeff() <= 1.00001F);

    const auto objective = Objective<float>::random(routing, 15);
    CHECK(objective.logit_gradient(selector, selected).allFinite());
  });
}

TEST_CASE("Selectors give a token the same bits wherever it stands", "[moe][selector]") {
  const Index experts = GENERATE(as<Index>{}, 5, 8, 67);
  const Matrix<float> logits = test::random_matrix<float>(23, experts, 16);

  for_each_selector<float>(experts, 3, [&](const auto& selector) {
    auto selected = test::select(selector, logits);
    const Routing<float>& all = selected.routing;
    const auto objective = Objective<float>::random(all, 17);
    const Matrix<float> gradient = objective.logit_gradient(selector, selected);
    for (Index t = 0; t < 23; ++t) {
      auto alone = test::select(selector, logits.middleRows(t, 1));
      const Routing<float>& one = alone.routing;
      CHECK(std::equal(one.expert.begin(), one.expert.end(), all.expert.begin() + 3 * t));
      CHECK(std::equal(one.weight.begin(), one.weight.end(), all.weight.begin() + 3 * t));
      CHECK(one.probabilities.row(0) == all.probabilities.row(t));

      const Objective<float> own{objective.c.middleCols(3 * t, 3), objective.d.middleRows(t, 1)};
      CHECK(own.logit_gradient(selector, alone).row(0) == gradient.row(t));
    }
  });
}

TEST_CASE("Selectors give the same bits on any number of threads", "[moe][selector]") {
  const Index tokens = 700;  // Several of the ranges that threads share out.
  const Matrix<float> logits = test::random_matrix<float>(tokens, 67, 18);

  for_each_selector<float>(67, 4, [&](const auto& selector) {
    const auto run = [&](int count) {
      const test::Threads threads(count);
      auto selected = test::select(selector, logits);
      const auto objective = Objective<float>::random(selected.routing, 19);
      Matrix<float> gradient = objective.logit_gradient(selector, selected);
      return std::pair(std::move(selected.routing), std::move(gradient));
    };
    const auto [serial, serial_gradient] = run(1);
    const auto [parallel, parallel_gradient] = run(2);
    CHECK(serial.expert == parallel.expert);
    CHECK(serial.weight == parallel.weight);
    CHECK(serial.probabilities == parallel.probabilities);
    CHECK(serial_gradient == parallel_gradient);
  });
}

}  // namespace weir::selector_test
