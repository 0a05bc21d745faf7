// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <utility>
#include <vector>

#include <weir/moe/balance/load_loss.hpp>
#include <weir/moe/balance/squared_variation.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/noisy_routing.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::load_loss_test {
using test::gradient_of;
using test::loss_of;
using test::route;

static_assert(RoutingLoss<LoadLoss<float>, float>);
static_assert(!ObservingBalancer<LoadLoss<float>, float>);

namespace {

/// Clean logits, standard deviations of their noise, and draws.
struct Noisy {
  Noisy(Index tokens, Index experts, std::uint64_t seed)
      : clean(test::random_matrix(tokens, experts, seed)),
        std(test::random_matrix(tokens, experts, seed + 1).cwiseAbs().array() + 0.1),
        noise(test::random_matrix(tokens, experts, seed + 2)) {}

  Matrix<double> logits() const { return clean + noise.cwiseProduct(std); }

  test::NoisyRouting<double> routing(Index k, const Pass& pass = {}) const {
    return {route(TopKSoftmax<double>({.k = k}), logits(), pass), {{clean, std}}};
  }

  Matrix<double> clean, std, noise;
};

RowVector<double> load_of(const Routing<double>& routing) {
  LoadLoss<double>::Cache cache;
  LoadLoss<double>().forward(routing, cache);
  return cache.load;
}

double phi(double z) {
  return 0.5 * std::erfc(-z / std::numbers::sqrt2);
}

}  // namespace

TEST_CASE("LoadLoss matches probabilities worked out by hand", "[moe][balance][load_loss]") {
  // The noisy logits are 3, 2, 1. With k = 1 expert 0 has to exceed 2, the others 3; with k = 2 the
  // experts 0 and 1 have to exceed 1, the last one 2.
  Noisy noisy(1, 3, 1);
  noisy.clean << 2.5, 1.0, 2.0;
  noisy.std << 0.5, 1.0, 2.0;
  noisy.noise << 1.0, 1.0, -0.5;
  const RowVector<double> one = load_of(noisy.routing(1));
  CHECK(one[0] == Approx(phi(1.0)));
  CHECK(one[1] == Approx(phi(-2.0)));
  CHECK(one[2] == Approx(phi(-0.5)));
  const RowVector<double> two = load_of(noisy.routing(2));
  CHECK(two[0] == Approx(phi(3.0)));
  CHECK(two[1] == Approx(phi(0.0)));
  CHECK(two[2] == Approx(phi(0.0)));
  CHECK(loss_of(LoadLoss<double>({.coefficient = 0.5}), noisy.routing(1)) ==
        Approx(0.5 * squared_variation<double>(one, Variance::kPopulation)));
  CHECK(loss_of(LoadLoss<double>({.coefficient = 0.5, .variance = Variance::kSample}),
                noisy.routing(1)) ==
        Approx(0.5 * squared_variation<double>(one, Variance::kSample)));
}

TEST_CASE("LoadLoss estimates how often an expert is chosen when its noise is drawn again",
          "[moe][balance][load_loss]") {
  Noisy noisy(1, 6, 4);
  const Index k = GENERATE(1, 2, 5);
  const RowVector<double> load = load_of(noisy.routing(k));
  Rng rng(5);
  constexpr int kDraws = 2000;
  for (Index e = 0; e < 6; ++e) {
    Noisy again = noisy;
    int chosen = 0;
    for (int i = 0; i < kDraws; ++i) {
      again.noise(0, e) = rng.normal();
      const Matrix<double> z = again.logits();
      chosen += (z.array() > z(0, e)).count() < k ? 1 : 0;
    }
    CHECK(static_cast<double>(chosen) / kDraws == Approx(load[e]).margin(0.04));
  }
}

TEST_CASE("LoadLoss agrees with the sorted thresholds of the paper", "[moe][balance][load_loss]") {
  Rng rng(6);
  for (int trial = 0; trial < 20; ++trial) {
    const Index experts = 2 + rng.below(20);
    const Index k = 1 + rng.below(experts - 1);
    const Index tokens = 1 + rng.below(9);
    const Noisy noisy(tokens, experts, rng.bits());
    const Matrix<double> z = noisy.logits();
    RowVector<double> expected = RowVector<double>::Zero(experts);
    for (Index t = 0; t < tokens; ++t) {
      std::vector<double> sorted(z.row(t).begin(), z.row(t).end());
      std::sort(sorted.rbegin(), sorted.rend());
      const auto rank = static_cast<std::size_t>(k);
      for (Index e = 0; e < experts; ++e) {
        const double threshold = z(t, e) > sorted[rank] ? sorted[rank] : sorted[rank - 1];
        expected[e] += phi((noisy.clean(t, e) - threshold) / noisy.std(t, e));
      }
    }
    CHECK(test::relative_error(load_of(noisy.routing(k)), expected) <= 1e-13);
  }
}

TEST_CASE("LoadLoss counts where there is nothing to estimate", "[moe][balance][load_loss]") {
  const Noisy noisy(5, 4, 7);
  const LoadLoss<double> balancer({.coefficient = 1.0});
  const auto flat = [](const RoutingGradient<double>& gradient) {
    return gradient.logits.isZero(0.0) && gradient.weights.isZero(0.0) &&
           gradient.probabilities.isZero(0.0);
  };
  Routing<double> quiet = noisy.routing(2);
  quiet.noise = {};
  RowVector<double> count = RowVector<double>::Zero(4);
  quiet.add_load(0, 5, count);
  CHECK(load_of(quiet) == count);
  CHECK(flat(gradient_of(balancer, quiet)));

  const test::NoisyRouting<double> all = noisy.routing(4);
  CHECK(load_of(all) == RowVector<double>::Constant(4, 5.0));
  CHECK(loss_of(balancer, all) == 0.0);
  const RoutingGradient<double> gradient = gradient_of(balancer, all);
  CHECK(flat(gradient));
  CHECK(gradient.noise.back().clean.isZero(0.0));
  CHECK(gradient.noise.back().deviation.isZero(0.0));

  test::NoisyRouting<double> certain = noisy.routing(2);
  certain.levels.back().deviation.setZero();
  CHECK(load_of(certain) == count);
  CHECK(gradient_of(balancer, certain).noise.back().clean.isZero(0.0));
}

TEST_CASE("LoadLoss gives a forbidden expert no load", "[moe][balance][load_loss]") {
  test::NoisyRouting<double> routing = Noisy(2, 3, 8).routing(1);
  routing.logits << 1.0, 0.5, -INFINITY, 1.0, -INFINITY, -INFINITY;
  routing.expert = {0, 0};
  const RowVector<double> load = load_of(routing);
  CHECK(load[0] == Approx(1.0 + phi((routing.levels.back().clean(0, 0) - 0.5) /
                                    routing.levels.back().deviation(0, 0))));
  CHECK(load[2] == 0.0);
  const RoutingGradient<double> gradient =
      gradient_of(LoadLoss<double>({.coefficient = 1.0}), routing);
  CHECK(gradient.logits.allFinite());
  CHECK(gradient.noise.back().clean.allFinite());
  CHECK(gradient.noise.back().deviation.allFinite());
  CHECK(gradient.noise.back().clean.row(1).isZero(0.0));
  CHECK(gradient.logits(0, 2) == 0.0);
}

TEST_CASE("LoadLoss of one expert, or of no tokens, is zero", "[moe][balance][load_loss]") {
  const auto variance = GENERATE(Variance::kPopulation, Variance::kSample);
  const LoadLoss<double> balancer({.coefficient = 1.0, .variance = variance});
  CHECK(loss_of(balancer, Noisy(3, 1, 9).routing(1)) == 0.0);
  CHECK(loss_of(balancer, Noisy(0, 3, 9).routing(1)) == 0.0);
  CHECK(gradient_of(balancer, Noisy(0, 3, 9).routing(1)).noise.back().clean.rows() == 0);
  CHECK(load_of(Noisy(1, 3, 9).routing(1)).size() == 3);
}

TEST_CASE("LoadLoss does not see padding", "[moe][balance][load_loss]") {
  Noisy noisy(4, 3, 10);
  const std::vector<std::uint8_t> mask = {1, 1, 1, 0};
  const Pass pass{.mask = mask};
  const RowVector<double> load = load_of(noisy.routing(1, pass));
  noisy.clean.row(3).setConstant(NAN);
  const test::NoisyRouting<double> routing = noisy.routing(1, pass);
  CHECK(load_of(routing) == load);
  CHECK(gradient_of(LoadLoss<double>({.coefficient = 1.0}), routing)
            .noise.back()
            .clean.row(3)
            .isZero(0.0));
}

TEST_CASE("LoadLoss gradient agrees with finite differences",
          "[moe][balance][load_loss][gradient]") {
  const Index experts = GENERATE(5, 11);
  const Index k = GENERATE(1, 3);
  const auto variance = GENERATE(Variance::kPopulation, Variance::kSample);
  const LoadLoss<double> balancer({.coefficient = 0.5, .variance = variance});
  test::NoisyRouting<double> routing = Noisy(6, experts, 11).routing(k);
  const auto loss = [&] { return loss_of(balancer, routing); };
  const RoutingGradient<double> gradient = gradient_of(balancer, routing);
  const auto check = [&](const Matrix<double>& analytic, Matrix<double>& x) {
    CHECK(test::relative_error(analytic, test::numeric_gradient(x, loss)) <= 1e-6);
    CHECK(analytic.norm() > 1e-3);
  };
  check(gradient.noise.back().clean, routing.levels.back().clean);
  check(gradient.noise.back().deviation, routing.levels.back().deviation);
  check(gradient.logits, routing.logits);  // The thresholds alone, the choice being fixed.
}

TEST_CASE("LoadLoss gives the same bits on any number of threads, and scales its gradient",
          "[moe][balance][load_loss]") {
  const test::NoisyRouting<double> routing = Noisy(300, 13, 12).routing(3);
  const LoadLoss<double> balancer({.coefficient = 1.0});
  const double loss = loss_of(balancer, routing);
  const RoutingGradient<double> gradient = gradient_of(balancer, routing);
  const RoutingGradient<double> twice = gradient_of(balancer, routing, 2.0);
  CHECK(twice.noise.back().clean == 2.0 * gradient.noise.back().clean);
  const test::Threads threads(3);
  CHECK(loss_of(balancer, routing) == loss);
  CHECK(gradient_of(balancer, routing).logits == gradient.logits);
  CHECK(gradient_of(balancer, routing).noise.back().deviation == gradient.noise.back().deviation);
}

TEST_CASE("LoadLoss works in float", "[moe][balance][load_loss]") {
  const Noisy noisy(6, 5, 13);
  const test::NoisyRouting<double> routing = noisy.routing(2);
  Routing<float> choice;
  TopKSoftmax<float>::Cache selector_cache;
  TopKSoftmax<float>({.k = 2}).forward(noisy.logits().cast<float>(), {}, choice, selector_cache);
  const test::NoisyRouting<float> single(std::move(choice),
                                         {{noisy.clean.cast<float>(), noisy.std.cast<float>()}});
  const LoadLoss<float> loss({.coefficient = 0.5});
  const LoadLoss<double> expected({.coefficient = 0.5});
  CHECK(loss_of(loss, single) == Approx(loss_of(expected, routing)).epsilon(1e-4));
  const Matrix<float> d_clean = gradient_of(loss, single).noise.back().clean;
  CHECK(test::relative_error(d_clean.cast<double>(),
                             gradient_of(expected, routing).noise.back().clean) <= 1e-4);
}

TEST_CASE("LoadLoss refuses a negative coefficient", "[moe][balance][load_loss]") {
  CHECK(test::message_of<ConfigError>([] { LoadLoss<float>({.coefficient = -1.0}); }) ==
        "LoadLoss: coefficient = -1, expected a finite number >= 0");
}

}  // namespace weir::load_loss_test
