// SPDX-License-Identifier: MIT
// Results do not depend on a common scale or shift of numbers where the formula does not.
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/load_loss.hpp>
#include <weir/moe/balance/orthogonality_loss.hpp>
#include <weir/moe/balance/second_place_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/router/cosine_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/around/rank_policy.hpp>
#include <weir/moe/selector/relu_routing.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/sinkhorn.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/straight_through.hpp>
#include <weir/moe/soft_moe.hpp>

#include "moe/selector/selected.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::common_scale_test {

namespace {

template <class T>
T weight_sum(const Routing<T>& routing, Index t) {
  T sum = T(0);
  for (Index a = routing.first(t); a < routing.last(t); ++a) sum += routing.weight[a];
  return sum;
}

template <class S>
RowVector<double> load_of(const S& selector, const Matrix<typename S::Scalar>& logits,
                          const Pass& pass) {
  const auto selected = test::select(selector, logits, pass);
  RowVector<double> load = RowVector<double>::Zero(logits.cols());
  selected.routing.add_load(0, logits.rows(), load);
  return load;
}

}  // namespace

TEMPLATE_TEST_CASE("Weights of renormalised scores sum to the scale, however small the scores",
                   "[moe][selector][sigmoid_top_k]", float, double) {
  using T = TestType;
  const double tolerance = 20.0 * static_cast<double>(std::numeric_limits<T>::epsilon());
  for (const ScoreFunction score : {ScoreFunction::kSigmoid, ScoreFunction::kSqrtSoftplus}) {
    // A score of a small logit z is e^z, or e^(z/2).
    const T power = score == ScoreFunction::kSigmoid ? T(1) : T(0.5);
    const SigmoidTopK<T> selector(4, {.k = 4, .scale = 2.5, .score = score});
    for (const T shift : {T(-40), T(-46), T(-60), T(-90), T(-110), T(-1000), T(-1e6)}) {
      INFO("shift " << shift);
      const Matrix<T> z = (Matrix<T>(1, 4) << T(0), T(1), T(-1), T(0.5)).finished();
      const Matrix<T> logits = (z.array() + shift).matrix();
      const auto selected = test::select(selector, logits);
      const Routing<T>& routing = selected.routing;
      CHECK(weight_sum(routing, 0) == Approx(2.5).epsilon(tolerance));
      CHECK(routing.probabilities.sum() == Approx(1.0).epsilon(tolerance));
      const T total = (power * (logits.array() - shift)).exp().sum();
      for (Index a = 0; a < 4; ++a) {
        const Index e = routing.expert[a];
        const T expected = std::exp(power * (logits(0, e) - shift)) / total;
        CHECK(routing.probabilities(0, e) == Approx(expected).epsilon(tolerance));
        CHECK(routing.weight[a] == Approx(T(2.5) * expected).epsilon(tolerance));
      }
    }
  }
}

TEST_CASE("Gradients of renormalised scores are exact, however small the scores",
          "[moe][selector][sigmoid_top_k][gradient]") {
  for (const ScoreFunction score : {ScoreFunction::kSigmoid, ScoreFunction::kSqrtSoftplus}) {
    for (const bool renormalise : {true, false}) {
      for (const double shift : {0.0, -20.0, -45.0, -47.0, -60.0, -900.0}) {
        INFO("shift " << shift);
        SigmoidTopK<double> selector(5, {.k = 2, .renormalise = renormalise, .score = score});
        // The choice is by a bias: scores that are zero to rounding do not tell the experts apart.
        selector.selection_bias().value << 0.0, 2.0, 0.0, 1.0, 0.0;
        if (shift == 0.0) selector.selection_bias().value.setZero();
        const Matrix<double> logits = (test::random_matrix(6, 5, 3).array() + shift).matrix();
        test::check_selector_gradient(selector, logits);
      }
    }
  }
}

TEST_CASE("Pushing all logits down is no way out of a balancing loss",
          "[moe][selector][sigmoid_top_k][balance]") {
  const SigmoidTopK<double> selector(4, {.k = 2});
  const SwitchLoss<double> loss({.coefficient = 1.0});
  Matrix<double> logits = test::random_matrix(8, 4, 5);
  logits.col(1).array() += 2.0;
  const double at_45 = test::loss_of(loss, test::route(selector, (logits.array() - 45.0).matrix()));
  const double at_60 = test::loss_of(loss, test::route(selector, (logits.array() - 60.0).matrix()));
  CHECK(at_45 > 1.05);
  CHECK(at_60 == Approx(at_45).epsilon(1e-12));
  const Matrix<double> d = test::logit_gradient(selector, loss, (logits.array() - 60.0).matrix());
  CHECK(d.norm() > 0.01);
  CHECK(d.rowwise().sum().norm() <= 1e-12);
}

TEMPLATE_TEST_CASE("Sinkhorn levels the load whatever is added to the logits",
                   "[moe][selector][sinkhorn]", float, double) {
  using T = TestType;
  Matrix<T> logits = test::random_matrix<T>(400, 4, 6);
  logits.col(0).array() += T(3);
  const Sinkhorn<T> selector;
  const RowVector<double> level = load_of(selector, logits, kTraining);
  CHECK(level.maxCoeff() - level.minCoeff() <= 12.0);
  for (const T shift : {T(-32), T(-64), T(-512), T(64)}) {
    const RowVector<double> load = load_of(selector, (logits.array() + shift).matrix(), kTraining);
    CHECK((load - level).cwiseAbs().maxCoeff() <= 4.0);  // To rounding.
  }
  const Matrix<T> plan = Sinkhorn<T>({.tolerance = 1e-6}).plan(logits);
  const Matrix<T> moved = Sinkhorn<T>({.tolerance = 1e-6}).plan((logits.array() - T(64)).matrix());
  CHECK(test::relative_error(moved, plan) <=
        400.0 * static_cast<double>(std::numeric_limits<T>::epsilon()));
}

TEST_CASE("Sinkhorn has Megatron-Core's plan with its epsilon", "[moe][selector][sinkhorn]") {
  // d0 and d1 of the formula as it stands, exp(z) and epsilon included.
  const Matrix<double> logits = (test::random_matrix(9, 3, 9).array() - 15.0).matrix();
  const double epsilon = 1e-8;
  const Matrix<double> kernel = logits.array().exp();
  RowVector<double> d0(9), d1 = RowVector<double>::Ones(3);
  for (int i = 0; i < 200; ++i) {
    for (Index t = 0; t < 9; ++t) d0[t] = 1.0 / (9.0 * (kernel.row(t).dot(d1) + epsilon));
    for (Index e = 0; e < 3; ++e) d1[e] = 1.0 / (3.0 * (d0.dot(kernel.col(e)) + epsilon));
  }
  Matrix<double> expected = kernel;
  for (Index t = 0; t < 9; ++t) expected.row(t) = d0[t] * kernel.row(t).cwiseProduct(d1);
  const Sinkhorn<double> selector({.tolerance = 1e-14, .iterations = 200, .epsilon = epsilon});
  CHECK(test::relative_error(selector.plan(logits), expected) <= 1e-9);
  CHECK(test::relative_error(Sinkhorn<double>({.tolerance = 1e-14}).plan(logits), expected) > 1e-3);
  CHECK(test::message_of<ConfigError>([] { Sinkhorn<double>({.epsilon = -1.0}).check(4); }) ==
        "Sinkhorn: epsilon = -1, expected a finite number >= 0");
}

TEST_CASE("Sinkhorn chooses allowed experts however far apart the logits are",
          "[moe][selector][sinkhorn][allowed]") {
  const Matrix<float> logits = 200.0f * test::random_matrix<float>(2560, 8, 7);
  std::vector<std::uint8_t> allowed;
  for (Index t = 0; t < 2560; ++t) {
    for (Index e = 0; e < 8; ++e) {
      allowed.push_back(e != 3 && (e + t) % 3 != 0 ? 1 : 0);
    }
  }
  const Pass pass{.training = true, .allowed = allowed};
  const auto selected = test::select(Sinkhorn<float>({.k = 2}), logits, pass);
  const Routing<float>& routing = selected.routing;
  for (Index t = 0; t < 2560; ++t) {
    for (const Index e : routing.experts_of(t)) REQUIRE_FALSE(routing.is_forbidden(t, e));
  }
  CHECK(selected.cache.log_d1.segment(0, 3).allFinite());
  const Matrix<float> plan = Sinkhorn<float>().plan(logits, pass);
  CHECK(plan.allFinite());
  CHECK(plan.sum() == Approx(1.0f).epsilon(1e-3));
}

TEST_CASE("SecondPlaceLoss does not depend on how certain the first place is",
          "[moe][balance][second_place_loss]") {
  // Second places 1 and 2; without the first, the rows are (2, 1)/3 and (1, 2)/3: 3/4 * 2 = 3/2.
  Routing<double> routing;
  routing.begin("Test", Matrix<double>::Zero(2, 3), {});
  routing.assign_each(1);
  for (const double others : {1.0, 1e-9, 1e-30, 1e-300}) {
    routing.probabilities << 1.0 - others, 2.0 / 3.0 * others, 1.0 / 3.0 * others,  //
        1.0 - others, 1.0 / 3.0 * others, 2.0 / 3.0 * others;
    CHECK(test::loss_of(SecondPlaceLoss<double>({.coefficient = 1.0}), routing) ==
          Approx(1.5).epsilon(1e-12));
  }
  routing.probabilities << 1.0, 2e-9, 1e-9, 1.0, 1e-9, 2e-9;
  CHECK(test::loss_of(SecondPlaceLoss<double>({.coefficient = 1.0, .epsilon = 1e-9}), routing) ==
        Approx(1.125).epsilon(1e-12));
  CHECK(test::message_of<ConfigError>([] { SecondPlaceLoss<double>({.epsilon = -1.0}); }) ==
        "SecondPlaceLoss: epsilon = -1, expected a finite number >= 0");
}

TEST_CASE("ImportanceLoss does not depend on the scale of the weights",
          "[moe][balance][importance_loss]") {
  Routing<double> routing;
  routing.begin("Test", Matrix<double>::Zero(3, 3), {});
  routing.assign_each(1);
  routing.expert = {0, 1, 1};
  const auto loss = [&](double scale, double epsilon) {
    routing.weight = {scale, 2.0 * scale, 0.0};  // Totals 1, 2, 0: variance 2/3 of mean 1.
    return test::loss_of(ImportanceLoss<double>({.coefficient = 1.0, .epsilon = epsilon}), routing);
  };
  for (const double scale : {1.0, 1e-5, 1e-160, 1e-300, 1e200}) {
    CHECK(loss(scale, 0.0) == Approx(2.0 / 3.0).epsilon(1e-12));
  }
  CHECK(loss(1e-5, 1e-10) == Approx(1.0 / 3.0).epsilon(1e-12));
  CHECK(loss(0.0, 0.0) == 0.0);
  for (const double epsilon : {0.0, 1e-10}) {
    const ImportanceLoss<double> balancer({.coefficient = 1.0, .epsilon = epsilon});
    loss(1e-5, epsilon);
    Matrix<double> weight(1, 3);
    weight << 1e-5, 2e-5, 3e-6;
    const auto value = [&] {
      for (Index a = 0; a < 3; ++a) routing.weight[a] = weight(0, a);
      return test::loss_of(balancer, routing);
    };
    value();
    const RowVector<double> analytic = test::gradient_of(balancer, routing).weights;
    for (Index a = 0; a < 3; ++a) {
      const double step = 1e-9;
      const double before = weight(0, a);
      weight(0, a) = before + step;
      const double above = value();
      weight(0, a) = before - step;
      const double numeric = (above - value()) / (2.0 * step);
      weight(0, a) = before;
      CHECK(analytic[a] == Approx(numeric).epsilon(1e-6));
    }
  }
  CHECK(test::message_of<ConfigError>([] { ImportanceLoss<double>({.epsilon = -1.0}); }) ==
        "ImportanceLoss: epsilon = -1, expected a finite number >= 0");
  CHECK(test::message_of<ConfigError>([] { LoadLoss<double>({.epsilon = -1.0}); }) ==
        "LoadLoss: epsilon = -1, expected a finite number >= 0");
}

TEST_CASE("ReluRouting has the same probabilities for weights of any scale",
          "[moe][selector][relu_routing]") {
  for (const float scale : {1.0f, 1e-20f, 1e-30f, 1e37f}) {
    Matrix<float> logits(1, 4);
    logits << 1.0f, -1.0f, 3.0f, 4.0f;
    logits *= scale;
    const auto selected = test::select(ReluRouting<float>(), logits);
    CHECK(selected.routing.probabilities(0, 0) == Approx(0.125f));
    CHECK(selected.routing.probabilities(0, 2) == Approx(0.375f));
    CHECK(selected.routing.probabilities(0, 3) == Approx(0.5f));
  }
  test::check_selector_gradient(ReluRouting<double>(), 10.0 * test::random_matrix(5, 4, 8));
}

TEMPLATE_TEST_CASE("Renormalised weights are those of the logits where probabilities underflow",
                   "[moe][selector][softmax_top_k][allowed]", float, double) {
  using T = TestType;
  // The group of the best expert has one expert left, and no sum of two: the other one is chosen.
  const GroupLimit groups{.count = 2, .allowed = 1, .summed = 2};
  const std::vector<std::uint8_t> allowed = {1, 0, 1, 1};
  const Pass pass{.training = true, .allowed = allowed};
  Matrix<T> logits(1, 4);
  logits << T(2000), T(0), T(0), T(1);
  const SoftmaxTopK<T> soft({.k = 2, .renormalise = true, .scale = 3.0, .groups = groups});
  auto selected = test::select(soft, logits, pass);
  CHECK(selected.routing.expert == std::vector<Index>{2, 3});
  const double e = std::exp(1.0);
  CHECK(selected.routing.weight[0] == Approx(3.0 / (1.0 + e)));
  CHECK(selected.routing.weight[1] == Approx(3.0 * e / (1.0 + e)));

  const StraightThrough<T> hard({.k = 2, .renormalise = true, .scale = 3.0, .groups = groups});
  auto straight = test::select(hard, logits, pass);
  CHECK(straight.routing.weight[0] == Approx(1.5));
  const auto objective = test::RoutingObjective<T>::random(selected.routing, 5).of_weights();
  const Matrix<T> d = objective.logit_gradient(soft, selected);
  // d g_0 / d z_2 = g_0 g_1 / scale, and so on.
  const double slope = 3.0 * e / (1.0 + e) / (1.0 + e);
  const auto difference = static_cast<double>(objective.c[0] - objective.c[1]);
  CHECK(d(0, 2) == Approx(slope * difference));
  CHECK(d(0, 3) == Approx(-slope * difference));
  CHECK(objective.logit_gradient(hard, straight) == d);
}

TEST_CASE("Renormalised weights have their exact gradient where probabilities underflow",
          "[moe][selector][softmax_top_k][allowed][gradient]") {
  const GroupLimit groups{.count = 2, .allowed = 1, .summed = 2};
  const std::vector<std::uint8_t> allowed = {1, 0, 1, 1};
  const Pass pass{.training = true, .allowed = allowed};
  Matrix<double> logits(1, 4);
  logits << 2000.0, 0.0, 0.0, 1.0;
  for (const double norm : {1.0, 2.0, 3.5}) {
    test::check_selector_gradient(
        SoftmaxTopK<double>({.k = 2, .renormalise = true, .norm = norm, .groups = groups}), logits,
        pass);
  }
}

TEST_CASE("Cosines do not depend on how long the vectors are", "[moe][router][cosine_router]") {
  const float tolerance = 20.0f * std::numeric_limits<float>::epsilon();
  Rng rng(1);
  CosineRouter<float> router(5, 4, rng, {.d_projection = 3, .bias = false});
  const Matrix<float> x = test::random_matrix<float>(6, 5, 2);
  const Matrix<float> logits = infer(router, x);
  const Matrix<float> embedding = router.embedding().value;
  for (const float scale : {1e-33f, 1e-20f, 1e-12f, 1e12f, 1e30f}) {
    INFO("scale " << scale);
    CHECK(test::relative_error(infer(router, scale * x), logits) <= tolerance);
    router.embedding().value = scale * embedding;
    CHECK(test::relative_error(infer(router, x), logits) <= tolerance);
    router.embedding().value = embedding;
  }
}

TEST_CASE("The loss of vectors at right angles does not depend on their length",
          "[moe][balance][orthogonality]") {
  const OrthogonalityLoss<float> loss({.coefficient = 1.0});
  const Matrix<float> weight = test::random_matrix<float>(4, 5, 3);
  const auto gradient_of = [&](const Matrix<float>& w) {
    LinearRouter<float> router(w);
    OrthogonalityLoss<float>::Cache cache;
    const double value = loss.forward(router, cache);
    loss.backward(router, 1.0, cache);
    return std::pair(value, router.weight().gradient());
  };
  const auto [value, gradient] = gradient_of(weight);
  for (const float scale : {1e-33f, 1e-13f, 1e20f}) {
    INFO("scale " << scale);
    const auto [scaled_value, scaled] = gradient_of(scale * weight);
    CHECK(scaled_value == Approx(value).epsilon(1e-5));
    CHECK(test::relative_error(scale * scaled, gradient) <= 1e-5f);
  }
}

TEST_CASE("The slots of SoftMoE do not depend on how long its vectors are", "[moe][soft_moe]") {
  Rng rng(4);
  const GluBank<float> bank(4, 3, 5, rng);
  const Matrix<float> phi = test::random_matrix<float>(3, 4, 5);
  const Matrix<float> x = test::random_matrix<float>(6, 4, 6);
  const auto run = [&](float of_x, float of_phi) {
    SoftMoE layer(of_phi * phi, bank);
    typename decltype(layer)::Cache cache;
    layer.forward(of_x * x, kTraining, cache);
    layer.backward(test::random_matrix<float>(6, 4, 7), cache);
    CHECK(cache.dx.allFinite());
    const Matrix<float> d_phi = of_phi * parameters(layer)[0].parameter->grad;
    return std::pair(Matrix<float>(cache.weights.combine), d_phi);
  };
  const auto [combine, d_phi] = run(1.0f, 1.0f);
  for (const float scale : {1e-30f, 1e-10f, 1e-6f, 1e6f}) {
    INFO("scale " << scale);
    CHECK(test::relative_error(run(scale, 1.0f).first, combine) <= 1e-5f);
    const auto [scaled_combine, scaled] = run(1.0f, scale);
    CHECK(test::relative_error(scaled_combine, combine) <= 1e-5f);
    CHECK(test::relative_error(scaled, d_phi) <= 1e-4f);
  }
}

TEST_CASE("RankPolicy draws for weights of any scale", "[moe][selector][rank_policy]") {
  Matrix<double> logits(1, 2);
  logits << 0.0, std::log(1e-12);
  const RankPolicy policy(
      SoftmaxTopK<double>({.k = 2}),
      {.train = RankRule::kRandom, .train_threshold = {2e-12}, .of_weight = true});
  const auto keeps = [&](double draw) {
    Routing<double> routing = test::route(policy.inner(), logits);
    policy.reject(kTraining, routing, [&](Index) { return draw; });
    return routing.kept[1] != 0;
  };
  CHECK(keeps(0.49));
  CHECK_FALSE(keeps(0.51));
}

}  // namespace weir::common_scale_test
