// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/gumbel_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/straight_through.hpp>
#include <weir/ops/softmax.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"

using namespace weir;

static_assert(Selector<StraightThrough<float>, float>);

namespace {

using Soft = SoftmaxTopK<double>;
using Hard = StraightThrough<double>;

template <class S>
Matrix<double> gradient_of(const S& selector, const Routing<double>& routing,
                           const RowVector<double>& d_weights) {
  RoutingGradient<double> gradient;
  gradient.reset(routing);
  gradient.weights = d_weights;
  gradient.probabilities = test::random_matrix(routing.tokens(), routing.experts(), 99);
  selector.backward(routing, gradient);
  return gradient.logits;
}

}  // namespace

TEST_CASE("StraightThrough has hard weights", "[moe][selector][straight_through]") {
  const Matrix<double> logits = test::random_matrix(7, 5, 1);
  const auto weights = [&](const Soft& soft) {
    const Routing<double> routing = test::route(Hard{soft}, logits);
    CHECK(routing.expert == test::route(soft, logits).expert);
    CHECK(routing.probabilities == test::route(soft, logits).probabilities);
    return routing.weight;
  };
  CHECK(weights({.k = 1}) == std::vector<double>(7, 1.0));
  CHECK(weights({.k = 3}) == std::vector<double>(21, 1.0));
  CHECK(weights({.k = 4, .renormalise = true}) == std::vector<double>(28, 0.25));
  CHECK(weights({.k = 2, .renormalise = true, .scale = 3.0}) == std::vector<double>(14, 1.5));
  CHECK(test::route(Hard{}, Matrix<double>(0, 3)).assignments() == 0);
}

TEST_CASE("StraightThrough has the gradient of soft weights",
          "[moe][selector][straight_through][gradient]") {
  Matrix<double> logits = test::random_matrix(6, 5, 2);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1};
  const Pass pass{.mask = mask};
  for (const Soft& soft : {Soft{.k = 1}, Soft{.k = 2}, Soft{.k = 3, .renormalise = true},
                           Soft{.k = 2, .renormalise = true, .scale = 2.5}}) {
    const Routing<double> routing = test::route(Hard{soft}, logits, pass);
    const RowVector<double> c = test::random_matrix(1, routing.assignments(), 3);
    const Matrix<double> analytic = gradient_of(Hard{soft}, routing, c);
    const Matrix<double> numeric = test::numeric_gradient(logits, [&] {
      const Routing<double> moved = test::route(soft, logits, pass);
      const Eigen::Map<const RowVector<double>> g(moved.weight.data(), moved.assignments());
      return g.dot(c) + moved.probabilities.cwiseProduct(test::random_matrix(6, 5, 99)).sum();
    });
    CHECK(test::relative_error(analytic, numeric) <= 1e-7);
  }
}

TEST_CASE("A layer with StraightThrough adds experts up and teaches its router",
          "[moe][selector][straight_through]") {
  Rng rng(4);
  const LinearRouter<double> router(4, 3, rng, {.init_scale = 3.0});
  const GluBank<double> bank(3, 4, 5, rng, 1.0);
  MoELayer hard(router, Hard{{.k = 1}}, Dropless{}, bank);
  MoELayer soft(router, Soft{.k = 1}, Dropless{}, bank);
  const Matrix<double> x = test::random_matrix(6, 4, 5);
  decltype(hard)::Cache cache;
  decltype(soft)::Cache expected;
  const Matrix<double> y = hard.forward(x, cache);
  const Matrix<double> weighted = soft.forward(x, expected);
  for (Index t = 0; t < 6; ++t) {
    const double p = expected.routing.weight[static_cast<std::size_t>(t)];
    CHECK(test::relative_error(p * y.row(t), weighted.row(t)) <= 1e-13);
  }
  // dL/dp is the same, f . dy, and so is the router's gradient.
  const Matrix<double> dy = test::random_matrix(6, 4, 6);
  hard.backward(dy, cache);
  soft.backward(dy, expected);
  const Matrix<double> d_router = parameters(hard)[0].parameter->gradient();
  CHECK(test::relative_error(d_router, parameters(soft)[0].parameter->gradient()) <= 1e-13);
  CHECK(d_router.norm() > 1e-3);
}

TEST_CASE("StraightThrough behind Gumbel noise is straight-through Gumbel-softmax",
          "[moe][selector][straight_through]") {
  Rng rng(7);
  const GumbelRouter router(LinearRouter<double>(Matrix<double>::Identity(4, 4)));
  decltype(router)::Cache cache;
  const Matrix<double> z = test::random_matrix(50, 4, 8);
  const Matrix<double> noisy = router.forward(z, {.training = true, .rng = &rng}, cache);
  const Routing<double> routing = test::route(Hard{}, noisy);
  const Matrix<double> p = softmax<double>(noisy);
  for (Index t = 0; t < 50; ++t) {
    Index best = 0;
    noisy.row(t).maxCoeff(&best);
    CHECK(routing.expert[static_cast<std::size_t>(t)] == best);
    CHECK(routing.weight[static_cast<std::size_t>(t)] == 1.0);
  }
  RoutingGradient<double> gradient;
  gradient.reset(routing);
  gradient.weights.setOnes();
  Hard{}.backward(routing, gradient);
  for (Index t = 0; t < 50; ++t) {
    const Index e = routing.expert[static_cast<std::size_t>(t)];
    for (Index j = 0; j < 4; ++j) {
      CHECK(gradient.logits(t, j) == Approx(p(t, e) * ((e == j ? 1.0 : 0.0) - p(t, j))));
    }
  }
}

TEST_CASE("StraightThrough says what does not fit", "[moe][selector][straight_through]") {
  const Matrix<double> logits = test::random_matrix(2, 4, 9);
  CHECK(test::message_of<ConfigError>([&] { test::route(Hard{{.k = 5}}, logits); }) ==
        "SoftmaxTopK: k = 5, expected 1 <= k <= experts = 4");
  CHECK(test::message_of<ConfigError>([&] {
          test::route(Hard{{.k = 2, .renormalise = true, .norm = 2.0}}, logits);
        }) == "StraightThrough: soft.norm = 2, expected 1");
}
