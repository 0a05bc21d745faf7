// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include <weir/moe/balance/device_loss.hpp>
#include <weir/moe/balance/entropy_loss.hpp>
#include <weir/moe/balance/gshard_loss.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/adaptive_capacity.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/device_capacity.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/dynamic_capacity.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/hierarchical_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/around/replay.hpp>
#include <weir/moe/selector/hierarchical_top_k.hpp>

#include "moe/selector/selected.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::hierarchical_top_k_test {
using test::route;

static_assert(Selector<HierarchicalTopK<float>, float>);
static_assert(!ImposableSelector<HierarchicalTopK<float>>);  // A trace knows no groups.

namespace {

/// The expert and weight lists of one token by the definition, with sorts.
struct Choice {
  std::vector<Index> expert;
  std::vector<double> weight;
};

std::vector<Index> sorted(Index begin, Index end, const RowVector<double>& by) {
  std::vector<Index> order(static_cast<std::size_t>(end - begin));
  std::iota(order.begin(), order.end(), begin);
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) { return by[a] > by[b]; });
  return order;
}

Choice reference(const RowVector<double>& z, const HierarchicalTopKConfig& selector) {
  const Index size = z.size() / selector.groups;
  const RowVector<double> p = softmax<double>(Matrix<double>(z));
  RowVector<double> p_group(selector.groups);
  for (Index g = 0; g < selector.groups; ++g) p_group[g] = p.segment(g * size, size).sum();
  std::vector<Index> groups = sorted(0, selector.groups, p_group);
  groups.resize(static_cast<std::size_t>(selector.group_k));
  double of_groups = 0.0;
  for (const Index g : groups) of_groups += p_group[g];
  Choice choice;
  for (std::size_t rank = 0; rank < groups.size(); ++rank) {
    const Index g = groups[rank];
    std::vector<Index> experts = sorted(g * size, (g + 1) * size, p);
    experts.resize(static_cast<std::size_t>(rank == 0 ? selector.k : selector.rest_k));
    double of_experts = 0.0;
    for (const Index e : experts) of_experts += p[e] / p_group[g];
    for (const Index e : experts) {
      const double u = selector.renormalise ? p_group[g] / of_groups : p_group[g];
      const double v = p[e] / p_group[g] / (selector.renormalise ? of_experts : 1.0);
      choice.expert.push_back(e);
      choice.weight.push_back(u * v);
    }
  }
  return choice;
}

HierarchicalTopKConfig random_config(Rng& rng, Index& experts) {
  HierarchicalTopKConfig config;
  config.groups = 1 + rng.below(5);
  const Index size = 1 + rng.below(6);
  experts = config.groups * size;
  config.group_k = 1 + rng.below(config.groups);
  config.k = 1 + rng.below(size);
  config.rest_k = 1 + rng.below(size);
  config.renormalise = rng.uniform() < 0.5;
  return config;
}

Matrix<double> logs(std::initializer_list<double> numbers) {
  Matrix<double> z(1, static_cast<Index>(numbers.size()));
  std::transform(numbers.begin(), numbers.end(), z.data(), [](double n) { return std::log(n); });
  return z;
}

}  // namespace

TEST_CASE("HierarchicalTopK matches choices worked out by hand", "[moe][selector][hierarchical]") {
  // p = (1, 5, 6, 2, 2, 4)/20 in three groups of 6, 8 and 6, so that group 1 is the best, then 0.
  const Matrix<double> z = logs({1.0, 5.0, 6.0, 2.0, 2.0, 4.0});
  const auto check = [&](const HierarchicalTopKConfig& config, const List<Index>& experts,
                         const List<double>& weights) {
    const Routing<double> routing = route(HierarchicalTopK<double>(config), z);
    CHECK(routing.expert == experts);
    REQUIRE(routing.assignments() == weights.count());
    for (Index a = 0; a < weights.count(); ++a) CHECK(routing.weight[a] == Approx(weights[a]));
  };
  SECTION("Mesh TensorFlow: two of the first group, one of the second") {
    // u = (8, 6)/14; v = (6, 2)/8 and 1.
    check({.groups = 3, .group_k = 2, .k = 2, .rest_k = 1}, {2, 3, 1},
          {8.0 / 14.0 * 6.0 / 8.0, 8.0 / 14.0 * 2.0 / 8.0, 6.0 / 14.0});
  }
  SECTION("Shazeer et al.: as many of each") {
    check({.groups = 3, .group_k = 2, .k = 2, .rest_k = 2}, {2, 3, 1, 0},
          {6.0 / 14.0, 2.0 / 14.0, 5.0 / 14.0, 1.0 / 14.0});
    check({.groups = 3, .group_k = 2, .k = 1, .rest_k = 1}, {2, 1}, {8.0 / 14.0, 6.0 / 14.0});
  }
  SECTION("not renormalised: the probabilities") {
    check({.groups = 3, .group_k = 2, .k = 2, .rest_k = 1, .renormalise = false}, {2, 3, 1},
          {0.3, 0.1, 0.25});
  }
  SECTION("a group is chosen by all of its experts, not by its best") {
    const Matrix<double> other = logs({7.0, 1.0, 5.0, 5.0});
    CHECK(route(HierarchicalTopK<double>({.groups = 2, .group_k = 1, .k = 1}), other).expert ==
          std::vector<Index>{2});
  }
}

TEST_CASE("HierarchicalTopK is its definition in any setting", "[moe][selector][hierarchical]") {
  Rng rng(1);
  for (int draw = 0; draw < 300; ++draw) {
    INFO("draw " << draw);
    Index experts = 0;
    const HierarchicalTopKConfig config = random_config(rng, experts);
    const HierarchicalTopK<double> selector(config);
    const Matrix<double> z = normal_init<double>(rng.below(6), experts, 2.0, rng);
    const Routing<double> routing = route(selector, z);
    for (Index t = 0; t < z.rows(); ++t) {
      const Choice expected = reference(z.row(t), config);
      REQUIRE(routing.last(t) - routing.first(t) == selector.assignments());
      double sum = 0.0;
      for (std::size_t i = 0; i < expected.expert.size(); ++i) {
        const Index a = routing.first(t) + static_cast<Index>(i);
        REQUIRE(routing.expert[a] == expected.expert[i]);
        REQUIRE(routing.weight[a] == Approx(expected.weight[i]));
        sum += routing.weight[a];
      }
      if (config.renormalise) REQUIRE(sum == Approx(1.0));
    }
    REQUIRE(test::relative_error(routing.probabilities, softmax<double>(z)) <= 1e-14);
  }
}

TEST_CASE("HierarchicalTopK with all groups and all experts is the dense mixture",
          "[moe][selector][hierarchical]") {
  const Matrix<double> z = test::random_matrix(4, 6, 1);
  const bool renormalise = GENERATE(true, false);
  const Routing<double> routing =
      route(HierarchicalTopK<double>(
                {.groups = 3, .group_k = 3, .k = 2, .rest_k = 2, .renormalise = renormalise}),
            z);
  for (Index t = 0; t < 4; ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      CHECK(routing.weight[a] == Approx(routing.probabilities(t, routing.expert[a])));
    }
  }
}

TEST_CASE("HierarchicalTopK takes the lowest of equal groups and of equal experts",
          "[moe][selector][hierarchical]") {
  const Routing<double> routing =
      route(HierarchicalTopK<double>({.groups = 3, .group_k = 2, .k = 2, .rest_k = 1}),
            Matrix<double>::Constant(1, 9, 0.3));
  CHECK(routing.expert == std::vector<Index>{0, 1, 3});
}

TEST_CASE("HierarchicalTopK gradient agrees with finite differences",
          "[moe][selector][hierarchical][gradient]") {
  const std::vector<std::uint8_t> mask = {1, 0, 1, 1};
  const Matrix<double> z = test::random_matrix(4, 12, 5);
  const bool renormalise = GENERATE(true, false);
  const auto check = [&](HierarchicalTopKConfig config, const Pass& pass = kTraining) {
    config.renormalise = renormalise;
    test::check_selector_gradient(HierarchicalTopK<double>(config), z, pass, 1e-6);
  };
  check({.groups = 3, .group_k = 2, .k = 2, .rest_k = 1}, {.training = true, .mask = mask});
  check({.groups = 4, .group_k = 3, .k = 1, .rest_k = 3});
  check({.groups = 1, .group_k = 1, .k = 5});
  check({.groups = 12, .group_k = 5, .k = 1, .rest_k = 1});
}

TEST_CASE("HierarchicalTopK has finite weights and gradients where probabilities vanish",
          "[moe][selector][hierarchical]") {
  Matrix<float> z(1, 4);
  z << 500.0F, 0.0F, -500.0F, -502.0F;
  const HierarchicalTopK<float> selector({.groups = 2, .group_k = 2, .k = 2, .rest_k = 2});
  auto [routing, cache] = test::select(selector, z);
  CHECK(routing.expert == std::vector<Index>{0, 1, 2, 3});
  CHECK(routing.weight == std::vector<float>{1.0F, 0.0F, 0.0F, 0.0F});
  RoutingGradient<float> gradient;
  gradient.reset(routing);
  gradient.weights.setOnes();
  selector.backward(routing, gradient, cache);
  CHECK(gradient.logits.isZero(0.0F));
}

TEST_CASE("HierarchicalTopK routes padding nowhere", "[moe][selector][hierarchical]") {
  Matrix<double> z = test::random_matrix(3, 4, 1);
  const HierarchicalTopK<double> selector({.groups = 2});
  const Routing<double> plain = route(selector, z);
  z.row(1).setConstant(NAN);
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  const Routing<double> routing = route(selector, z, {.mask = mask});
  CHECK(routing.first(1) == routing.last(1));
  CHECK(routing.probabilities.row(1).isZero(0.0));
  CHECK(std::equal(routing.expert.begin() + routing.first(2), routing.expert.end(),
                   plain.expert.begin() + plain.first(2)));
  CHECK(route(selector, Matrix<double>(0, 4)).assignments() == 0);
}

TEST_CASE("HierarchicalTopK passes over experts and groups that are forbidden",
          "[moe][selector][hierarchical]") {
  const Matrix<double> z = logs({8.0, 8.0, 8.0, 1.0, 2.0, 3.0, 1.2, 1.0, 0.8});
  const HierarchicalTopK<double> selector({.groups = 3, .group_k = 2, .k = 2, .rest_k = 1});
  const std::vector<std::uint8_t> allowed = {0, 0, 0, 1, 1, 1, 1, 1, 1};
  const Routing<double> routing = route(selector, z, {.allowed = allowed});
  CHECK(routing.expert == std::vector<Index>{5, 4, 6});
  CHECK(routing.weight[0] == Approx(6.0 / 9.0 * 3.0 / 5.0));
  CHECK(routing.weight[2] == Approx(3.0 / 9.0));
  test::check_selector_gradient(selector, z, {.training = true, .allowed = allowed});

  const std::vector<std::uint8_t> few = {1, 0, 0, 1, 0, 0, 1, 0, 0};
  CHECK(test::message_of<ConfigError>([&] { route(selector, z, {.allowed = few}); }) ==
        "HierarchicalTopK: token 0 is allowed 2 experts in its groups, expected at least k = 3");
  const std::vector<std::uint8_t> one_group = {1, 1, 1, 0, 0, 0, 0, 0, 0};
  CHECK(test::message_of<ConfigError>([&] { route(selector, z, {.allowed = one_group}); }) ==
        "HierarchicalTopK: token 0 is allowed 2 experts in its groups, expected at least k = 3");
}

namespace {

template <class C, class... L>
auto layer(C capacity, L... losses) {
  Rng rng(2);
  return MoELayer(HierarchicalRouter(LinearRouter<double>(2.0 * test::random_matrix(3, 4, 1)),
                                     LinearRouter<double>(2.0 * test::random_matrix(6, 4, 2))),
                  HierarchicalTopK<double>({.groups = 3}), std::move(capacity),
                  GluBank<double>(4, 6, 2, rng), losses...);
}

}  // namespace

TEST_CASE("A hierarchical layer has gradients under any capacity and with any loss",
          "[moe][selector][hierarchical][gradient]") {
  const Matrix<double> x = test::random_matrix(5, 4, 4);
  const auto check = [&](auto moe) { test::check_gradients(moe, x); };
  check(layer(Dropless(), GShardLoss<double>({0.3}), ZLoss<double>({0.2})));
  check(layer(FixedCapacity({.capacity = 2}), ImportanceLoss<double>({0.3})));
  check(layer(CapacityFactor({.train = 0.5, .minimum = 0}), EntropyLoss<double>({0.3, -0.2})));
  check(layer(DynamicCapacity({.factor = 1.0}), SwitchLoss<double>({0.3})));
  check(layer(AdaptiveCapacity<double>({.initial = 1.0, .minimum = 0})));
  check(layer(DeviceCapacity({.devices = 3, .protected_share = 0.0, .evaluate = true}),
              DeviceLoss<double>(ExpertGroups::uniform(6, 3), {.coefficient = 0.3})));
  check(layer(RenormaliseKept(FixedCapacity({.capacity = 2}))));
}

TEST_CASE("Capacity serves the first expert of the first group before all others",
          "[moe][selector][hierarchical]") {
  // Expert 0 is the first choice of token 1, the second of token 0.
  Matrix<double> z(2, 4);
  z << std::log(3.0), std::log(4.0), 0.0, 0.0, std::log(4.0), std::log(3.0), 0.0, 0.0;
  Routing<double> routing = route(HierarchicalTopK<double>({.groups = 2}), z);
  test::limit(FixedCapacity({.capacity = 1, .scope = Scope::kBatch}), routing);
  CHECK(routing.expert == std::vector<Index>{1, 0, 2, 0, 1, 2});
  CHECK(routing.kept == std::vector<std::uint8_t>{1, 0, 1, 1, 0, 0});
}

TEST_CASE("ImportanceLoss of a hierarchical routing is Shazeer's Importance_H",
          "[moe][selector][hierarchical]") {
  // Importance_H of group i and expert j: sum_x G_primary(x)_i G_i(x)_j (eq. 13).
  const Matrix<double> z = test::random_matrix(7, 6, 8);
  const HierarchicalTopKConfig config{.groups = 3, .group_k = 2, .k = 1, .rest_k = 1};
  const Routing<double> routing = route(HierarchicalTopK<double>(config), z);
  RowVector<double> expected = RowVector<double>::Zero(6);
  for (Index t = 0; t < 7; ++t) {
    const Choice choice = reference(z.row(t), config);
    for (std::size_t i = 0; i < choice.expert.size(); ++i) {
      expected[choice.expert[i]] += choice.weight[i];
    }
  }
  ImportanceLoss<double>::Cache cache;
  ImportanceLoss<double>().forward(routing, cache);
  CHECK(test::relative_error(cache.importance, expected) < 1e-14);
}

TEST_CASE("HierarchicalTopK gives the same bits on any number of threads and allocates nothing",
          "[moe][selector][hierarchical]") {
  const Matrix<float> z = test::random_matrix<float>(200, 60, 1);
  const HierarchicalTopK<float> selector({.groups = 12, .group_k = 3, .k = 2, .rest_k = 2});
  Routing<float> routing;
  HierarchicalTopK<float>::Cache cache;
  RoutingGradient<float> gradient;
  const auto pass = [&] {
    selector.forward(z, kTraining, routing, cache);
    gradient.reset(routing);
    gradient.weights.setLinSpaced(-1.0F, 2.0F);
    selector.backward(routing, gradient, cache);
  };
  const auto run = [&](int threads) {
    const test::Threads set(threads);
    pass();
    return std::pair(routing.weight, gradient.logits);
  };
  CHECK(run(1) == run(3));
  if (!test::allocations_are_counted()) return;
  CHECK(test::count_allocations(pass) == 0);
}

TEST_CASE("HierarchicalTopK refuses misuse", "[moe][selector][hierarchical]") {
  const auto message = [](const HierarchicalTopKConfig& config) {
    return test::message_of<ConfigError>([&] { HierarchicalTopK<float>(config).check(12); });
  };
  CHECK(message({.groups = 0}) == "HierarchicalTopK: groups = 0, expected >= 1");
  CHECK(message({.groups = 5}) ==
        "HierarchicalTopK: groups = 5, expected a divisor of experts = 12");
  CHECK(message({.groups = 4, .group_k = 0}) ==
        "HierarchicalTopK: group_k = 0, expected 1 <= group_k <= groups = 4");
  CHECK(message({.groups = 4, .group_k = 5}) ==
        "HierarchicalTopK: group_k = 5, expected 1 <= group_k <= groups = 4");
  CHECK(message({.groups = 4, .k = 4}) ==
        "HierarchicalTopK: k = 4, expected 1 <= k <= experts / groups = 3");
  CHECK(message({.groups = 4, .rest_k = 0}) ==
        "HierarchicalTopK: rest_k = 0, expected 1 <= rest_k <= experts / groups = 3");
  CHECK(message({.groups = 4}) == "no exception");
  CHECK(test::message_of<NonFiniteError>([] {
          route(HierarchicalTopK<double>(), Matrix<double>::Constant(1, 4, NAN));
        }) == "HierarchicalTopK: logits[0, 0] = nan, expected a finite number");
  CHECK(test::message_of<ConfigError>([] {
          Rng rng(1);
          MoELayer(
              HierarchicalRouter(LinearRouter<double>(4, 3, rng), LinearRouter<double>(4, 6, rng)),
              HierarchicalTopK<double>({.groups = 2}), Dropless(), GluBank<double>(4, 6, 2, rng));
        }) == "HierarchicalTopK: groups = 2, expected 3 as the router");
}

}  // namespace weir::hierarchical_top_k_test
