// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/sinkhorn.hpp>

#include "moe/selector/selected.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::sinkhorn_test {
using test::route;

static_assert(Selector<Sinkhorn<float>, float>);

namespace {

double spread(const Routing<double>& routing) {
  RowVector<double> load = RowVector<double>::Zero(routing.experts());
  routing.add_load(0, routing.tokens(), load);
  return load.maxCoeff() - load.minCoeff();
}

}  // namespace

TEST_CASE("The plan of Sinkhorn has rows of 1 / T and columns of 1 / experts",
          "[moe][selector][sinkhorn]") {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const Index tokens = 1 + static_cast<Index>(seed);
    const Index experts = 1 + static_cast<Index>(seed % 7);
    const std::vector<std::uint8_t> mask = [&] {
      std::vector<std::uint8_t> m(static_cast<std::size_t>(tokens), 1);
      if (tokens > 3) m[2] = 0;
      return m;
    }();
    const Index real = tokens > 3 ? tokens - 1 : tokens;
    const Matrix<double> logits = test::random_matrix(tokens, experts, seed);
    const Matrix<double> pi = Sinkhorn<double>({.tolerance = 1e-12}).plan(logits, {.mask = mask});
    INFO("seed " << seed);
    for (Index t = 0; t < tokens; ++t) {
      const double expected =
          mask[static_cast<std::size_t>(t)] != 0 ? 1.0 / static_cast<double>(real) : 0.0;
      CHECK(pi.row(t).sum() == Approx(expected).epsilon(1e-6));
    }
    for (Index e = 0; e < experts; ++e) {
      CHECK(pi.col(e).sum() == Approx(1.0 / static_cast<double>(experts)).epsilon(1e-6));
    }
  }
}

TEST_CASE("Sinkhorn levels in training what all tokens prefer, and takes the best in evaluation",
          "[moe][selector][sinkhorn]") {
  Matrix<double> logits = test::random_matrix(64, 4, 5);
  logits.col(0).array() += 5.0;
  CHECK(spread(route(Sinkhorn<double>(), logits)) > 60.0);
  CHECK(spread(route(Sinkhorn<double>(), logits, kTraining)) < 16.0);

  const Routing<double> two = route(Sinkhorn<double>({.k = 2}), logits);
  for (Index t = 0; t < 64; ++t) {
    const Index first = two.first(t);
    CHECK(two.weight[first] > two.weight[first + 1]);
    CHECK(two.weight[first] == two.probabilities.row(t).maxCoeff());
  }
}

TEST_CASE("Sinkhorn is not causal in training, and is in evaluation", "[moe][selector][sinkhorn]") {
  Matrix<double> logits(2, 2);
  logits << 0.1, 0.0, 0.0, 3.0;
  CHECK(route(Sinkhorn<double>(), logits, kTraining).expert[0] == 0);
  CHECK(route(Sinkhorn<double>(), logits).expert[0] == 0);
  logits.row(1) << 3.0, 0.0;
  CHECK(route(Sinkhorn<double>(), logits, kTraining).expert[0] == 1);
  CHECK(route(Sinkhorn<double>(), logits).expert[0] == 0);
}

TEST_CASE("Sinkhorn does not overflow, and leaves padding alone", "[moe][selector][sinkhorn]") {
  Matrix<double> logits = 1000.0 * test::random_matrix(6, 3, 1);
  logits.row(4).setConstant(std::numeric_limits<double>::quiet_NaN());
  const std::vector<std::uint8_t> mask = {1, 1, 1, 1, 0, 1};
  const Routing<double> routing =
      route(Sinkhorn<double>({.k = 2}), logits, {.training = true, .mask = mask});
  CHECK(routing.offsets == std::vector<Index>{0, 2, 4, 6, 8, 8, 10});
  CHECK(routing.probabilities.allFinite());
  for (const double w : routing.weight) CHECK(std::isfinite(w));
  CHECK(route(Sinkhorn<double>(), Matrix<double>(0, 3), kTraining).assignments() == 0);
  CHECK(route(Sinkhorn<double>(), Matrix<double>::Zero(1, 1), kTraining).weight[0] == 0.5);
  CHECK(route(Sinkhorn<double>({.k = 3}), test::random_matrix(2, 3, 2), kTraining).assignments() ==
        6);
}

TEST_CASE("Sinkhorn has the same bits for any number of threads", "[moe][selector][sinkhorn]") {
  const Matrix<double> logits = test::random_matrix(500, 8, 3);
  const Routing<double> one = route(Sinkhorn<double>({.k = 2}), logits, kTraining);
  const test::Threads threads(3);
  const Routing<double> three = route(Sinkhorn<double>({.k = 2}), logits, kTraining);
  CHECK(one.expert == three.expert);
  CHECK(one.weight == three.weight);
}

TEST_CASE("Sinkhorn gradient agrees with finite differences",
          "[moe][selector][sinkhorn][gradient]") {
  const Sinkhorn<double> selector({.k = GENERATE(as<Index>{}, 1, 2, 4)});
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1};
  test::check_selector_gradient(selector, test::random_matrix(5, 4, 11),
                                {.training = GENERATE(false, true), .mask = mask});
}

TEST_CASE("Sinkhorn says what is wrong with its settings", "[moe][selector][sinkhorn]") {
  const auto message = [](const SinkhornConfig& config) {
    return test::message_of<ConfigError>([&] { Sinkhorn<double>(config).check(4); });
  };
  CHECK(message({.k = 5}) == "Sinkhorn: k = 5, expected 1 <= k <= experts = 4");
  CHECK(message({.tolerance = 0.0}) == "Sinkhorn: tolerance = 0, expected a finite number > 0");
  CHECK(message({.iterations = 0}) == "Sinkhorn: iterations = 0, expected >= 1");
}

TEST_CASE("Sinkhorn allocates nothing the second time", "[moe][selector][sinkhorn]") {
  if (!test::allocations_are_counted()) return;
  const Sinkhorn<double> selector({.k = 2});
  const Matrix<double> logits = test::random_matrix(37, 5, 31);
  CHECK(test::count_step_allocations(selector, logits) == 0);
}

}  // namespace weir::sinkhorn_test
