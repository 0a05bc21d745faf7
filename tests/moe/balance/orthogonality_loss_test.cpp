// SPDX-License-Identifier: MIT
#include <cmath>
#include <utility>

#include <weir/moe/balance/orthogonality_loss.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/cosine_router.hpp>
#include <weir/moe/router/hash_router.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/threads.hpp"

namespace weir::orthogonality_loss_test {

static_assert(RouterLoss<OrthogonalityLoss<float>, LinearRouter<float>>);
static_assert(RouterLoss<OrthogonalityLoss<float>, JitterRouter<LinearRouter<float>>>);
static_assert(!RouterLoss<OrthogonalityLoss<float>, LinearRouter<double>>);
static_assert(!RoutingLoss<OrthogonalityLoss<float>, float>);

namespace {

using Loss = OrthogonalityLoss<double>;

template <Router R>
double loss_of(const R& router, const Loss& loss) {
  Loss::Cache cache;
  return loss.forward(router, cache);
}

double loss_of(const Matrix<double>& weight, const Loss& loss) {
  return loss_of(LinearRouter<double>(weight), loss);
}

/// The gradient that a forward and a backward pass add to that of the vectors.
template <class R>
Matrix<double> added_gradient(const Loss& loss, R& router, double scale) {
  const Matrix<double> before = router.expert_vectors()->gradient();
  Loss::Cache cache;
  static_cast<void>(loss.forward(router, cache));
  loss.backward(router, scale, cache);
  return router.expert_vectors()->gradient() - before;
}

Matrix<double> gradient_of(const Matrix<double>& weight, const Loss& loss) {
  LinearRouter<double> router(weight);
  return added_gradient(loss, router, 1.0);
}

/// The definition, element by element.
double reference(const Matrix<double>& weight, Index groups) {
  const Index size = weight.rows() / groups;
  double sum = 0.0;
  Index elements = 0;
  for (Index i = 0; i < weight.rows(); ++i) {
    for (Index j = 0; j < weight.rows(); ++j) {
      if (i / size != j / size) continue;
      const double cosine =
          weight.row(i).dot(weight.row(j)) / (weight.row(i).norm() * weight.row(j).norm());
      const double g = cosine - (i == j ? 1.0 : 0.0);
      sum += g * g;
      ++elements;
    }
  }
  return sum / static_cast<double>(elements);
}

}  // namespace

TEST_CASE("OrthogonalityLoss matches values worked out by hand", "[moe][balance][orthogonality]") {
  const Loss whole({.coefficient = 0.5});
  SECTION("vectors at right angles, of any length") {
    Matrix<double> weight(2, 3);
    weight << 2.0, 0.0, 0.0, 0.0, -3.0, 4.0;
    CHECK(std::abs(loss_of(weight, whole)) < 1e-15);
    CHECK(gradient_of(weight, whole).norm() < 1e-15);
  }
  SECTION("two vectors") {
    // (3, 4)/5 . (0, 1) = 0.8; the mean of 0, 0.64, 0.64, 0 is 0.32.
    Matrix<double> weight(2, 2);
    weight << 3.0, 4.0, 0.0, 1.0;
    CHECK(loss_of(weight, whole) == Approx(0.5 * 0.32));
    // loss = 0.5 * 2 cos^2 / 4, d loss / d cos = 0.4; d cos / d w_0 =
    // ((0, 1) - 0.8 (0.6, 0.8)) / 5, d cos / d w_1 = (0.6, 0.8) - 0.8 (0, 1).
    Matrix<double> expected(2, 2);
    expected << -0.096, 0.072, 0.6, 0.0;
    expected *= 0.4;
    const Matrix<double> actual = gradient_of(weight, whole);
    CHECK(test::relative_error(actual, expected) < 1e-14);
  }
  SECTION("in groups") {
    // 1.28 of (3, 4) and (0, 1), 2 of twice (1, 0), over 8 elements.
    Matrix<double> weight(4, 2);
    weight << 3.0, 4.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0;
    CHECK(loss_of(weight, Loss({.coefficient = 0.5, .groups = 2})) == Approx(0.5 * 0.41));
    CHECK(loss_of(weight, Loss({.coefficient = 0.5, .groups = 4})) < 1e-30);
  }
  SECTION("three vectors in a plane, as far apart as they can be") {
    Matrix<double> weight(3, 2);
    weight << 1.0, 0.0, -0.5, std::sqrt(0.75), -0.5, -std::sqrt(0.75);
    CHECK(loss_of(weight, whole) == Approx(0.5 * (1.0 / 2.0 - 1.0 / 3.0)));
    CHECK(gradient_of(weight, whole).norm() < 1e-15);
  }
}

TEST_CASE("OrthogonalityLoss is its definition in any setting", "[moe][balance][orthogonality]") {
  Rng rng(1);
  for (int draw = 0; draw < 100; ++draw) {
    const Index groups = 1 + rng.below(4);
    const Index experts = groups * (1 + rng.below(6));
    const Index d = 1 + rng.below(20);
    const Matrix<double> weight = normal_init<double>(experts, d, 1.0, rng);
    INFO(experts << " experts of " << d << " in " << groups << " groups");
    const Loss loss({.coefficient = 0.3, .groups = groups});
    const double actual = loss_of(weight, loss);
    REQUIRE(std::abs(actual - 0.3 * reference(weight, groups)) <= 1e-14);
    const double least =
        1.0 / static_cast<double>(d) - static_cast<double>(groups) / static_cast<double>(experts);
    REQUIRE(actual >= 0.3 * std::max(0.0, least) - 1e-14);

    // Only angles count, and each vector may only turn.
    Matrix<double> longer = weight;
    longer.row(0) *= 7.0;
    REQUIRE(std::abs(loss_of(longer, loss) - actual) <= 1e-14);
    const Matrix<double> gradient = gradient_of(weight, loss);
    REQUIRE(gradient.cwiseProduct(weight).rowwise().sum().cwiseAbs().maxCoeff() <= 1e-13);
  }
}

TEST_CASE("OrthogonalityLoss of zero vectors and of one expert is defined",
          "[moe][balance][orthogonality]") {
  const Loss loss({.coefficient = 0.5});
  SECTION("a zero vector counts -1 with itself and has no gradient") {
    Matrix<double> weight(3, 2);
    weight << 3.0, 4.0, 0.0, 0.0, 0.0, 1.0;
    CHECK(loss_of(weight, loss) == Approx(0.5 * (1.28 + 1.0) / 9.0));
    const Matrix<double> gradient = gradient_of(weight, loss);
    CHECK(gradient.allFinite());
    CHECK(gradient.row(1).isZero(0.0));
    CHECK(gradient.row(0).norm() > 0.01);
  }
  SECTION("all zero") {
    CHECK(loss_of(Matrix<double>::Zero(4, 3), loss) == Approx(0.5 / 4.0));
    CHECK(gradient_of(Matrix<double>::Zero(4, 3), loss).isZero(0.0));
  }
  SECTION("one expert") {
    CHECK(loss_of(test::random_matrix(1, 3, 1), loss) < 1e-30);
    CHECK(gradient_of(test::random_matrix(1, 3, 1), loss).norm() < 1e-15);
  }
}

TEST_CASE("OrthogonalityLoss gradient agrees with finite differences, times the scale",
          "[moe][balance][orthogonality][gradient]") {
  const auto groups = GENERATE(as<Index>{}, 1, 2, 3);
  const Loss loss({.coefficient = 0.7, .groups = groups});
  const auto check = [&](auto& router) {
    Parameter<double>& vectors = *router.expert_vectors();
    vectors.gradient().setConstant(1.0);
    const Matrix<double> added = added_gradient(loss, router, 2.0);
    const Matrix<double> numeric =
        test::numeric_gradient(vectors.value, [&] { return 2.0 * loss_of(router, loss); });
    CHECK(test::relative_error(added, numeric) <= 1e-6);
  };
  LinearRouter<double> linear(test::random_matrix(6, 4, 1));
  check(linear);
  Rng rng(2);
  CosineRouter<double> cosine(3, 6, rng, {.d_projection = 4});
  cosine.embedding().value *= 100.0;  // Large beside the step of the differences.
  check(cosine);
}

TEST_CASE("OrthogonalityLoss gives the same bits on any number of threads and allocates nothing",
          "[moe][balance][orthogonality]") {
  LinearRouter<float> router(test::random_matrix<float>(64, 96, 1));
  const OrthogonalityLoss<float> loss({.groups = 2});
  OrthogonalityLoss<float>::Cache cache;
  const auto run = [&](int threads) {
    const test::Threads set(threads);
    router.weight().gradient().setZero();
    const double value = loss.forward(router, cache);
    loss.backward(router, 1.0, cache);
    return std::pair(value, Matrix<float>(router.weight().gradient()));
  };
  CHECK(run(1) == run(3));
  if (!test::allocations_are_counted()) return;
  CHECK(test::count_allocations([&] {
          loss.forward(router, cache);
          loss.backward(router, 1.0, cache);
        }) == 0);
}

TEST_CASE("OrthogonalityLoss refuses what it cannot serve", "[moe][balance][orthogonality]") {
  const auto message = [](const OrthogonalityLossConfig& config) {
    return test::message_of<ConfigError>([&] { const Loss refused(config); });
  };
  CHECK(message({.coefficient = -1.0}) ==
        "OrthogonalityLoss: coefficient = -1, expected a finite number >= 0");
  CHECK(message({.coefficient = NAN}) ==
        "OrthogonalityLoss: coefficient = nan, expected a finite number >= 0");
  CHECK(message({.groups = 0}) == "OrthogonalityLoss: groups = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([&] {
          loss_of(test::random_matrix(4, 3, 1), Loss({.groups = 3}));
        }) == "OrthogonalityLoss: groups = 3, expected a divisor of experts = 4");
  const HashRouter<float> hash(3, 4, modulo_hash_table(10, 4));
  CHECK(test::message_of<ConfigError>([&] { OrthogonalityLoss<float>().check_router(hash); }) ==
        "OrthogonalityLoss: the router has no vectors of its experts, expected one such as "
        "LinearRouter");
}

}  // namespace weir::orthogonality_loss_test
