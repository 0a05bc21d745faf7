// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/balance/gshard_loss.hpp>
#include <weir/moe/balance/hierarchical_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/hierarchical_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/expert_choice.hpp>
#include <weir/moe/selector/hierarchical_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/loss_gradient.hpp"
#include "support/routing.hpp"

namespace weir::hierarchical_loss_test {
using test::logit_gradient;
using test::loss_of;
using test::route;

static_assert(RoutingLoss<HierarchicalLoss<float>, float>);

namespace {

/// outer + inner by the formulas of the two levels' gating functions: at each level the mean over
/// experts of density * density_proxy, times the square of their number, the inner one with a
/// buffer of T / groups places.
double reference(const Routing<double>& routing, Index groups) {
  const Index size = routing.experts() / groups;
  const auto tokens = static_cast<double>(routing.tokens());
  const auto count = static_cast<double>(groups);
  const auto first = [&](Index t) { return routing.expert[routing.first(t)]; };
  double outer = 0.0;
  double inner = 0.0;
  for (Index g = 0; g < groups; ++g) {
    double density = 0.0;
    double proxy = 0.0;
    RowVector<double> density_1 = RowVector<double>::Zero(size);
    RowVector<double> density_1_proxy = RowVector<double>::Zero(size);
    const double places = tokens / count;
    for (Index t = 0; t < routing.tokens(); ++t) {
      const RowVector<double> p = routing.probabilities.row(t).segment(g * size, size);
      proxy += p.sum() / tokens;
      if (first(t) / size != g) continue;
      density += 1.0 / tokens;
      density_1[first(t) - g * size] += 1.0 / places;
      density_1_proxy += p / p.sum() / places;
    }
    outer += density * proxy / count * count * count;
    inner += density_1.dot(density_1_proxy) / (count * static_cast<double>(size)) *
             static_cast<double>(size * size);
  }
  return outer + inner;
}

}  // namespace

TEST_CASE("HierarchicalLoss matches a routing worked out by hand", "[moe][balance][hierarchical]") {
  // p = (4, 2, 1, 3)/10 and (1, 1, 5, 3)/10: first choices 0 and 2 (the groups have 6:4 and 2:8).
  // outer = 2/4 * (1 * 8/10 + 1 * 12/10) = 1; inner = 4/4 * (2/3 + 5/8).
  Matrix<double> z(2, 4);
  z << std::log(4.0), std::log(2.0), 0.0, std::log(3.0), 0.0, 0.0, std::log(5.0), std::log(3.0);
  const Routing<double> routing = route(HierarchicalTopK<double>({.groups = 2}), z);
  CHECK(loss_of(HierarchicalLoss<double>({.groups = 2, .coefficient = 0.5}), routing) ==
        Approx(0.5 * (1.0 + 2.0 / 3.0 + 5.0 / 8.0)));
}

TEST_CASE("HierarchicalLoss is the sum of Mesh TensorFlow's two losses in any setting",
          "[moe][balance][hierarchical]") {
  Rng rng(1);
  for (int draw = 0; draw < 100; ++draw) {
    const Index groups = 1 + rng.below(4);
    const Index experts = groups * (1 + rng.below(5));
    const Matrix<double> z = normal_init<double>(1 + rng.below(9), experts, 1.5, rng);
    const Routing<double> routing =
        route(HierarchicalTopK<double>({.groups = groups, .group_k = 1, .k = 1}), z);
    const HierarchicalLoss<double> loss({.groups = groups, .coefficient = 0.3});
    REQUIRE(loss_of(loss, routing) == Approx(0.3 * reference(routing, groups)));
    // With one group, or one expert to a group, one level is that of GShard, the other constant.
    const double flat = loss_of(GShardLoss<double>({.coefficient = 0.3}), routing);
    if (groups == 1) REQUIRE(loss_of(loss, routing) == Approx(0.3 + flat));
    const Routing<double> first = route(SoftmaxTopK<double>({.k = 1}), z);
    RowVector<double> load = RowVector<double>::Zero(experts);
    first.add_load(0, first.tokens(), load);
    double squares = load.squaredNorm() * static_cast<double>(experts);
    squares /= static_cast<double>(z.rows() * z.rows());
    const HierarchicalLoss<double> each({.groups = experts, .coefficient = 0.3});
    REQUIRE(loss_of(each, first) ==
            Approx(0.3 * squares + loss_of(GShardLoss<double>({.coefficient = 0.3}), first)));
  }
}

TEST_CASE("HierarchicalLoss at uniform load is twice the coefficient",
          "[moe][balance][hierarchical]") {
  Routing<double> routing =
      route(HierarchicalTopK<double>({.groups = 4}), Matrix<double>::Constant(24, 12, 0.3));
  for (Index t = 0; t < 24; ++t) {
    routing.expert[routing.first(t)] = t % 12;
  }
  CHECK(loss_of(HierarchicalLoss<double>({.groups = 4, .coefficient = 0.5}), routing) ==
        Approx(1.0));
}

TEST_CASE("HierarchicalLoss counts what is dropped, per sequence if told so, and no padding",
          "[moe][balance][hierarchical]") {
  const HierarchicalTopK<double> selector({.groups = 2});
  const HierarchicalLoss<double> batch({.groups = 2, .coefficient = 0.5});
  const HierarchicalLoss<double> sequence(
      {.groups = 2, .coefficient = 0.5, .scope = Scope::kSequence});
  const Matrix<double> z = test::random_matrix(9, 6, 1);
  Routing<double> routing = route(selector, z);
  const double expected = loss_of(batch, routing);
  test::limit(FixedCapacity({.capacity = 1}), routing);
  CHECK(loss_of(batch, routing) == expected);

  const Sequences sequences({3, 0, 4, 2});
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1, 0, 0};
  const double first = loss_of(batch, route(selector, z.topRows(2)));
  const double third = loss_of(batch, route(selector, z.middleRows(3, 4)));
  Matrix<double> padded = z;
  padded.row(2).setConstant(NAN);
  const Routing<double> masked = route(selector, padded, {.sequences = &sequences, .mask = mask});
  CHECK(loss_of(sequence, masked) == Approx((first + third) / 2.0));
  const Matrix<double> gradient =
      logit_gradient(selector, sequence, padded, {.sequences = &sequences, .mask = mask});
  CHECK(gradient.allFinite());
  CHECK(gradient.row(2).isZero(0.0));
  CHECK(gradient.bottomRows(2).isZero(0.0));
}

TEST_CASE("HierarchicalLoss is zero without real tokens", "[moe][balance][hierarchical]") {
  const HierarchicalTopK<double> selector({.groups = 2});
  const std::vector<std::uint8_t> mask = {0, 0};
  const Index tokens = GENERATE(0, 2);
  const Pass pass{.mask = std::span(mask).first(static_cast<std::size_t>(tokens))};
  const Routing<double> routing = route(selector, Matrix<double>::Ones(tokens, 4), pass);
  CHECK(loss_of(HierarchicalLoss<double>(), routing) == 0.0);
  CHECK(logit_gradient(selector, HierarchicalLoss<double>(), Matrix<double>::Ones(tokens, 4), pass)
            .isZero(0.0));
}

TEST_CASE("HierarchicalLoss gradient agrees with finite differences",
          "[moe][balance][hierarchical][gradient]") {
  Matrix<double> logits = test::random_matrix(7, 6, 5);
  const Sequences sequences({4, 0, 3});
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1};
  const Pass pass{.sequences = &sequences, .mask = mask};
  const auto groups = GENERATE(as<Index>{}, 1, 2, 3, 6);
  const auto scope = GENERATE(Scope::kBatch, Scope::kSequence);
  const HierarchicalLoss<double> balancer({.groups = groups, .coefficient = 0.5, .scope = scope});
  const auto check = [&](const auto& selector) {
    test::check_logit_gradient(selector, balancer, logits, pass);
  };
  check(SoftmaxTopK<double>({.k = 2}));
  check(ExpertChoice<double>({.factor = 0.5}));  // Tokens without experts.
  check(HierarchicalTopK<double>({.groups = groups, .group_k = 1, .k = 1}));
}

TEST_CASE("HierarchicalLoss reaches both levels of a layer's router",
          "[moe][balance][hierarchical][gradient]") {
  Rng rng(2);
  MoELayer moe(HierarchicalRouter(LinearRouter<double>(2.0 * test::random_matrix(2, 4, 1)),
                                  LinearRouter<double>(2.0 * test::random_matrix(6, 4, 2))),
               HierarchicalTopK<double>({.groups = 2}), Dropless(), GluBank<double>(4, 6, 2, rng),
               HierarchicalLoss<double>({.groups = 2, .coefficient = 0.5}));
  test::check_gradients(moe, test::random_matrix(5, 4, 4));
  decltype(moe)::Cache cache;
  const Matrix<double> x = test::random_matrix(5, 4, 4);
  const Matrix<double> dy = Matrix<double>::Zero(5, 4);
  zero_gradients(moe);
  const auto pass = [&] {
    moe.forward(x, kTraining, cache);
    moe.backward(dy, cache);
  };
  pass();
  CHECK(moe.router().group_router().weight().gradient().norm() > 0.01);
  CHECK(moe.router().expert_router().weight().gradient().norm() > 0.01);
  if (!test::allocations_are_counted()) return;
  CHECK(test::count_allocations(pass) == 0);
}

TEST_CASE("HierarchicalLoss refuses misuse", "[moe][balance][hierarchical]") {
  const auto message = [](const HierarchicalLossConfig& config) {
    return test::message_of<ConfigError>([&] { HierarchicalLoss<double>{config}; });
  };
  CHECK(message({.groups = 0}) == "HierarchicalLoss: groups = 0, expected >= 1");
  CHECK(message({.coefficient = -1.0}) ==
        "HierarchicalLoss: coefficient = -1, expected a finite number >= 0");
  CHECK(message({.coefficient = NAN}) ==
        "HierarchicalLoss: coefficient = nan, expected a finite number >= 0");
  const Routing<double> routing = route(SoftmaxTopK<double>({.k = 1}), Matrix<double>::Zero(1, 4));
  CHECK(test::message_of<ConfigError>([&] {
          loss_of(HierarchicalLoss<double>({.groups = 3}), routing);
        }) == "HierarchicalLoss: groups = 3, expected a divisor of experts = 4");
  CHECK(test::message_of<ConfigError>([] {
          Rng rng(1);
          MoELayer(
              HierarchicalRouter(LinearRouter<double>(4, 3, rng), LinearRouter<double>(4, 6, rng)),
              HierarchicalTopK<double>({.groups = 3}), Dropless(), GluBank<double>(4, 6, 2, rng),
              HierarchicalLoss<double>({.groups = 2}));
        }) == "HierarchicalLoss: groups = 2, expected 3 as the router");
}

}  // namespace weir::hierarchical_loss_test
