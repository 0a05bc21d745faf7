// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/moe/concepts.hpp>
#include <weir/moe/router/cosine_router.hpp>
#include <weir/moe/router/group_count.hpp>
#include <weir/moe/router/gumbel_router.hpp>
#include <weir/moe/router/hierarchical_router.hpp>
#include <weir/moe/router/input_dropout_router.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/layer_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/router/temperature_router.hpp>
#include <weir/ops/softmax.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/same_draws.hpp"
#include "support/threads.hpp"

namespace weir::hierarchical_router_test {

static_assert(Router<HierarchicalRouter<LinearRouter<float>>>);
static_assert(Router<HierarchicalRouter<LinearRouter<float>, NoisyRouter<float>>>);

namespace {

template <class T = double>
LinearRouter<T> linear(Index experts, Index d_model, std::uint64_t seed) {
  return LinearRouter<T>(test::random_matrix<T>(experts, d_model, seed));
}

}  // namespace

TEST_CASE("HierarchicalRouter matches logits worked out by hand", "[moe][hierarchical_router]") {
  // One feature, 1: a = (log 3, 0), b = (log 1, log 3, log 5, log 2).
  Matrix<double> groups(2, 1), experts(4, 1);
  groups << std::log(3.0), 0.0;
  experts << 0.0, std::log(3.0), std::log(5.0), std::log(2.0);
  const HierarchicalRouter router(LinearRouter<double>{groups}, LinearRouter<double>{experts});
  const Matrix<double> z = infer(router, Matrix<double>::Ones(1, 1));
  // (3/4)(1/4, 3/4) and (1/4)(5/7, 2/7) are the probabilities; z is 4 times as large, in logs.
  CHECK(std::exp(z(0, 0)) == Approx(3.0 / 4.0));
  CHECK(std::exp(z(0, 1)) == Approx(9.0 / 4.0));
  CHECK(std::exp(z(0, 2)) == Approx(5.0 / 7.0));
  CHECK(std::exp(z(0, 3)) == Approx(2.0 / 7.0));
  const Matrix<double> p = softmax<double>(z);
  CHECK(p(0, 1) == Approx(9.0 / 16.0));
  CHECK(p(0, 2) == Approx(5.0 / 28.0));
}

TEST_CASE("The softmax of a HierarchicalRouter is the product of its two levels'",
          "[moe][hierarchical_router]") {
  Rng rng(1);
  for (int draw = 0; draw < 50; ++draw) {
    const Index groups = 1 + rng.below(5);
    const Index size = 1 + rng.below(9);
    const Index tokens = rng.below(6);
    const auto outer = linear(groups, 3, static_cast<std::uint64_t>(2 * draw));
    const auto inner = linear(groups * size, 3, static_cast<std::uint64_t>(2 * draw + 1));
    const Matrix<double> x = normal_init<double>(tokens, 3, 3.0, rng);
    const HierarchicalRouter router(outer, inner);
    const Matrix<double> p = softmax<double>(infer(router, x));
    const Matrix<double> p_group = softmax<double>(infer(outer, x));
    const Matrix<double> b = infer(inner, x);
    Matrix<double> expected(tokens, groups * size);
    for (Index g = 0; g < groups; ++g) {
      const Matrix<double> q = softmax<double>(b.middleCols(g * size, size));
      for (Index t = 0; t < tokens; ++t) {
        expected.row(t).segment(g * size, size) = p_group(t, g) * q.row(t);
      }
    }
    REQUIRE(test::relative_error(p, expected) <= 1e-13);
    REQUIRE(router.groups() == groups);
    REQUIRE(router.group_size() == size);
  }
}

TEST_CASE("HierarchicalRouter logits stay exact where probabilities vanish",
          "[moe][hierarchical_router]") {
  Matrix<float> groups(2, 1), experts(4, 1);
  groups << 300.0F, -300.0F;
  experts << 200.0F, -200.0F, 0.0F, 0.0F;
  const HierarchicalRouter router(LinearRouter<float>{groups}, LinearRouter<float>{experts});
  const Matrix<float> z = infer(router, Matrix<float>::Ones(1, 1));
  CHECK(z(0, 0) == Approx(300.0F));
  CHECK(z(0, 1) == Approx(-100.0F));
  CHECK(z(0, 2) == Approx(-300.0F - std::log(2.0F)));
}

TEST_CASE("HierarchicalRouter gradients agree with finite differences",
          "[moe][hierarchical_router][gradient]") {
  const Matrix<double> x = test::random_matrix(4, 3, 3);
  HierarchicalRouter plain(linear(2, 3, 1), linear(6, 3, 2));
  test::check_gradients(plain, x);
  HierarchicalRouter one(linear(1, 3, 1), linear(3, 3, 2));
  test::check_gradients(one, x);
  HierarchicalRouter each(linear(3, 3, 1), linear(3, 3, 2));
  // With one expert to a group the second level is constant: a gradient of zero.
  decltype(each)::Cache cache;
  each.forward(x, kTraining, cache);
  each.backward(test::random_matrix(4, 3, 4), cache);
  CHECK(each.expert_router().weight().gradient().isZero(0.0));
  CHECK(each.group_router().weight().gradient().norm() > 0.1);
  const HierarchicalRouter warm(TemperatureRouter(linear(2, 3, 1), {.start = 2.0, .end = 2.0}),
                                JitterRouter(linear(6, 3, 2)));
  test::SameDraws<std::remove_const_t<decltype(warm)>> same{warm};
  test::check_gradients(same, x);
  Rng rng(5);
  HierarchicalRouter mixed(CosineRouter<double>(3, 2, rng, {.d_projection = 4}), linear(6, 3, 2));
  mixed.group_router().embedding().value *= 100.0;
  test::check_gradients(mixed, x);
}

TEST_CASE("HierarchicalRouter scores the others as if a forbidden expert were not there",
          "[moe][hierarchical_router][allowed]") {
  // Six experts in two groups, 1 and 3 forbidden to all, and group 1 to the last token.
  const std::vector<Index> others = {0, 2, 4, 5};
  const Matrix<double> x = test::random_matrix(5, 3, 3);
  const Matrix<double> experts = test::random_matrix(6, 3, 2);
  const Matrix<double> some = experts(others, Eigen::all);
  HierarchicalRouter all(linear(2, 3, 1), LinearRouter<double>(experts));
  HierarchicalRouter fewer(linear(2, 3, 1), LinearRouter<double>(some));
  std::vector<std::uint8_t> allowed;
  for (int t = 0; t < 5; ++t) {
    for (const int e : {1, 0, 1, 0, 1, 1}) {
      const bool closed = t == 4 && allowed.size() % 6 >= 3;
      allowed.push_back(static_cast<std::uint8_t>(closed ? 0 : e));
    }
  }
  decltype(all)::Cache cache;
  decltype(fewer)::Cache expected;
  const Matrix<double> z = all.forward(x, {.training = true, .allowed = allowed}, cache);
  const Matrix<double> z_some = fewer.forward(x, kTraining, expected);
  CHECK(z.allFinite());
  CHECK(test::relative_error(Matrix<double>(z(Eigen::seq(0, 3), others)), z_some.topRows(4)) <=
        1e-13);
  CHECK(test::relative_error(Matrix<double>(z(4, std::vector<Index>{0, 2})),
                             z_some.row(4).leftCols(2)) <= 1e-13);
  // No gradient comes from a forbidden expert, and none goes to its vector.
  Matrix<double> dz = Matrix<double>::Zero(5, 6);
  Matrix<double> dz_some = test::random_matrix(5, 4, 7);
  dz_some.row(4).rightCols(2).setZero();
  dz(Eigen::all, others) = dz_some;
  CHECK(test::relative_error(all.backward(dz, cache), fewer.backward(dz_some, expected)) <= 1e-13);
  const Matrix<double>& d = all.expert_vectors()->gradient();
  CHECK(d.row(1).isZero(0.0));
  CHECK(d.row(3).isZero(0.0));
  CHECK(test::relative_error(Matrix<double>(d(others, Eigen::all)),
                             fewer.expert_vectors()->gradient()) <= 1e-13);
  CHECK(test::message_of<ShapeError>([&] {
          const std::vector<std::uint8_t> few = {1, 1};
          all.forward(x, {.allowed = few}, cache);
        }) ==
        "HierarchicalRouter: pass.allowed has 2 entries, expected 6 (one per expert) or 30 (for "
        "each token)");
}

TEST_CASE("HierarchicalRouter names the parameters of both levels", "[moe][hierarchical_router]") {
  HierarchicalRouter router(linear(2, 3, 1), linear(6, 3, 2));
  const auto all = parameters(router);
  REQUIRE(all.size() == 2);
  CHECK(all[0].name == "groups.weight");
  CHECK(all[1].name == "weight");
  CHECK(router.expert_vectors() == &router.expert_router().weight());
}

TEST_CASE("HierarchicalRouter gives each level its own noise in training",
          "[moe][hierarchical_router]") {
  const Matrix<double> zero = Matrix<double>::Zero(6, 3);
  const HierarchicalRouter router(NoisyRouter<double>(zero.topRows(2), zero.topRows(2)),
                                  NoisyRouter<double>(zero, zero));
  const Matrix<double> x = test::random_matrix(4, 3, 3);
  decltype(router)::Cache cache;
  CHECK(router.forward(x, {}, cache).isApprox(Matrix<double>::Constant(4, 6, -std::log(3.0))));
  Rng rng(1);
  router.forward(x, {.training = true, .rng = &rng}, cache);
  CHECK((cache.within.array() - 1.0 / 3.0).abs().minCoeff() > 1e-4);
  const Matrix<double> p = cache.logits.array().exp();
  CHECK(std::abs(p.row(0).head(3).sum() - p.row(0).tail(3).sum()) > 1e-3);
}

TEST_CASE("HierarchicalRouter gives the same bits on any number of threads and allocates nothing",
          "[moe][hierarchical_router]") {
  HierarchicalRouter router(linear<float>(5, 16, 1), linear<float>(35, 16, 2));
  const Matrix<float> x = test::random_matrix<float>(100, 16, 3);
  const Matrix<float> dz = test::random_matrix<float>(100, 35, 4);
  decltype(router)::Cache cache;
  const auto run = [&](int threads) {
    const test::Threads set(threads);
    const Matrix<float> z = router.forward(x, kTraining, cache);
    return std::pair(z, Matrix<float>(router.backward(dz, cache)));
  };
  CHECK(run(1) == run(3));
  if (!test::allocations_are_counted()) return;
  CHECK(test::count_allocations([&] {
          router.forward(x, kTraining, cache);
          router.backward(dz, cache);
        }) == 0);
}

TEST_CASE("HierarchicalRouter refuses misuse", "[moe][hierarchical_router]") {
  CHECK(test::message_of<ConfigError>([] {
          HierarchicalRouter(linear(4, 3, 1), linear(6, 3, 2));
        }) == "HierarchicalRouter: groups = 4, expected a divisor of experts = 6");
  CHECK(
      test::message_of<ConfigError>([] { HierarchicalRouter(linear(2, 3, 1), linear(6, 4, 2)); }) ==
      "HierarchicalRouter: the router of experts takes 4 features, expected 3 as the router of "
      "groups");
  HierarchicalRouter router(linear(2, 3, 1), linear(6, 3, 2));
  decltype(router)::Cache cache;
  CHECK(test::message_of<StateError>([&] { router.backward(Matrix<double>::Zero(1, 6), cache); }) ==
        "HierarchicalRouter::backward: the cache is empty, expected a forward pass that succeeded");
  CHECK(test::message_of<ShapeError>([&] { infer(router, Matrix<double>::Zero(1, 4)); }) ==
        "HierarchicalRouter::forward: x is [1, 4], expected [tokens, 3]");
  router.forward(Matrix<double>::Zero(1, 3), kTraining, cache);
  CHECK(test::message_of<ShapeError>([&] { router.backward(Matrix<double>::Zero(2, 6), cache); }) ==
        "HierarchicalRouter::backward: dy is [2, 6], expected [1, 6]");
}

TEST_CASE("Routers around a HierarchicalRouter have its groups, others have none",
          "[moe][hierarchical_router]") {
  const HierarchicalRouter router(linear(2, 3, 1), linear(6, 3, 2));
  CHECK(router.groups() == 2);
  CHECK(JitterRouter(router).groups() == 2);
  CHECK(InputDropoutRouter(router).groups() == 2);
  CHECK(TemperatureRouter(router).groups() == 2);
  CHECK(GumbelRouter(TemperatureRouter(router)).groups() == 2);
  CHECK(LayerRouter(router, 3, 6).groups() == 2);
  CHECK(JitterRouter(linear(2, 3, 1)).groups() == 0);
  CHECK(GumbelRouter(linear(2, 3, 1)).groups() == 0);
}

TEST_CASE("Selectors and losses refuse another number of groups than the router's",
          "[moe][hierarchical_router]") {
  const HierarchicalRouter router(linear(2, 3, 1), linear(6, 3, 2));
  const auto refused = [](const auto& around, Index groups) {
    return test::message_of<ConfigError>([&] { expect_groups_of(around, "X", groups); });
  };
  const std::string expected = "X: groups = 3, expected 2 as the router";
  CHECK(refused(router, 3) == expected);
  CHECK(refused(GumbelRouter(TemperatureRouter(router)), 3) == expected);
  CHECK(refused(router, 2) == "no exception");
  CHECK(refused(linear(6, 3, 2), 3) == "no exception");
}

}  // namespace weir::hierarchical_router_test
