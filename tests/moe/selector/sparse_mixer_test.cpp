// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/sparse_mixer.hpp>

#include "moe/selector/selected.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::sparse_mixer_test {

static_assert(Selector<SparseMixer<float>, float>);

namespace {

Matrix<double> row(std::initializer_list<double> values) {
  Matrix<double> logits(1, static_cast<Index>(values.size()));
  Index e = 0;
  for (const double z : values) logits(0, e++) = z;
  return logits;
}

/// Many tokens with the same logits, routed in training.
test::Selected<SparseMixer<double>> draw(const SparseMixer<double>& selector,
                                         const Matrix<double>& logits, Index tokens) {
  Rng rng(3);
  return test::select(selector, logits.replicate(tokens, 1), {.training = true, .rng = &rng});
}

}  // namespace

TEST_CASE("SparseMixer matches weights worked out by hand", "[moe][selector][sparse_mixer]") {
  // Near 2 with epsilon = 0.05 are 1.9 and 1.85, since 0.1 and 0.15 are at most 0.1 * 2; 1 is not.
  // Without it, near 1.9 is 1.85.
  const Routing<double> routing =
      test::route(SparseMixer<double>({.epsilon = 0.05}), row({1.9, 1.0, 2.0, 1.85}));
  CHECK(routing.expert == std::vector<Index>{2, 0});
  CHECK(routing.weight[0] == Approx(1.0 / (1.0 + std::exp(-0.1) + std::exp(-0.15))));
  CHECK(routing.weight[1] == Approx(1.0 / (1.0 + std::exp(-0.05))));
  CHECK(routing.probabilities.sum() == Approx(1.0));
  CHECK(routing.probabilities(0, 1) > 0.1);
}

TEST_CASE("SparseMixer measures nearness by the larger of the logit's size and the largest logit",
          "[moe][selector][sparse_mixer]") {
  // All negative: (m - z) / |z| = 0.1 / 1.1 and 1 / 2.
  const Routing<double> routing =
      test::route(SparseMixer<double>({.epsilon = 0.05}), row({-1.0, -1.1, -2.0}));
  CHECK(routing.expert == std::vector<Index>{0, 1});
  CHECK(routing.weight[0] == Approx(1.0 / (1.0 + std::exp(-0.1))));
  CHECK(routing.weight[1] == 1.0);
}

TEST_CASE(
    "SparseMixer of logits that are well apart has weights of one, and of equal ones takes "
    "the lowest indices",
    "[moe][selector][sparse_mixer]") {
  const Routing<double> apart = test::route(SparseMixer<double>(), row({-3.0, 1.0, 9.0, 4.0}));
  CHECK(apart.expert == std::vector<Index>{2, 3});
  CHECK(apart.weight == std::vector<double>{1.0, 1.0});
  const Routing<double> equal = test::route(SparseMixer<double>(), row({0.0, 0.0, 0.0}));
  CHECK(equal.expert == std::vector<Index>{0, 1});
  CHECK(equal.weight[0] == Approx(1.0 / 3.0));
  CHECK(equal.weight[1] == Approx(0.5));
}

TEST_CASE("SparseMixer draws its experts from their softmax and cuts some weights to a third",
          "[moe][selector][sparse_mixer]") {
  constexpr Index kTokens = 40000;
  const SparseMixer<double> selector({.epsilon = 0.2});
  const Matrix<double> logits = row({2.0, 1.5, -4.0});  // Expert 2 is near nothing.
  const Routing<double> routing = draw(selector, logits, kTokens).routing;
  const double q0 = 1.0 / (1.0 + std::exp(-0.5));
  double first = 0.0;
  double whole = 0.0;
  double others = 0.0;
  for (Index t = 0; t < kTokens; ++t) {
    const Index a = 2 * t;
    REQUIRE(routing.expert[a] != 2);
    if (routing.expert[a] == 0) {
      first += 1.0;
      REQUIRE(routing.weight[a] == Approx(q0));
      REQUIRE(routing.expert[a + 1] == 1);
    } else {
      others += 1.0;
      const bool is_whole = routing.weight[a] > 0.5 * (1.0 - q0);
      REQUIRE(routing.weight[a] == Approx((1.0 - q0) * (is_whole ? 1.0 : 0.3333)));
      whole += is_whole ? 1.0 : 0.0;
      REQUIRE(routing.expert[a + 1] == 0);
    }
    REQUIRE(routing.weight[a + 1] == 1.0);  // The other one, and nothing near it.
  }
  // Within four standard deviations.
  CHECK(first / kTokens == Approx(q0).margin(4.0 * std::sqrt(q0 * (1.0 - q0) / kTokens)));
  CHECK(whole / others == Approx(0.25).margin(4.0 * std::sqrt(0.1875 / others)));
}

TEST_CASE("SparseMixer's evaluation has gradients that agree with finite differences",
          "[moe][selector][sparse_mixer][gradient]") {
  const SparseMixer<double> selector({.epsilon = GENERATE(0.01, 0.3)});
  test::check_selector_gradient(selector, test::random_matrix(8, 5, 1), {});
}

TEST_CASE("SparseMixer's training has the gradient of the softmax it drew from, uncut",
          "[moe][selector][sparse_mixer][gradient]") {
  const SparseMixer<double> selector({.epsilon = 0.2});
  const Matrix<double> logits = row({2.0, 1.5, -4.0});
  auto selected = draw(selector, logits, 50);
  const Routing<double>& routing = selected.routing;
  RowVector<double> c = RowVector<double>::Zero(100);
  for (Index t = 0; t < 50; ++t) c[2 * t] = 1.0;
  const Matrix<double> gradient =
      test::RoutingObjective<double>{c, Matrix<double>::Zero(50, 3)}.logit_gradient(selector,
                                                                                    selected);
  const double q0 = 1.0 / (1.0 + std::exp(-0.5));
  bool cut = false;
  for (Index t = 0; t < 50; ++t) {
    const Index a = 2 * t;
    const double towards_0 = routing.expert[a] == 0 ? 1.0 : -1.0;
    CHECK(gradient(t, 0) == Approx(towards_0 * q0 * (1.0 - q0)));
    CHECK(gradient(t, 1) == Approx(-towards_0 * q0 * (1.0 - q0)));
    CHECK(gradient(t, 2) == 0.0);
    cut = cut || routing.weight[a] < 0.5 * (1.0 - q0);
  }
  CHECK(cut);
}

TEST_CASE("SparseMixer gives the same bits for any number of threads and allocates nothing",
          "[moe][selector][sparse_mixer]") {
  const Matrix<double> logits = test::random_matrix(700, 6, 4);
  const SparseMixer<double> selector({.epsilon = 0.4});
  Rng first(9);
  Rng second(9);
  const Routing<double> one = test::route(selector, logits, {.training = true, .rng = &first});
  const Pass pass{.training = true, .rng = &second};
  const auto draw_again = [&] {
    const test::Threads threads(3);
    return test::select(selector, logits, pass);
  };
  auto [three, cache] = draw_again();
  CHECK(one.expert == three.expert);
  CHECK(one.weight == three.weight);
  if (!test::allocations_are_counted()) return;
  CHECK(test::count_allocations([&, &routing = three, &own = cache] {
          selector.forward(logits, pass, routing, own);
        }) == 0);
  CHECK(one.expert != three.expert);  // Another pass, other draws.
}

TEST_CASE("SparseMixer takes padding and no tokens, and says what is wrong",
          "[moe][selector][sparse_mixer]") {
  const SparseMixer<double> selector;
  CHECK(test::route(selector, Matrix<double>(0, 3)).assignments() == 0);
  Matrix<double> logits = Matrix<double>::Zero(2, 3);
  logits(1, 0) = NAN;
  const std::vector<std::uint8_t> mask = {1, 0};
  const Routing<double> routing = test::route(selector, logits, {.mask = mask});
  CHECK(routing.assignments() == 2);
  CHECK(routing.probabilities.row(1).isZero());
  CHECK(test::message_of<NonFiniteError>([&] { test::route(selector, logits); }) ==
        "SparseMixer: logits[1, 0] = nan, expected a finite number");
  CHECK(test::message_of<ConfigError>([&] { test::route(selector, Matrix<double>(2, 1)); }) ==
        "SparseMixer: experts = 1, expected >= 2");
  CHECK(test::message_of<ConfigError>([] { SparseMixer<double>({.epsilon = -1.0}).check(4); }) ==
        "SparseMixer: epsilon = -1, expected a finite number >= 0");
  CHECK(test::message_of<ConfigError>([&] {
          test::route(selector, Matrix<double>::Zero(1, 3), {.training = true});
        }) == "SparseMixer: pass.rng = null, expected a generator in training");
}

}  // namespace weir::sparse_mixer_test
