// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <numbers>
#include <vector>

#include <weir/moe/balance/hierarchical_load_loss.hpp>
#include <weir/moe/balance/load_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/gumbel_router.hpp>
#include <weir/moe/router/hierarchical_router.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/router/temperature_router.hpp>
#include <weir/moe/selector/hierarchical_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

using namespace weir;
using test::route;

static_assert(BalancingLoss<HierarchicalLoadLoss<float>, float>);
static_assert(!BalancingRule<HierarchicalLoadLoss<float>, float>);

namespace {

/// Draws that are the same in each pass.
struct FixedNoise {
  template <class T>
  void fill(const Pass& /*pass*/, MatrixOut<T> noise) const {
    noise = draws.cast<T>();
  }
  Matrix<double> draws;
};

using Noisy = NoisyRouter<double, FixedNoise>;

Noisy noisy_router(Index experts, Index d_model, Index tokens, std::uint64_t seed) {
  return Noisy(test::random_matrix(experts, d_model, seed),
               test::random_matrix(experts, d_model, seed + 1), {},
               {test::random_matrix(tokens, experts, seed + 2)});
}

/// Noisy logits of both levels.
struct TwoLevels {
  TwoLevels(Index tokens, Index groups, Index size, std::uint64_t seed)
      : a(test::random_matrix(tokens, groups, seed)),
        a_noise(test::random_matrix(tokens, groups, seed + 1)),
        a_std(test::random_matrix(tokens, groups, seed + 2).cwiseAbs().array() + 0.1),
        b(test::random_matrix(tokens, groups * size, seed + 3)),
        b_noise(test::random_matrix(tokens, groups * size, seed + 4)),
        b_std(test::random_matrix(tokens, groups * size, seed + 5).cwiseAbs().array() + 0.1) {}

  Index groups() const { return a.cols(); }
  Index size() const { return b.cols() / groups(); }

  Matrix<double> noisy_a() const { return a + a_noise.cwiseProduct(a_std); }
  Matrix<double> noisy_b() const { return b + b_noise.cwiseProduct(b_std); }

  /// What is to be added to the logits of a group's experts.
  Matrix<double> shift() const {
    Matrix<double> shift = noisy_a();
    if (shift.rows() == 0) return shift;
    for (Index g = 0; g < groups(); ++g) {
      const Matrix<double> exp = noisy_b().middleCols(g * size(), size()).array().exp();
      shift.col(g).array() -= exp.rowwise().sum().array().log();
    }
    return shift;
  }

  Matrix<double> shifted(Matrix<double> logits) const {
    if (logits.rows() == 0) return logits;
    const Matrix<double> more = shift();
    for (Index e = 0; e < b.cols(); ++e) logits.col(e) += more.col(e / size());
    return logits;
  }

  Routing<double> routing(const HierarchicalTopK<double>& selector, const Pass& pass = {}) const {
    Routing<double> routing = route(selector, shifted(noisy_b()), pass);
    routing.noisy = true;
    routing.groups = groups();
    routing.clean_logits = shifted(b);
    routing.noise_std = b_std;
    routing.group_noise = a_noise.cwiseProduct(a_std);
    routing.group_noise_std = a_std;
    return routing;
  }

  Matrix<double> a, a_noise, a_std;  // The logits are without noise.
  Matrix<double> b, b_noise, b_std;
};

RowVector<double> load_of(const Routing<double>& routing) {
  RowVector<double> load;
  HierarchicalLoadLoss<double>::load(routing, load);
  return load;
}

RoutingGradient<double> gradient_of(const HierarchicalLoadLoss<double>& balancer,
                                    const Routing<double>& routing) {
  RoutingGradient<double> gradient;
  gradient.reset(routing);
  balancer.add_gradient(routing, gradient);
  return gradient;
}

double phi(double z) {
  return 0.5 * std::erfc(-z / std::numbers::sqrt2);
}

/// LoadLoss of one level by itself.
RowVector<double> load_of_level(const Matrix<double>& clean, const Matrix<double>& noisy,
                                const Matrix<double>& std, Index k) {
  Routing<double> routing = route(TopKSoftmax<double>{k}, noisy);
  routing.noisy = true;
  routing.clean_logits = clean;
  routing.noise_std = std;
  RowVector<double> load;
  LoadLoss<double>::load(routing, load);
  return load;
}

template <class Router>
auto layer(Router router, HierarchicalTopK<double> selector, Rng& rng) {
  GluBank<double> bank(router.experts(), router.d_model(), 1, rng);
  return MoELayer(std::move(router), selector, Dropless{}, std::move(bank),
                  HierarchicalLoadLoss<double>{0.7});
}

}  // namespace

TEST_CASE("HierarchicalLoadLoss matches probabilities worked out by hand",
          "[moe][balance][hierarchical_load_loss]") {
  // Two tokens, two groups of two, one group to a token and one expert in it. Noisy logits: groups
  // (1, 0) and (2, 3), experts (1, 0 | 0, 0.5) and (0, 2 | 4, 1): expert 0, and expert 2.
  TwoLevels levels(2, 2, 2, 1);
  levels.a << 0.5, 1.0, 2.5, 2.0;
  levels.a_std << 0.5, 2.0, 1.0, 0.5;
  levels.a_noise << 1.0, -0.5, -0.5, 2.0;
  levels.b << 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 3.0, 2.0;
  levels.b_std << 0.5, 1.0, 1.0, 0.5, 1.0, 1.0, 0.5, 2.0;
  levels.b_noise << 2.0, -1.0, 0.0, 1.0, 0.0, 1.0, 2.0, -0.5;
  const Routing<double> routing = levels.routing({.groups = 2, .group_k = 1, .k = 1, .rest_k = 1});
  REQUIRE(routing.expert == std::vector<Index>{0, 2});
  // Token 0: group 0 has to exceed 0, group 1 has to exceed 1; token 1: 3, and 2.
  const double m0 = phi(0.5 / 0.5) + phi((2.5 - 3.0) / 1.0);
  const double m1 = phi((1.0 - 1.0) / 2.0) + phi((2.0 - 2.0) / 0.5);
  // One token to each group: in the first, expert 0 has to exceed 0 and expert 1 to exceed 1, in
  // the second, expert 2 has to exceed 1 and expert 3 to exceed 4.
  const RowVector<double> load = load_of(routing);
  CHECK(load[0] == Approx(m0 * phi((0.0 - 0.0) / 0.5)));
  CHECK(load[1] == Approx(m0 * phi((1.0 - 1.0) / 1.0)));
  CHECK(load[2] == Approx(m1 * phi((3.0 - 1.0) / 0.5)));
  CHECK(load[3] == Approx(m1 * phi((2.0 - 4.0) / 2.0)));
  for (const auto variance : {Variance::kPopulation, Variance::kSample}) {
    CHECK(HierarchicalLoadLoss<double>{0.5, variance}.loss(routing) ==
          Approx(0.5 * squared_variation<double>(load, variance)));
  }
}

TEST_CASE("HierarchicalLoadLoss is the product of the loads of the two levels, each by itself",
          "[moe][balance][hierarchical_load_loss]") {
  Rng rng(2);
  for (int trial = 0; trial < 20; ++trial) {
    const Index groups = 2 + rng.below(4);
    const Index size = 1 + rng.below(9);
    const Index tokens = 1 + rng.below(12);
    const Index group_k = 1 + rng.below(groups);
    const Index k = 1 + rng.below(size);
    const TwoLevels levels(tokens, groups, size, rng.bits());
    const Routing<double> routing =
        levels.routing({.groups = groups, .group_k = group_k, .k = k, .rest_k = k});
    const RowVector<double> primary =
        load_of_level(levels.a, levels.noisy_a(), levels.a_std, group_k);
    RowVector<double> expected(groups * size);
    for (Index g = 0; g < groups; ++g) {
      std::vector<Index> rows;  // The tokens of the group.
      for (Index t = 0; t < tokens; ++t) {
        for (const Index e : routing.experts_of(t)) {
          if (e / size != g) continue;
          rows.push_back(t);
          break;
        }
      }
      const auto part = [&](const Matrix<double>& of_all) {
        return Matrix<double>(of_all(rows, Eigen::seqN(g * size, size)));
      };
      auto share = expected.segment(g * size, size);
      if (rows.empty()) {
        share.setConstant(static_cast<double>(k) / static_cast<double>(size));
      } else {
        share = load_of_level(part(levels.b), part(levels.noisy_b()), part(levels.b_std), k) /
                static_cast<double>(rows.size());
      }
      share *= primary[g];
    }
    CHECK(test::relative_error(load_of(routing), expected) <= 1e-13);
  }
}

TEST_CASE("HierarchicalLoadLoss divides the load of a group without tokens evenly",
          "[moe][balance][hierarchical_load_loss]") {
  // Of three groups of two, all tokens choose the first, with one expert, and the second, with two.
  TwoLevels levels(4, 3, 2, 3);
  levels.a.col(0).setConstant(9.0);
  levels.a.col(1).setConstant(8.0);
  levels.a.col(2).setConstant(1.0);
  levels.a_noise.setZero();
  levels.a_std.setConstant(7.0);
  const HierarchicalTopK<double> selector{.groups = 3, .group_k = 2, .k = 1, .rest_k = 2};
  Routing<double> routing = levels.routing(selector);
  const RowVector<double> load = load_of(routing);
  CHECK(load[4] == Approx(4.0 * phi(-1.0) * 1.5 / 2.0));
  CHECK(load[5] == Approx(load[4]));
  // Its noisy logit is to rise: the loss falls with it, and with the logit without noise.
  const RoutingGradient<double> gradient = gradient_of({1.0}, routing);
  CHECK(gradient.group_noise.col(2).minCoeff() > 0.0);
}

TEST_CASE("HierarchicalLoadLoss counts where there is nothing to estimate",
          "[moe][balance][hierarchical_load_loss]") {
  const HierarchicalTopK<double> selector{.groups = 3, .group_k = 2, .k = 2, .rest_k = 1};
  const TwoLevels levels(7, 3, 3, 4);
  Routing<double> quiet = levels.routing(selector);
  RowVector<double> count = RowVector<double>::Zero(9);
  quiet.add_load(0, 7, count);
  quiet.noise_std.setZero();
  quiet.group_noise_std.setZero();
  CHECK(load_of(quiet).isApprox(count, 1e-14));
  const RoutingGradient<double> none = gradient_of({1.0}, quiet);
  CHECK(none.logits.isZero(0.0));
  CHECK(none.clean_logits.isZero(0.0));
  CHECK(none.group_noise.isZero(0.0));

  quiet.noisy = false;
  quiet.groups = 0;
  CHECK(load_of(quiet) == count);
  CHECK(gradient_of({1.0}, quiet).logits.isZero(0.0));

  const TwoLevels all(7, 2, 3, 5);
  const Routing<double> everything = all.routing({.groups = 2, .group_k = 2, .k = 3, .rest_k = 3});
  CHECK(load_of(everything) == RowVector<double>::Constant(6, 7.0));
  CHECK(HierarchicalLoadLoss<double>{1.0}.loss(everything) == 0.0);
}

TEST_CASE("HierarchicalLoadLoss of no tokens is zero, and padding is not seen",
          "[moe][balance][hierarchical_load_loss]") {
  const HierarchicalTopK<double> selector{.groups = 2, .group_k = 1, .k = 1, .rest_k = 1};
  CHECK(HierarchicalLoadLoss<double>{1.0}.loss(TwoLevels(0, 2, 2, 6).routing(selector)) == 0.0);
  CHECK(gradient_of({1.0}, TwoLevels(0, 2, 2, 6).routing(selector)).group_noise.rows() == 0);

  TwoLevels levels(5, 2, 2, 7);
  const std::vector<std::uint8_t> mask = {1, 0, 1, 1, 1};
  const RowVector<double> load = load_of(levels.routing(selector, {.mask = mask}));
  levels.a.row(1).setConstant(NAN);
  levels.b.row(1).setConstant(NAN);
  const Routing<double> routing = levels.routing(selector, {.mask = mask});
  CHECK(load_of(routing) == load);
  const RoutingGradient<double> gradient = gradient_of({1.0}, routing);
  CHECK(gradient.logits.allFinite());
  CHECK(gradient.clean_logits.row(1).isZero(0.0));
  CHECK(gradient.group_noise.row(1).isZero(0.0));
}

TEST_CASE("HierarchicalLoadLoss gives forbidden experts no load",
          "[moe][balance][hierarchical_load_loss]") {
  const TwoLevels levels(9, 3, 3, 8);
  const std::vector<std::uint8_t> allowed = {1, 1, 1, 0, 1, 1, 0, 0, 0};
  const Routing<double> routing =
      levels.routing({.groups = 3, .group_k = 1, .k = 1, .rest_k = 1}, {.allowed = allowed});
  const RowVector<double> load = load_of(routing);
  CHECK(load[3] == 0.0);
  CHECK(load.tail(3).isZero(0.0));
  CHECK(load[4] > 0.0);
  const RoutingGradient<double> gradient = gradient_of({1.0}, routing);
  CHECK(gradient.logits.allFinite());
  CHECK(gradient.logits.col(3).isZero(0.0));
  CHECK(gradient.logits.rightCols(3).isZero(0.0));
  CHECK(gradient.clean_logits.rightCols(3).isZero(0.0));
}

TEST_CASE("HierarchicalLoadLoss gradient agrees with finite differences",
          "[moe][balance][hierarchical_load_loss][gradient]") {
  const HierarchicalTopK<double> selector =
      GENERATE(HierarchicalTopK<double>{.groups = 3, .group_k = 1, .k = 1, .rest_k = 1},
               HierarchicalTopK<double>{.groups = 3, .group_k = 2, .k = 2, .rest_k = 1});
  const bool restricted = GENERATE(false, true);
  std::vector<std::uint8_t> allowed(15, 1);
  allowed[7] = allowed[12] = 0;
  const HierarchicalLoadLoss<double> balancer{0.5,
                                              GENERATE(Variance::kPopulation, Variance::kSample)};
  Pass pass;
  if (restricted) pass.allowed = allowed;
  Routing<double> routing = TwoLevels(4, 3, 5, 9).routing(selector, pass);
  const auto loss = [&] { return balancer.loss(routing); };
  const RoutingGradient<double> gradient = gradient_of(balancer, routing);
  const auto check = [&](const Matrix<double>& analytic, Matrix<double>& x) {
    CHECK(test::relative_error(analytic, test::numeric_gradient(x, loss)) <= 1e-6);
    CHECK(analytic.norm() > 1e-3);
  };
  check(gradient.clean_logits, routing.clean_logits);
  check(gradient.noise_std, routing.noise_std);
  check(gradient.group_noise, routing.group_noise);
  check(gradient.group_noise_std, routing.group_noise_std);
  if (restricted) return;  // No finite difference of -infinity.
  check(gradient.logits, routing.logits);
}

TEST_CASE("HierarchicalLoadLoss reaches all parameters of two noisy routers",
          "[moe][balance][hierarchical_load_loss][gradient]") {
  Rng rng(10);
  const Matrix<double> x = test::random_matrix(6, 3, 11);
  const HierarchicalTopK<double> selector{.groups = 3, .group_k = 2, .k = 2, .rest_k = 1};
  const Pass training{.training = true};
  auto both = layer(HierarchicalRouter(noisy_router(3, 3, 6, 14), noisy_router(9, 3, 6, 17)),
                    selector, rng);
  test::check_gradients(both, x, training);
  test::check_gradients(both, x);
  test::check_gradients(both, x, {.training = true, .aux_scale = 0.3});
  const std::vector<std::uint8_t> allowed = {1, 1, 0, 1, 1, 1, 0, 1, 1};
  test::check_gradients(both, x, {.training = true, .allowed = allowed});
}

TEST_CASE("HierarchicalLoadLoss reaches all parameters where one level has noise, or is scaled",
          "[moe][balance][hierarchical_load_loss][gradient]") {
  Rng rng(10);
  const Matrix<double> x = test::random_matrix(6, 3, 11);
  const HierarchicalTopK<double> selector{.groups = 3, .group_k = 2, .k = 2, .rest_k = 1};
  const Pass training{.training = true};
  const LinearRouter<double> linear_groups(test::random_matrix(3, 3, 12));
  const LinearRouter<double> linear_experts(test::random_matrix(9, 3, 13));
  auto outer = layer(HierarchicalRouter(noisy_router(3, 3, 6, 14), linear_experts), selector, rng);
  test::check_gradients(outer, x, training);
  auto inner = layer(HierarchicalRouter(linear_groups, noisy_router(9, 3, 6, 17)), selector, rng);
  test::check_gradients(inner, x, training);
  auto warm =
      layer(TemperatureRouter(
                HierarchicalRouter(TemperatureRouter(noisy_router(3, 3, 6, 14), {.start = 0.7}),
                                   noisy_router(9, 3, 6, 17)),
                {.start = 1.5}),
            selector, rng);
  test::check_gradients(warm, x, training);
}

TEST_CASE("HierarchicalRouter tells of the noise of both levels",
          "[moe][balance][hierarchical_load_loss]") {
  const HierarchicalRouter router(noisy_router(2, 3, 5, 20), noisy_router(8, 3, 5, 23));
  const Matrix<double> x = test::random_matrix(5, 3, 26);
  decltype(router)::Cache cache;
  const HierarchicalTopK<double> selector{.groups = 2};
  Routing<double> routing = route(selector, router.forward(x, {.training = true}, cache));
  router.annotate(cache, routing);
  REQUIRE(routing.noisy);
  REQUIRE(routing.groups == 2);
  // As TwoLevels has it.
  TwoLevels levels(5, 2, 4, 1);
  levels.a = router.group_router().forward(x);
  levels.b = router.expert_router().forward(x);
  const auto std_of = [&](const Noisy& level) {
    const Matrix<double> raw = x * level.noise_weight().value.transpose();
    return Matrix<double>((raw.array().exp() + 1.0).log() + 0.01);
  };
  levels.a_std = std_of(router.group_router());
  levels.b_std = std_of(router.expert_router());
  levels.a_noise = test::random_matrix(5, 2, 22);
  levels.b_noise = test::random_matrix(5, 8, 25);
  const Routing<double> expected = levels.routing(selector);
  CHECK(test::relative_error(routing.logits, expected.logits) <= 1e-13);
  CHECK(test::relative_error(routing.clean_logits, expected.clean_logits) <= 1e-13);
  CHECK(test::relative_error(routing.noise_std, expected.noise_std) <= 1e-13);
  CHECK(test::relative_error(routing.group_noise, expected.group_noise) <= 1e-13);
  CHECK(test::relative_error(routing.group_noise_std, expected.group_noise_std) <= 1e-13);

  routing = route(selector, router.forward(x, {}, cache));
  router.annotate(cache, routing);
  CHECK_FALSE(routing.noisy);
  CHECK(routing.groups == 0);
}

TEST_CASE("HierarchicalLoadLoss levels groups and experts that noise alone tells apart",
          "[moe][balance][hierarchical_load_loss]") {
  // Both weights favour the first group and the first expert of each for all tokens.
  const Index groups = 3, size = 3;
  Matrix<double> a = Matrix<double>::Zero(groups, 2);
  Matrix<double> b = Matrix<double>::Zero(groups * size, 2);
  a(0, 0) = 2.0;
  for (Index g = 0; g < groups; ++g) b(g * size, 0) = 2.0;
  Matrix<double> x = test::random_matrix(64, 2, 27);
  x.col(0).setOnes();
  Rng rng(28);
  HierarchicalRouter router(NoisyRouter<double>(a, Matrix<double>::Zero(groups, 2)),
                            NoisyRouter<double>(b, Matrix<double>::Zero(groups * size, 2)));
  auto moe = layer(std::move(router), {.groups = groups, .group_k = 1, .k = 1, .rest_k = 1}, rng);
  decltype(moe)::Cache cache;
  const auto step = [&] {
    moe.forward(x, {.training = true, .rng = &rng}, cache);
    zero_gradients(moe);
    moe.backward(Matrix<double>::Zero(64, 2), cache);
    for (auto& [name, parameter] : parameters(moe.router())) {
      parameter->value -= 0.5 * parameter->gradient();
    }
    return cache.aux_loss;
  };
  const double before = step();
  double after = before;
  for (int i = 0; i < 60; ++i) after = step();
  CHECK(before > 0.5);
  CHECK(after < 0.1);
}

TEST_CASE("HierarchicalLoadLoss gives the same bits on any number of threads, allocates nothing",
          "[moe][balance][hierarchical_load_loss]") {
  Rng rng(30);
  const Index tokens = 200;
  auto moe =
      layer(HierarchicalRouter(noisy_router(5, 4, tokens, 31), noisy_router(35, 4, tokens, 34)),
            {.groups = 5, .group_k = 2, .k = 2, .rest_k = 1}, rng);
  const Matrix<double> x = test::random_matrix(tokens, 4, 37);
  const Matrix<double> dy = test::random_matrix(tokens, 4, 38);
  decltype(moe)::Cache cache;
  const auto run = [&](int threads) {
    const test::Threads set(threads);
    zero_gradients(moe);
    moe.forward(x, {.training = true}, cache);
    const Matrix<double> dx = moe.backward(dy, cache);
    return std::tuple(cache.aux_loss, dx, parameters(moe)[0].parameter->gradient());
  };
  CHECK(run(1) == run(3));
  if (!test::allocations_are_counted()) return;
  const test::Threads one(1);
  const auto step = [&] {
    moe.forward(x, {.training = true}, cache);
    moe.backward(dy, cache);
  };
  step();
  CHECK(test::count_allocations(step) == 0);
}

TEST_CASE("HierarchicalLoadLoss works in float", "[moe][balance][hierarchical_load_loss]") {
  const HierarchicalTopK<double> selector{.groups = 3, .group_k = 2, .k = 2, .rest_k = 1};
  const Routing<double> routing = TwoLevels(20, 3, 5, 40).routing(selector);
  Routing<float> single;
  HierarchicalTopK<float>{.groups = 3, .group_k = 2, .k = 2, .rest_k = 1}.select(
      routing.logits.cast<float>(), {}, single);
  single.noisy = true;
  single.groups = 3;
  single.clean_logits = routing.clean_logits.cast<float>();
  single.noise_std = routing.noise_std.cast<float>();
  single.group_noise = routing.group_noise.cast<float>();
  single.group_noise_std = routing.group_noise_std.cast<float>();
  CHECK(HierarchicalLoadLoss<float>{0.5F}.loss(single) ==
        Approx(HierarchicalLoadLoss<double>{0.5}.loss(routing)).epsilon(1e-4));
  RoutingGradient<float> gradient;
  gradient.reset(single);
  HierarchicalLoadLoss<float>{0.5F}.add_gradient(single, gradient);
  const RoutingGradient<double> expected = gradient_of({0.5}, routing);
  CHECK(test::relative_error(gradient.group_noise.cast<double>(), expected.group_noise) <= 1e-4);
  CHECK(test::relative_error(gradient.logits.cast<double>(), expected.logits) <= 1e-4);
}

TEST_CASE("HierarchicalLoadLoss and LoadLoss refuse routers of other levels",
          "[moe][balance][hierarchical_load_loss]") {
  CHECK(test::message_of<ConfigError>([] { HierarchicalLoadLoss<float>{-1.0F}.check(); }) ==
        "HierarchicalLoadLoss: coefficient = -1, expected >= 0");
  const LinearRouter<double> linear(test::random_matrix(4, 3, 41));
  const Noisy noisy = noisy_router(4, 3, 2, 42);
  const HierarchicalLoadLoss<double> loss;
  const auto refused = [&](const auto& router) {
    return test::message_of<ConfigError>([&] { loss.check_router(router); });
  };
  CHECK(refused(noisy) ==
        "HierarchicalLoadLoss: the router has one level, expected two, as HierarchicalRouter has; "
        "LoadLoss is for one");
  const std::string silent =
      "HierarchicalLoadLoss: the router tells of no noise, expected a NoisyRouter as one of its "
      "levels, or as both";
  const HierarchicalRouter two(noisy, noisy_router(8, 3, 2, 45));
  CHECK(refused(HierarchicalRouter(linear, linear)) == silent);
  CHECK(refused(HierarchicalRouter(noisy, two)) == silent);
  CHECK(refused(GumbelRouter(two)) == silent);
  CHECK(refused(two) == "no exception");
  CHECK(refused(JitterRouter(two)) == "no exception");

  const std::string levels =
      "LoadLoss: the router has groups, each level with its own choice and noise, expected one "
      "level; HierarchicalLoadLoss is for two";
  const auto refused_plain = [](const auto& router) {
    Rng rng(1);
    return test::message_of<ConfigError>([&] {
      MoELayer(router, HierarchicalTopK<double>{.groups = 4}, Dropless{},
               GluBank<double>(8, 3, 4, rng), LoadLoss<double>{});
    });
  };
  CHECK(refused_plain(two) == levels);
  CHECK(refused_plain(JitterRouter(two)) == levels);
  CHECK(refused_plain(TemperatureRouter(two)) == levels);
  CHECK(refused_plain(GumbelRouter(two)) == levels);
}
