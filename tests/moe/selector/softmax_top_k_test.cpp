// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "moe/selector/selected.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::softmax_top_k_test {

namespace {

/// One token whose softmax is (0.1, 0.4, 0.2, 0.3).
Matrix<double> tenths() {
  Matrix<double> logits(1, 4);
  logits << std::log(1.0), std::log(4.0), std::log(2.0), std::log(3.0);
  return logits;
}

template <class T>
List<T> weights(const SoftmaxTopKConfig& config, const Matrix<T>& logits) {
  return test::select(SoftmaxTopK<T>(config), logits).routing.weight;
}

/// d(sum of c * weights) / d(logits)
template <class S>
Matrix<double> gradient(const S& selector, const Matrix<double>& logits,
                        const RowVector<double>& c) {
  auto selected = test::select(selector, logits);
  const test::RoutingObjective<double> objective{
      c, Matrix<double>::Zero(logits.rows(), logits.cols())};
  return objective.logit_gradient(selector, selected);
}

}  // namespace

TEST_CASE("SoftmaxTopK matches weights worked out by hand", "[moe][selector][softmax_top_k]") {
  // The two best of (0.1, 0.4, 0.2, 0.3) are experts 1 and 3.
  const Routing<double> routing = test::route(SoftmaxTopK<double>(), tenths());
  CHECK(routing.expert == std::vector<Index>{1, 3});
  CHECK(routing.probabilities(0, 2) == Approx(0.2));

  SECTION("raw: p") {
    CHECK(routing.weight[0] == Approx(0.4));
    CHECK(routing.weight[1] == Approx(0.3));
  }
  SECTION("scaled: 16 p, as DeepSeek-V2") {
    const auto g = weights<double>({.scale = 16.0}, tenths());
    CHECK(g[0] == Approx(6.4));
    CHECK(g[1] == Approx(4.8));
  }
  SECTION("renormalised: p / 0.7") {
    const auto g = weights<double>({.renormalise = true}, tenths());
    CHECK(g[0] == Approx(4.0 / 7.0));
    CHECK(g[1] == Approx(3.0 / 7.0));
  }
  SECTION("renormalised, then scaled") {
    const auto g = weights<double>({.renormalise = true, .scale = 2.5}, tenths());
    CHECK(g[0] == Approx(10.0 / 7.0));
    CHECK(g[1] == Approx(7.5 / 7.0));
  }
  SECTION("norm 2: p / sqrt(0.16 + 0.09)") {
    const auto g = weights<double>({.renormalise = true, .norm = 2.0}, tenths());
    CHECK(g[0] == Approx(0.8));
    CHECK(g[1] == Approx(0.6));
  }
  SECTION("an infinite norm is the largest: p / 0.4") {
    const double inf = std::numeric_limits<double>::infinity();
    const auto g = weights<double>({.renormalise = true, .norm = inf}, tenths());
    CHECK(g[0] == Approx(1.0));
    CHECK(g[1] == Approx(0.75));
  }
}

TEST_CASE("SoftmaxTopK matches gradients worked out by hand", "[moe][selector][softmax_top_k]") {
  SECTION("Switch: k = 1, raw") {
    // dg/dz_e = p_1 (1[e = 1] - p_e) with p = (0.1, 0.4, 0.2, 0.3).
    const auto dz = gradient(SoftmaxTopK<double>({.k = 1}), tenths(), RowVector<double>::Ones(1));
    RowVector<double> expected(4);
    expected << -0.04, 0.24, -0.08, -0.12;
    CHECK(test::relative_error(dz, expected) <= 1e-14);
  }
  SECTION("renormalised, of the first weight") {
    // g = 4/7 is a softmax over experts 1 and 3: dg/dz_1 = -dg/dz_3 = 4/7 * 3/7.
    const auto dz = gradient(SoftmaxTopK<double>({.k = 2, .renormalise = true}), tenths(),
                             RowVector<double>::Unit(2, 0));
    RowVector<double> expected(4);
    expected << 0.0, 12.0 / 49.0, 0.0, -12.0 / 49.0;
    CHECK(test::relative_error(dz, expected) <= 1e-14);
  }
}

TEST_CASE("SoftmaxTopK renormalises to what its norm says", "[moe][selector][softmax_top_k]") {
  const auto k = GENERATE(as<Index>{}, 1, 3, 8);
  const Matrix<double> logits = test::random_matrix(20, 8, 1);

  const auto sums = weights<double>({.k = k, .renormalise = true, .scale = 2.5}, logits);
  const auto squares =
      weights<double>({.k = k, .renormalise = true, .scale = 2.5, .norm = 2.0}, logits);
  const auto raw = weights<double>({.k = k}, logits);
  for (auto first = 0; first < 20 * k; first += static_cast<int>(k)) {
    const auto sum = [&](const List<double>& g) {
      return std::accumulate(g.begin() + first, g.begin() + first + k, 0.0);
    };
    const auto begin = squares.begin() + first;
    CHECK(sum(sums) == Approx(2.5));
    CHECK(std::inner_product(begin, begin + k, begin, 0.0) == Approx(2.5 * 2.5));
    if (k < 8) CHECK(sum(raw) < 1.0);
    if (k == 8) CHECK(sum(raw) == Approx(1.0));
  }
}

TEST_CASE("SoftmaxTopK of all experts is a dense softmax", "[moe][selector][softmax_top_k]") {
  const Matrix<double> logits = test::random_matrix(6, 5, 2);
  const bool renormalise = GENERATE(false, true);
  const Routing<double> routing =
      test::route(SoftmaxTopK<double>({.k = 5, .renormalise = renormalise}), logits);

  for (Index t = 0; t < 6; ++t) {
    const double total = logits.row(t).array().exp().sum();
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      CHECK(routing.weight[a] == Approx(std::exp(logits(t, routing.expert[a])) / total));
    }
  }
}

TEST_CASE("SoftmaxTopK renormalised is TopKSoftmax", "[moe][selector][softmax_top_k]") {
  const auto k = GENERATE(as<Index>{}, 1, 2, 8);
  const Matrix<double> logits = test::random_matrix(30, 8, 3);
  const SoftmaxTopK<double> before({.k = k, .renormalise = true, .scale = 1.5});
  const TopKSoftmax<double> after({.k = k, .scale = 1.5});

  const Routing<double> a = test::route(before, logits);
  const Routing<double> b = test::route(after, logits);
  CHECK(a.expert == b.expert);
  CHECK(a.probabilities == b.probabilities);
  const Eigen::Map<const RowVector<double>> weights_a(a.weight.data(), 30 * k);
  const Eigen::Map<const RowVector<double>> weights_b(b.weight.data(), 30 * k);
  CHECK(test::relative_error(weights_a, weights_b) <= 1e-14);

  const RowVector<double> c = test::random_matrix(1, 30 * k, 4);
  const Matrix<double> dz = gradient(after, logits, c);
  CHECK((gradient(before, logits, c) - dz).norm() <= 1e-14 * std::max(1.0, dz.norm()));
  if (k == 1) CHECK(dz.isZero(1e-15));
}

TEST_CASE("SoftmaxTopK chooses by probability, also where that is zero",
          "[moe][selector][softmax_top_k]") {
  Matrix<float> logits(1, 3);
  logits << 0.0F, -1e4F, -1e3F;  // The softmax is exactly (1, 0, 0): a tie of the last two.
  CHECK(test::select(SoftmaxTopK<float>(), logits).routing.expert == std::vector<Index>{0, 1});
  CHECK(test::select(TopKSoftmax<float>(), logits).routing.expert == std::vector<Index>{0, 2});
}

TEST_CASE("SoftmaxTopK has weights under any norm", "[moe][selector][softmax_top_k]") {
  // 1/16^norm is below what a float can hold for the larger ones.
  const double norm = GENERATE(1.0, 1.5, 30.0, 1e3, 1e6);
  const Matrix<float> equal = Matrix<float>::Zero(1, 16);
  const auto g = weights<float>({.k = 4, .renormalise = true, .norm = norm}, equal);
  CHECK(g[0] == Approx(std::pow(4.0, -1.0 / norm)));
  CHECK(g[3] == g[0]);
}

TEST_CASE("SoftmaxTopK names the setting that is out of range", "[moe][selector][softmax_top_k]") {
  const auto message = [](const SoftmaxTopKConfig& config) {
    return test::message_of<ConfigError>([&] { weights(config, tenths()); });
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(message({.k = 0}) == "SoftmaxTopK: k = 0, expected 1 <= k <= experts = 4");
  CHECK(message({.k = 5}) == "SoftmaxTopK: k = 5, expected 1 <= k <= experts = 4");
  CHECK(message({.scale = 0.0}) == "SoftmaxTopK: scale = 0, expected a finite number > 0");
  CHECK(message({.scale = nan}) == "SoftmaxTopK: scale = nan, expected a finite number > 0");
  CHECK(message({.norm = 0.5}) == "SoftmaxTopK: norm = 0.5, expected >= 1");
  CHECK(message({.k = 4}) == "no exception");
}

}  // namespace weir::softmax_top_k_test
