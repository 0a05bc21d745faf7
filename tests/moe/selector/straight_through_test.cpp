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

#include "moe/selector/selected.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"

namespace weir::straight_through_test {

static_assert(Selector<StraightThrough<float>, float>);

namespace {

using Soft = SoftmaxTopK<double>;
using Hard = StraightThrough<double>;

/// The same settings for soft weights.
Soft soft_of(const StraightThroughConfig& config) {
  return Soft({.k = config.k, .renormalise = config.renormalise, .scale = config.scale});
}

}  // namespace

TEST_CASE("StraightThrough has hard weights", "[moe][selector][straight_through]") {
  const Matrix<double> logits = test::random_matrix(7, 5, 1);
  const auto weights = [&](const StraightThroughConfig& config) {
    const Soft soft = soft_of(config);
    const Routing<double> routing = test::route(Hard(config), logits);
    CHECK(routing.expert == test::route(soft, logits).expert);
    CHECK(routing.probabilities == test::route(soft, logits).probabilities);
    return routing.weight;
  };
  CHECK(weights({.k = 1}) == std::vector<double>(7, 1.0));
  CHECK(weights({.k = 3}) == std::vector<double>(21, 1.0));
  CHECK(weights({.k = 4, .renormalise = true}) == std::vector<double>(28, 0.25));
  CHECK(weights({.k = 2, .renormalise = true, .scale = 3.0}) == std::vector<double>(14, 1.5));
  CHECK(test::route(Hard(), Matrix<double>(0, 3)).assignments() == 0);
}

TEST_CASE("StraightThrough has the gradient of soft weights",
          "[moe][selector][straight_through][gradient]") {
  Matrix<double> logits = test::random_matrix(6, 5, 2);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1};
  const Pass pass{.training = true, .mask = mask};
  for (const StraightThroughConfig& config :
       {StraightThroughConfig{.k = 1}, StraightThroughConfig{.k = 2},
        StraightThroughConfig{.k = 3, .renormalise = true},
        StraightThroughConfig{.k = 2, .renormalise = true, .scale = 2.5}}) {
    const Hard hard(config);
    const Soft soft = soft_of(config);
    auto selected = test::select(hard, logits, pass);
    const auto objective = test::RoutingObjective<double>::random(selected.routing, 3);
    const Matrix<double> analytic = objective.logit_gradient(hard, selected);
    const Matrix<double> numeric = test::numeric_gradient(
        logits, [&] { return objective.value(test::route(soft, logits, pass)); });
    CHECK(test::relative_error(analytic, numeric) <= 1e-7);
  }
}

TEST_CASE("A layer with StraightThrough adds experts up and teaches its router",
          "[moe][selector][straight_through]") {
  Rng rng(4);
  const LinearRouter<double> router(4, 3, rng, {.init_scale = 3.0});
  const GluBank<double> bank(4, 3, 5, rng);
  MoELayer hard(router, Hard({.k = 1}), Dropless(), bank);
  MoELayer soft(router, Soft({.k = 1}), Dropless(), bank);
  const Matrix<double> x = test::random_matrix(6, 4, 5);
  decltype(hard)::Cache cache;
  decltype(soft)::Cache expected;
  const Matrix<double> y = hard.forward(x, kTraining, cache);
  const Matrix<double> weighted = soft.forward(x, kTraining, expected);
  for (Index t = 0; t < 6; ++t) {
    const double p = expected.routing.weight[t];
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
  const Hard hard;
  auto selected = test::select(hard, noisy);
  const Routing<double>& routing = selected.routing;
  const Matrix<double> p = softmax<double>(noisy);
  for (Index t = 0; t < 50; ++t) {
    Index best = 0;
    noisy.row(t).maxCoeff(&best);
    CHECK(routing.expert[t] == best);
    CHECK(routing.weight[t] == 1.0);
  }
  const test::RoutingObjective<double> sum{RowVector<double>::Ones(50),
                                           Matrix<double>::Zero(50, 4)};
  const Matrix<double> gradient = sum.logit_gradient(hard, selected);
  for (Index t = 0; t < 50; ++t) {
    const Index e = routing.expert[t];
    for (Index j = 0; j < 4; ++j) {
      CHECK(gradient(t, j) == Approx(p(t, e) * ((e == j ? 1.0 : 0.0) - p(t, j))));
    }
  }
}

TEST_CASE("StraightThrough says what does not fit", "[moe][selector][straight_through]") {
  const Matrix<double> logits = test::random_matrix(2, 4, 9);
  const auto message = [&](const StraightThroughConfig& config) {
    return test::message_of<ConfigError>([&] { test::route(Hard(config), logits); });
  };
  CHECK(message({.k = 5}) == "StraightThrough: k = 5, expected 1 <= k <= experts = 4");
  CHECK(message({.scale = 0.0}) == "StraightThrough: scale = 0, expected a finite number > 0");
  CHECK(message({.groups = {.count = 3}}) ==
        "StraightThrough: groups.count = 3, expected a divisor of experts = 4");
  CHECK(test::message_of<NonFiniteError>([] {
          test::route(Hard(), Matrix<double>::Constant(1, 2, NAN));
        }) == "StraightThrough: logits[0, 0] = nan, expected a finite number");
}

}  // namespace weir::straight_through_test
