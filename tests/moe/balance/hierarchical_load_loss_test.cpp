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
#include "support/noisy_routing.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::hierarchical_load_loss_test {
using test::gradient_of;
using test::loss_of;
using test::route;

static_assert(RoutingLoss<HierarchicalLoadLoss<float>, float>);
static_assert(!ObservingBalancer<HierarchicalLoadLoss<float>, float>);

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

  test::NoisyRouting<double> routing(const HierarchicalTopK<double>& selector,
                                     const Pass& pass = {}) const {
    return {route(selector, shifted(noisy_b()), pass), {{a, a_std}, {shifted(b), b_std}}};
  }

  Matrix<double> a, a_noise, a_std;  // The logits are without noise.
  Matrix<double> b, b_noise, b_std;
};

RowVector<double> load_of(const Routing<double>& routing) {
  HierarchicalLoadLoss<double>::Cache cache;
  HierarchicalLoadLoss<double>().forward(routing, cache);
  return cache.load;
}

const HierarchicalLoadLoss<double> kLoss({.coefficient = 1.0});

double phi(double z) {
  return 0.5 * std::erfc(-z / std::numbers::sqrt2);
}

/// LoadLoss of one level by itself.
RowVector<double> load_of_level(const Matrix<double>& clean, const Matrix<double>& noisy,
                                const Matrix<double>& std, Index k) {
  const test::NoisyRouting<double> routing(route(TopKSoftmax<double>({.k = k}), noisy),
                                           {{clean, std}});
  LoadLoss<double>::Cache cache;
  LoadLoss<double>().forward(routing, cache);
  return cache.load;
}

template <class Router>
auto layer(Router router, HierarchicalTopK<double> selector, Rng& rng) {
  GluBank<double> bank(router.d_model(), router.experts(), 1, rng, {.init_scale = 0.1});
  return MoELayer(std::move(router), selector, Dropless(), std::move(bank),
                  HierarchicalLoadLoss<double>({.coefficient = 0.7}));
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
  const test::NoisyRouting<double> routing =
      levels.routing(HierarchicalTopK<double>({.groups = 2, .group_k = 1, .k = 1, .rest_k = 1}));
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
    CHECK(loss_of(HierarchicalLoadLoss<double>({.coefficient = 0.5, .variance = variance}),
                  routing) == Approx(0.5 * squared_variation<double>(load, variance)));
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
    const test::NoisyRouting<double> routing = levels.routing(
        HierarchicalTopK<double>({.groups = groups, .group_k = group_k, .k = k, .rest_k = k}));
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
  const HierarchicalTopK<double> selector({.groups = 3, .group_k = 2, .k = 1, .rest_k = 2});
  test::NoisyRouting<double> routing = levels.routing(selector);
  const RowVector<double> load = load_of(routing);
  CHECK(load[4] == Approx(4.0 * phi(-1.0) * 1.5 / 2.0));
  CHECK(load[5] == Approx(load[4]));
  // The loss falls with its logit.
  const RoutingGradient<double> gradient = gradient_of(kLoss, routing);
  CHECK(gradient.noise.front().clean.col(2).maxCoeff() < 0.0);
}

TEST_CASE("HierarchicalLoadLoss counts where there is nothing to estimate",
          "[moe][balance][hierarchical_load_loss]") {
  const HierarchicalTopK<double> selector({.groups = 3, .group_k = 2, .k = 2, .rest_k = 1});
  const TwoLevels levels(7, 3, 3, 4);
  test::NoisyRouting<double> quiet = levels.routing(selector);
  RowVector<double> count = RowVector<double>::Zero(9);
  quiet.add_load(0, 7, count);
  for (NoiseLevel<double>& level : quiet.levels) level.deviation.setZero();
  CHECK(load_of(quiet).isApprox(count, 1e-14));
  const RoutingGradient<double> none = gradient_of(kLoss, quiet);
  CHECK(none.logits.isZero(0.0));
  CHECK(none.noise.back().clean.isZero(0.0));
  CHECK(none.noise.front().clean.isZero(0.0));

  quiet.noise = {};
  CHECK(load_of(quiet) == count);
  CHECK(gradient_of(kLoss, quiet).logits.isZero(0.0));

  const TwoLevels all(7, 2, 3, 5);
  const test::NoisyRouting<double> everything =
      all.routing(HierarchicalTopK<double>({.groups = 2, .group_k = 2, .k = 3, .rest_k = 3}));
  CHECK(load_of(everything) == RowVector<double>::Constant(6, 7.0));
  CHECK(loss_of(HierarchicalLoadLoss<double>({.coefficient = 1.0}), everything) == 0.0);
}

TEST_CASE("HierarchicalLoadLoss of no tokens is zero, and padding is not seen",
          "[moe][balance][hierarchical_load_loss]") {
  const HierarchicalTopK<double> selector({.groups = 2, .group_k = 1, .k = 1, .rest_k = 1});
  CHECK(loss_of(HierarchicalLoadLoss<double>({.coefficient = 1.0}),
                TwoLevels(0, 2, 2, 6).routing(selector)) == 0.0);
  CHECK(gradient_of(kLoss, TwoLevels(0, 2, 2, 6).routing(selector)).noise.front().clean.rows() ==
        0);

  TwoLevels levels(5, 2, 2, 7);
  const std::vector<std::uint8_t> mask = {1, 0, 1, 1, 1};
  const RowVector<double> load = load_of(levels.routing(selector, {.mask = mask}));
  levels.a.row(1).setConstant(NAN);
  levels.b.row(1).setConstant(NAN);
  const test::NoisyRouting<double> routing = levels.routing(selector, {.mask = mask});
  CHECK(load_of(routing) == load);
  const RoutingGradient<double> gradient = gradient_of(kLoss, routing);
  CHECK(gradient.logits.allFinite());
  CHECK(gradient.noise.back().clean.row(1).isZero(0.0));
  CHECK(gradient.noise.front().clean.row(1).isZero(0.0));
}

TEST_CASE("HierarchicalLoadLoss gives forbidden experts no load",
          "[moe][balance][hierarchical_load_loss]") {
  const TwoLevels levels(9, 3, 3, 8);
  const std::vector<std::uint8_t> allowed = {1, 1, 1, 0, 1, 1, 0, 0, 0};
  const test::NoisyRouting<double> routing =
      levels.routing(HierarchicalTopK<double>({.groups = 3, .group_k = 1, .k = 1, .rest_k = 1}),
                     {.allowed = allowed});
  const RowVector<double> load = load_of(routing);
  CHECK(load[3] == 0.0);
  CHECK(load.tail(3).isZero(0.0));
  CHECK(load[4] > 0.0);
  const RoutingGradient<double> gradient = gradient_of(kLoss, routing);
  CHECK(gradient.logits.allFinite());
  CHECK(gradient.logits.col(3).isZero(0.0));
  CHECK(gradient.logits.rightCols(3).isZero(0.0));
  CHECK(gradient.noise.back().clean.rightCols(3).isZero(0.0));
}

TEST_CASE(
    "HierarchicalLoadLoss loads the others as if the router had not scored a forbidden expert",
    "[moe][balance][hierarchical_load_loss]") {
  const HierarchicalRouter router(noisy_router(2, 3, 9, 51), noisy_router(6, 3, 9, 54));
  const HierarchicalTopK<double> selector({.groups = 2, .group_k = 1, .k = 1, .rest_k = 1});
  const Matrix<double> x = test::random_matrix(9, 3, 50);
  const std::vector<std::uint8_t> allowed = {1, 1, 0, 1, 1, 0};
  const Pass pass{.training = true, .allowed = allowed};
  decltype(router)::Cache cache;
  const Matrix<double>& z = router.forward(x, pass, cache);
  Routing<double> routing = route(selector, z, pass);
  routing.noise = router.noise(cache);
  const RowVector<double> load = load_of(routing);

  const std::vector<Index> others = {0, 1, 3, 4};
  const Matrix<double> scores = z(Eigen::all, others);
  Noisy::Cache of_groups;
  Matrix<double> a_clean = -router.group_router().forward(x, kTraining, of_groups);
  a_clean += router.group_router().noise(of_groups).front().clean;  // Minus the noise.
  for (Index g = 0; g < 2; ++g) {
    const Matrix<double> exp = scores.middleCols(2 * g, 2).array().exp();
    a_clean.col(g).array() += exp.rowwise().sum().array().log();
  }
  const auto of_others = [&](const Matrix<double>& of_all) {
    return Matrix<double>(of_all(Eigen::all, others));
  };
  const test::NoisyRouting<double> expected(
      route(selector, scores),
      {{a_clean, routing.noise.front().deviation},
       {of_others(routing.noise.back().clean), of_others(routing.noise.back().deviation)}});
  CHECK(test::relative_error(RowVector<double>(load(others)), load_of(expected)) <= 1e-12);
  CHECK(load[2] == 0.0);
  CHECK(load[5] == 0.0);
}

TEST_CASE("HierarchicalLoadLoss gradient agrees with finite differences",
          "[moe][balance][hierarchical_load_loss][gradient]") {
  const HierarchicalTopK<double> selector =
      GENERATE(HierarchicalTopK<double>({.groups = 3, .group_k = 1, .k = 1, .rest_k = 1}),
               HierarchicalTopK<double>({.groups = 3, .group_k = 2, .k = 2, .rest_k = 1}));
  const bool restricted = GENERATE(false, true);
  std::vector<std::uint8_t> allowed(15, 1);
  allowed[7] = allowed[12] = 0;
  const HierarchicalLoadLoss<double> balancer(
      {.coefficient = 0.5, .variance = GENERATE(Variance::kPopulation, Variance::kSample)});
  Pass pass;
  if (restricted) pass.allowed = allowed;
  test::NoisyRouting<double> routing = TwoLevels(4, 3, 5, 9).routing(selector, pass);
  const auto loss = [&] { return loss_of(balancer, routing); };
  const RoutingGradient<double> gradient = gradient_of(balancer, routing);
  const auto check = [&](const Matrix<double>& analytic, Matrix<double>& x) {
    CHECK(test::relative_error(analytic, test::numeric_gradient(x, loss)) <= 1e-6);
    CHECK(analytic.norm() > 1e-3);
  };
  for (const std::size_t level : {0U, 1U}) {
    check(gradient.noise[level].clean, routing.levels[level].clean);
    check(gradient.noise[level].deviation, routing.levels[level].deviation);
  }
  if (restricted) return;  // No finite difference of -infinity.
  check(gradient.logits, routing.logits);
}

TEST_CASE("HierarchicalLoadLoss reaches all parameters of two noisy routers",
          "[moe][balance][hierarchical_load_loss][gradient]") {
  Rng rng(10);
  const Matrix<double> x = test::random_matrix(6, 3, 11);
  const HierarchicalTopK<double> selector({.groups = 3, .group_k = 2, .k = 2, .rest_k = 1});
  auto both = layer(HierarchicalRouter(noisy_router(3, 3, 6, 14), noisy_router(9, 3, 6, 17)),
                    selector, rng);
  test::check_gradients(both, x);
  test::check_gradients(both, x, {.aux_scale = 0.3});
  const std::vector<std::uint8_t> allowed = {1, 1, 0, 1, 1, 1, 0, 1, 1};
  test::check_gradients(both, x, {.allowed = allowed});
}

TEST_CASE("HierarchicalLoadLoss reaches all parameters where one level has noise, or is scaled",
          "[moe][balance][hierarchical_load_loss][gradient]") {
  Rng rng(10);
  const Matrix<double> x = test::random_matrix(6, 3, 11);
  const HierarchicalTopK<double> selector({.groups = 3, .group_k = 2, .k = 2, .rest_k = 1});
  const LinearRouter<double> linear_groups(test::random_matrix(3, 3, 12));
  const LinearRouter<double> linear_experts(test::random_matrix(9, 3, 13));
  auto outer = layer(HierarchicalRouter(noisy_router(3, 3, 6, 14), linear_experts), selector, rng);
  test::check_gradients(outer, x);
  auto inner = layer(HierarchicalRouter(linear_groups, noisy_router(9, 3, 6, 17)), selector, rng);
  test::check_gradients(inner, x);
  auto warm =
      layer(TemperatureRouter(
                HierarchicalRouter(TemperatureRouter(noisy_router(3, 3, 6, 14), {.start = 0.7}),
                                   noisy_router(9, 3, 6, 17)),
                {.start = 1.5}),
            selector, rng);
  test::check_gradients(warm, x);
}

TEST_CASE("HierarchicalRouter tells of the noise of both levels as HierarchicalLoadLoss wants it",
          "[moe][balance][hierarchical_load_loss]") {
  const HierarchicalRouter router(noisy_router(2, 3, 5, 20), noisy_router(8, 3, 5, 23));
  const Matrix<double> x = test::random_matrix(5, 3, 26);
  decltype(router)::Cache cache;
  const Matrix<double> logits = router.forward(x, kTraining, cache);
  const std::span<const NoiseLevel<double>> noise = router.noise(cache);
  REQUIRE(noise.size() == 2);
  // As TwoLevels has it.
  TwoLevels levels(5, 2, 4, 1);
  levels.a = infer(router.group_router(), x);
  levels.b = infer(router.expert_router(), x);
  const auto std_of = [&](const Noisy& level) {
    const Matrix<double> raw = x * level.noise_weight().value.transpose();
    return Matrix<double>((raw.array().exp() + 1.0).log() + 0.01);
  };
  levels.a_std = std_of(router.group_router());
  levels.b_std = std_of(router.expert_router());
  levels.a_noise = test::random_matrix(5, 2, 22);
  levels.b_noise = test::random_matrix(5, 8, 25);
  const test::NoisyRouting<double> expected =
      levels.routing(HierarchicalTopK<double>({.groups = 2}));
  CHECK(test::relative_error(logits, expected.logits) <= 1e-13);
  for (const std::size_t level : {0U, 1U}) {
    CHECK(test::relative_error(noise[level].clean, expected.levels[level].clean) <= 1e-13);
    CHECK(test::relative_error(noise[level].deviation, expected.levels[level].deviation) <= 1e-13);
  }

  router.forward(x, {}, cache);
  CHECK(router.noise(cache).empty());
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
  auto moe =
      layer(std::move(router),
            HierarchicalTopK<double>({.groups = groups, .group_k = 1, .k = 1, .rest_k = 1}), rng);
  decltype(moe)::Cache cache;
  PassRecord record;
  const auto step = [&] {
    record.clear();
    moe.forward(x, {.training = true, .rng = &rng, .record = &record}, cache);
    zero_gradients(moe);
    moe.backward(Matrix<double>::Zero(64, 2), cache);
    for (auto& [name, parameter] : parameters(moe.router())) {
      parameter->value -= 0.5 * parameter->gradient();
    }
    return record.aux_loss();
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
            HierarchicalTopK<double>({.groups = 5, .group_k = 2, .k = 2, .rest_k = 1}), rng);
  const Matrix<double> x = test::random_matrix(tokens, 4, 37);
  const Matrix<double> dy = test::random_matrix(tokens, 4, 38);
  decltype(moe)::Cache cache;
  const auto run = [&](int threads) {
    const test::Threads set(threads);
    zero_gradients(moe);
    PassRecord record;
    moe.forward(x, {.training = true, .record = &record}, cache);
    const Matrix<double> dx = moe.backward(dy, cache);
    return std::tuple(record.aux_loss(), dx, parameters(moe)[0].parameter->gradient());
  };
  CHECK(run(1) == run(3));
  if (!test::allocations_are_counted()) return;
  const test::Threads one(1);
  const auto step = [&] {
    moe.forward(x, kTraining, cache);
    moe.backward(dy, cache);
  };
  step();
  CHECK(test::count_allocations(step) == 0);
}

TEST_CASE("HierarchicalLoadLoss works in float", "[moe][balance][hierarchical_load_loss]") {
  const HierarchicalTopK<double> selector({.groups = 3, .group_k = 2, .k = 2, .rest_k = 1});
  const test::NoisyRouting<double> routing = TwoLevels(20, 3, 5, 40).routing(selector);
  const HierarchicalTopK<float> in_float({.groups = 3, .group_k = 2, .k = 2, .rest_k = 1});
  HierarchicalTopK<float>::Cache selector_cache;
  Routing<float> choice;
  in_float.forward(routing.logits.cast<float>(), {}, choice, selector_cache);
  std::vector<NoiseLevel<float>> noise;
  for (const NoiseLevel<double>& level : routing.levels) {
    noise.push_back({level.clean.cast<float>(), level.deviation.cast<float>()});
  }
  const test::NoisyRouting<float> single(std::move(choice), std::move(noise));
  const HierarchicalLoadLoss<float> loss({.coefficient = 1.0});
  CHECK(loss_of(loss, single) == Approx(loss_of(kLoss, routing)).epsilon(1e-4));
  const RoutingGradient<float> gradient = gradient_of(loss, single);
  const RoutingGradient<double> expected = gradient_of(kLoss, routing);
  CHECK(test::relative_error(gradient.noise.front().clean.cast<double>(),
                             expected.noise.front().clean) <= 1e-4);
  CHECK(test::relative_error(gradient.logits.cast<double>(), expected.logits) <= 1e-4);
}

TEST_CASE("HierarchicalLoadLoss and LoadLoss refuse routers of other levels",
          "[moe][balance][hierarchical_load_loss]") {
  CHECK(test::message_of<ConfigError>([] { HierarchicalLoadLoss<float>({.coefficient = -1.0}); }) ==
        "HierarchicalLoadLoss: coefficient = -1, expected a finite number >= 0");
  CHECK(test::message_of<ConfigError>([] { HierarchicalLoadLoss<float>({.epsilon = -1.0}); }) ==
        "HierarchicalLoadLoss: epsilon = -1, expected a finite number >= 0");
  const LinearRouter<double> linear(test::random_matrix(4, 3, 41));
  const Noisy noisy = noisy_router(4, 3, 2, 42);
  const HierarchicalLoadLoss<double> loss;
  const auto refused = [&](const auto& router) {
    return test::message_of<ConfigError>([&] { loss.check_router(router); });
  };
  CHECK(refused(noisy) ==
        "HierarchicalLoadLoss: the router has one level, expected two, as HierarchicalRouter has; "
        "LoadLoss is for one");
  CHECK(refused(linear) == refused(noisy));
  const HierarchicalRouter two(noisy, noisy_router(8, 3, 2, 45));
  CHECK(refused(two) == "no exception");
  CHECK(refused(HierarchicalRouter(linear, noisy_router(8, 3, 2, 45))) == "no exception");
  CHECK(refused(JitterRouter(two)) == "no exception");

  const std::string levels =
      "LoadLoss: the router has groups, each level with its own choice and noise, expected one "
      "level; HierarchicalLoadLoss is for two";
  const auto refused_plain = [](const auto& router) {
    Rng rng(1);
    return test::message_of<ConfigError>([&] {
      MoELayer(router, HierarchicalTopK<double>({.groups = 4}), Dropless(),
               GluBank<double>(3, 8, 4, rng), LoadLoss<double>());
    });
  };
  CHECK(refused_plain(two) == levels);
  CHECK(refused_plain(JitterRouter(two)) == levels);
  CHECK(refused_plain(TemperatureRouter(two)) == levels);
  CHECK(refused_plain(GumbelRouter(two)) == levels);
}

}  // namespace weir::hierarchical_load_loss_test
