// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

using namespace weir;

TEST_CASE("TopKSoftmax matches weights worked out by hand", "[moe][selector][top_k_softmax]") {
  // exp(z) = (1, 6, 2, 3): experts 1 and 3 with 6/9 and 3/9, out of 12 in all.
  Matrix<double> logits(1, 4);
  logits << std::log(1.0), std::log(6.0), std::log(2.0), std::log(3.0);
  Routing<double> routing;

  TopKSoftmax<double>{}.select(logits, {}, routing);
  CHECK(routing.expert == std::vector<Index>{1, 3});
  CHECK(routing.weight[0] == Approx(2.0 / 3.0));
  CHECK(routing.weight[1] == Approx(1.0 / 3.0));
  CHECK(routing.probabilities(0, 1) == Approx(0.5));
  CHECK(routing.probabilities(0, 0) == Approx(1.0 / 12.0));

  TopKSoftmax<double>{.k = 3, .scale = 2.2}.select(logits, {}, routing);
  CHECK(routing.expert == std::vector<Index>{1, 3, 2});
  CHECK(routing.weight[0] == Approx(1.2));
  CHECK(routing.weight[1] == Approx(0.6));
  CHECK(routing.weight[2] == Approx(0.4));
}

TEST_CASE("TopKSoftmax matches a gradient worked out by hand", "[moe][selector][top_k_softmax]") {
  // q = (2/3, 1/3) over experts 1 and 3, g = 3 q: dg_1/dz_1 = -dg_1/dz_3 = 3 * 2/3 * 1/3.
  Matrix<double> logits(1, 4);
  logits << std::log(1.0), std::log(6.0), std::log(2.0), std::log(3.0);
  const TopKSoftmax<double> selector{.k = 2, .scale = 3.0};
  Routing<double> routing;
  selector.select(logits, {}, routing);
  RoutingGradient<double> gradient;
  gradient.reset(routing);
  gradient.weights << 1.0, 0.0;
  selector.backward(routing, gradient);

  RowVector<double> expected(4);
  expected << 0.0, 2.0 / 3.0, 0.0, -2.0 / 3.0;
  CHECK(test::relative_error(gradient.logits, expected) <= 1e-14);
}

TEST_CASE("TopKSoftmax of all experts is a dense softmax", "[moe][selector][top_k_softmax]") {
  const Matrix<double> logits = test::random_matrix(6, 5, 1);
  Routing<double> routing;
  TopKSoftmax<double>{.k = 5}.select(logits, {}, routing);
  for (Index t = 0; t < 6; ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      const auto i = static_cast<std::size_t>(a);
      CHECK(routing.weight[i] == Approx(routing.probabilities(t, routing.expert[i])));
    }
  }
}

TEST_CASE("TopKSoftmax does not mind a shift of all logits", "[moe][selector][top_k_softmax]") {
  const Matrix<double> logits = test::random_matrix(6, 5, 2);
  const Matrix<double> shifted = logits.array() + 100.0;
  Routing<double> a;
  Routing<double> b;
  TopKSoftmax<double>{}.select(logits, {}, a);
  TopKSoftmax<double>{}.select(shifted, {}, b);
  CHECK(a.expert == b.expert);
  for (std::size_t i = 0; i < a.weight.size(); ++i) CHECK(a.weight[i] == Approx(b.weight[i]));
}

TEST_CASE("TopKSoftmax names the setting that is out of range", "[moe][selector][top_k_softmax]") {
  const auto message = [](const TopKSoftmax<double>& selector) {
    return test::message_of<ConfigError>([&] {
      Routing<double> routing;
      selector.select(Matrix<double>::Zero(2, 4), {}, routing);
    });
  };
  CHECK(message({.k = 0}) == "TopKSoftmax: k = 0, expected 1 <= k <= experts = 4");
  CHECK(message({.k = 5}) == "TopKSoftmax: k = 5, expected 1 <= k <= experts = 4");
  CHECK(message({.scale = -1.0}) == "TopKSoftmax: scale = -1, expected > 0");
  CHECK(message({.k = 4}) == "no exception");
}
