// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/selector/top_k_softmax.hpp>

#include "moe/selector/selected.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::top_k_softmax_test {

TEST_CASE("TopKSoftmax matches weights worked out by hand", "[moe][selector][top_k_softmax]") {
  // exp(z) = (1, 6, 2, 3): experts 1 and 3 with 6/9 and 3/9, out of 12 in all.
  Matrix<double> logits(1, 4);
  logits << std::log(1.0), std::log(6.0), std::log(2.0), std::log(3.0);
  const Routing<double> routing = test::route(TopKSoftmax<double>(), logits);
  CHECK(routing.expert == std::vector<Index>{1, 3});
  CHECK(routing.weight[0] == Approx(2.0 / 3.0));
  CHECK(routing.weight[1] == Approx(1.0 / 3.0));
  CHECK(routing.probabilities(0, 1) == Approx(0.5));
  CHECK(routing.probabilities(0, 0) == Approx(1.0 / 12.0));

  const Routing<double> three = test::route(TopKSoftmax<double>({.k = 3, .scale = 2.2}), logits);
  CHECK(three.expert == std::vector<Index>{1, 3, 2});
  CHECK(three.weight[0] == Approx(1.2));
  CHECK(three.weight[1] == Approx(0.6));
  CHECK(three.weight[2] == Approx(0.4));
}

TEST_CASE("TopKSoftmax matches a gradient worked out by hand", "[moe][selector][top_k_softmax]") {
  // q = (2/3, 1/3) over experts 1 and 3, g = 3 q: dg_1/dz_1 = -dg_1/dz_3 = 3 * 2/3 * 1/3.
  Matrix<double> logits(1, 4);
  logits << std::log(1.0), std::log(6.0), std::log(2.0), std::log(3.0);
  const TopKSoftmax<double> selector({.k = 2, .scale = 3.0});
  auto selected = test::select(selector, logits);
  const test::RoutingObjective<double> first{RowVector<double>::Unit(2, 0),
                                             Matrix<double>::Zero(1, 4)};

  RowVector<double> expected(4);
  expected << 0.0, 2.0 / 3.0, 0.0, -2.0 / 3.0;
  CHECK(test::relative_error(first.logit_gradient(selector, selected), expected) <= 1e-14);
}

TEST_CASE("TopKSoftmax of all experts is a dense softmax", "[moe][selector][top_k_softmax]") {
  const Matrix<double> logits = test::random_matrix(6, 5, 1);
  const Routing<double> routing = test::route(TopKSoftmax<double>({.k = 5}), logits);
  for (Index t = 0; t < 6; ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      CHECK(routing.weight[a] == Approx(routing.probabilities(t, routing.expert[a])));
    }
  }
}

TEST_CASE("TopKSoftmax does not mind a shift of all logits", "[moe][selector][top_k_softmax]") {
  const Matrix<double> logits = test::random_matrix(6, 5, 2);
  const Matrix<double> shifted = logits.array() + 100.0;
  const Routing<double> a = test::route(TopKSoftmax<double>(), logits);
  const Routing<double> b = test::route(TopKSoftmax<double>(), shifted);
  CHECK(a.expert == b.expert);
  for (Index i = 0; i < a.assignments(); ++i) CHECK(a.weight[i] == Approx(b.weight[i]));
}

TEST_CASE("TopKSoftmax names the setting that is out of range", "[moe][selector][top_k_softmax]") {
  const auto message = [](const TopKSoftmaxConfig& config) {
    return test::message_of<ConfigError>(
        [&] { test::route(TopKSoftmax<double>(config), Matrix<double>::Zero(2, 4)); });
  };
  CHECK(message({.k = 0}) == "TopKSoftmax: k = 0, expected 1 <= k <= experts = 4");
  CHECK(message({.k = 5}) == "TopKSoftmax: k = 5, expected 1 <= k <= experts = 4");
  CHECK(message({.scale = -1.0}) == "TopKSoftmax: scale = -1, expected a finite number > 0");
  CHECK(message({.k = 4}) == "no exception");
}

}  // namespace weir::top_k_softmax_test
