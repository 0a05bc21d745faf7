// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/loss_gradient.hpp"
#include "support/routing.hpp"

namespace weir::importance_loss_test {
using test::logit_gradient;
using test::loss_of;
using test::route;

static_assert(RoutingLoss<ImportanceLoss<float>, float>);
static_assert(!ObservingBalancer<ImportanceLoss<float>, float>);

namespace {

/// Softmax rows (2, 1, 1)/4 and twice (1, 2, 1)/4.
Matrix<double> three_tokens() {
  const double two = std::log(2.0);
  Matrix<double> logits(3, 3);
  logits << two, 0.0, 0.0, 0.0, two, 0.0, 0.0, two, 0.0;
  return logits;
}

}  // namespace

TEST_CASE("ImportanceLoss matches a case worked out by hand", "[moe][balance][importance_loss]") {
  // With k = 1 and raw weights the importance is (1/2, 1, 0): mean 1/2, deviations 0, 1/2, -1/2,
  // their squares sum to 1/2. Population: (1/6) / (1/4) = 2/3. Sample: (1/4) / (1/4) = 1.
  Routing<double> routing = route(SoftmaxTopK<double>({.k = 1}), three_tokens());
  CHECK(loss_of(ImportanceLoss<double>({.coefficient = 0.1}), routing) == Approx(0.1 * 2.0 / 3.0));
  CHECK(loss_of(ImportanceLoss<double>({.coefficient = 0.1, .variance = Variance::kSample}),
                routing) == Approx(0.1));

  test::limit(FixedCapacity({.capacity = 1}),
              routing);  // Drops one assignment, which counts all the same.
  CHECK(loss_of(ImportanceLoss<double>({.coefficient = 0.1}), routing) == Approx(0.1 * 2.0 / 3.0));
}

TEST_CASE("ImportanceLoss is zero where all experts weigh the same",
          "[moe][balance][importance_loss]") {
  const auto variance = GENERATE(Variance::kPopulation, Variance::kSample);
  const ImportanceLoss<double> balancer({.coefficient = 1.0, .variance = variance});
  const SoftmaxTopK<double> all({.k = 4, .renormalise = true});
  const Routing<double> routing = route(all, Matrix<double>::Zero(6, 4));
  CHECK(loss_of(balancer, routing) == 0.0);
  CHECK(logit_gradient(all, balancer, Matrix<double>::Zero(6, 4)).isZero(1e-15));
}

TEST_CASE("ImportanceLoss of one expert, or of no tokens, is zero",
          "[moe][balance][importance_loss]") {
  const auto variance = GENERATE(Variance::kPopulation, Variance::kSample);
  const ImportanceLoss<double> balancer({.coefficient = 1.0, .variance = variance});
  const SoftmaxTopK<double> selector({.k = 1});
  const Routing<double> one = route(selector, test::random_matrix(3, 1, 1));
  CHECK(loss_of(balancer, one) == 0.0);
  CHECK(logit_gradient(selector, balancer, test::random_matrix(3, 1, 1)).isZero(0.0));

  const Routing<double> none = route(selector, Matrix<double>(0, 3));
  CHECK(loss_of(balancer, none) == 0.0);
  CHECK(logit_gradient(selector, balancer, Matrix<double>(0, 3)).rows() == 0);

  const std::vector<std::uint8_t> mask = {0, 0};
  const Routing<double> padding = route(selector, Matrix<double>::Ones(2, 3), {.mask = mask});
  CHECK(loss_of(balancer, padding) == 0.0);
  CHECK(logit_gradient(selector, balancer, Matrix<double>::Ones(2, 3), {.mask = mask}).isZero(0.0));
}

TEST_CASE("ImportanceLoss does not see padding", "[moe][balance][importance_loss]") {
  Matrix<double> padded(4, 3);
  padded << three_tokens(), Matrix<double>::Constant(1, 3, NAN);
  const std::vector<std::uint8_t> mask = {1, 1, 1, 0};
  CHECK(loss_of(ImportanceLoss<double>(),
                route(SoftmaxTopK<double>({.k = 1}), padded, {.mask = mask})) ==
        loss_of(ImportanceLoss<double>(), route(SoftmaxTopK<double>({.k = 1}), three_tokens())));
}

TEST_CASE("ImportanceLoss gradient agrees with finite differences",
          "[moe][balance][importance_loss][gradient]") {
  Matrix<double> logits = test::random_matrix(7, 5, 2);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 1};
  const Pass pass{.mask = mask};
  const auto variance = GENERATE(Variance::kPopulation, Variance::kSample);
  const ImportanceLoss<double> balancer({.coefficient = 0.5, .variance = variance});
  const auto check = [&](const auto& selector) {
    test::check_logit_gradient(selector, balancer, logits, pass);
  };
  check(SoftmaxTopK<double>({.k = 2}));
  check(SoftmaxTopK<double>({.k = 2, .renormalise = true, .scale = 2.5}));
  check(SigmoidTopK<double>(5, {.k = 2}));
}

TEST_CASE("squared_variation gradient agrees with finite differences",
          "[moe][balance][importance_loss][gradient]") {
  const auto variance = GENERATE(Variance::kPopulation, Variance::kSample);
  Matrix<double> values(1, 4);
  values << 0.3, 2.0, 1.1, 0.0;
  const auto value = [&] { return squared_variation<double>(values.row(0), variance); };
  RowVector<double> analytic;
  CHECK(squared_variation<double>(values.row(0), variance, &analytic) == value());
  CHECK(test::relative_error(analytic, test::numeric_gradient(values, value)) <= 1e-8);
}

TEST_CASE("ImportanceLoss refuses a negative coefficient", "[moe][balance][importance_loss]") {
  CHECK(test::message_of<ConfigError>([] { ImportanceLoss<float>({.coefficient = -1.0}); }) ==
        "ImportanceLoss: coefficient = -1, expected a finite number >= 0");
}

}  // namespace weir::importance_loss_test
