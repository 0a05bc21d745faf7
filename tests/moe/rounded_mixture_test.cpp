// SPDX-License-Identifier: MIT
// A mixture of experts in training with rounded products, against the scheme computed apart in
// double.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/clamped_glu_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/optim/set_precision.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/rounded_glu.hpp"
#include "support/rounded_products.hpp"
#include "support/threads.hpp"

namespace weir::rounded_mixture_test {

using test::Real;

namespace {

constexpr Index kTokens = 300;
constexpr Index kModel = 140;
constexpr Index kHidden = 130;
constexpr Index kExperts = 4;

auto make_layer() {
  Rng rng(1);
  LinearRouter<float> router(kModel, kExperts, rng, {.init_scale = 10.0});
  return MoELayer(std::move(router), TopKSoftmax<float>({.k = 2}), Dropless(),
                  GluBank<float>(kModel, kExperts, kHidden, rng));
}

Real real(const Matrix<float>& m) {
  return m.cast<double>();
}

/// Two choices per token, softmax over the two; experts get their tokens in order.
struct Expected {
  Expected(Precision precision, const Real& x, const Real& dy, const Real& router,
           const std::vector<Real>& w)
      : y(Real::Zero(kTokens, kModel)), dx(Real::Zero(kTokens, kModel)) {
    const Real logits = x * router.transpose();
    Real weights = Real::Zero(kTokens, kExperts);
    Real d_weights = Real::Zero(kTokens, kExperts);
    for (Index t = 0; t < kTokens; ++t) {
      Index best = 0;
      logits.row(t).maxCoeff(&best);
      Real rest = logits.row(t);
      rest(0, best) = -HUGE_VAL;
      Index second = 0;
      rest.row(0).maxCoeff(&second);
      const double share = 1.0 / (1.0 + std::exp(logits(t, second) - logits(t, best)));
      weights(t, best) = share;
      weights(t, second) = 1.0 - share;
    }
    for (Index e = 0; e < kExperts; ++e) {
      std::vector<Index> tokens;
      for (Index t = 0; t < kTokens; ++t) {
        if (weights(t, e) > 0.0) tokens.push_back(t);
      }
      const auto count = static_cast<Index>(tokens.size());
      Real x_e(count, kModel);
      Real dy_e(count, kModel);
      for (Index i = 0; i < count; ++i) {
        const Index t = tokens[static_cast<std::size_t>(i)];
        x_e.row(i) = x.row(t);
        dy_e.row(i) = weights(t, e) * dy.row(t);
      }
      const auto at = static_cast<std::size_t>(3 * e);
      const test::RoundedGlu expert(precision, x_e, w[at], w[at + 1], w[at + 2]);
      const test::RoundedGlu::Gradients d = expert.backward(dy_e);
      for (Index i = 0; i < count; ++i) {
        const Index t = tokens[static_cast<std::size_t>(i)];
        y.row(t) += weights(t, e) * expert.y.row(i);
        dx.row(t) += d.x.row(i);
        d_weights(t, e) = dy.row(t).dot(expert.y.row(i));
      }
      for (const Real& gradient : {d.gate, d.up, d.down}) gradients.push_back(gradient);
    }
    Real d_logits = Real::Zero(kTokens, kExperts);
    for (Index t = 0; t < kTokens; ++t) {
      const double mean = weights.row(t).dot(d_weights.row(t));
      for (Index e = 0; e < kExperts; ++e) {
        d_logits(t, e) = weights(t, e) * (d_weights(t, e) - mean);
      }
    }
    dx += d_logits * router;
    gradients.insert(gradients.begin(), d_logits.transpose() * x);
  }

  Real y, dx;
  std::vector<Real> gradients;  // Of the router, and of gate, up and down of each expert.
};

}  // namespace

TEST_CASE("A mixture's experts are trained with products of the scheme, its router in full",
          "[moe][precision]") {
  const Precision precision = GENERATE(Precision::kBfloat16, Precision::kFp8);
  auto layer = make_layer();
  set_precision(layer, precision);
  const Matrix<float> x = test::random_matrix<float>(kTokens, kModel, 2);
  const Matrix<float> dy = 1e-2F * test::random_matrix<float>(kTokens, kModel, 3);
  decltype(layer)::Cache cache;
  const Matrix<float> y = layer.forward(x, kTraining, cache);
  const Matrix<float> dx = layer.backward(dy, cache);

  const auto named = parameters(layer);
  std::vector<Real> weights;
  for (const auto& [name, parameter] : named) {
    if (name != "router.weight") weights.push_back(real(parameter->value));
  }
  REQUIRE(named[0].name == "router.weight");
  REQUIRE(named[1].name == "experts.0.gate");
  const Expected expected(precision, real(x), real(dy), real(named[0].parameter->value), weights);
  // Next to the border between two codes, float and double may choose another one.
  const double most = precision == Precision::kFp8 ? 4e-3 : 4e-4;
  CHECK(test::relative_error(real(y), expected.y) < most);
  CHECK(test::relative_error(real(dx), expected.dx) < most);
  for (std::size_t i = 0; i < named.size(); ++i) {
    INFO(named[i].name);
    const double error =
        test::relative_error(real(named[i].parameter->grad), expected.gradients[i]);
    CHECK(error < most);
  }
}

namespace {

template <class Bank>
void check_bank(Bank bank, Precision precision) {
  const auto steps = [&] {
    Rng rng(1);
    LinearRouter<float> router(kModel, kExperts, rng, {.init_scale = 10.0});
    MoELayer layer(std::move(router), TopKSoftmax<float>({.k = 2}), Dropless(), bank);
    typename decltype(layer)::Cache cache;
    const Matrix<float> x = test::random_matrix<float>(40, kModel, 2);
    std::vector<Matrix<float>> all = {layer.forward(x, kTraining, cache)};
    all.push_back(layer.backward(test::random_matrix<float>(40, kModel, 3), cache));
    for (const auto& [name, parameter] : parameters(layer)) all.push_back(parameter->gradient());
    return all;
  };
  const auto exact = steps();
  set_precision(bank, precision);
  const auto rounded = steps();
  {
    const test::Threads threads(2);
    CHECK(steps() == rounded);
  }
  for (std::size_t i = 0; i < exact.size(); ++i) {
    INFO("result " << i);
    const double error = test::relative_error(rounded[i], exact[i]);
    if (exact[i].rows() > 1) CHECK(error > 1e-4);  // Biases have no products.
    CHECK(error < 0.25);                           // A ReLU next to zero may open or close.
  }
}

}  // namespace

TEST_CASE("Banks of all kinds are trained with rounded products", "[moe][experts][precision]") {
  const Precision precision = GENERATE(Precision::kBfloat16, Precision::kFp8);
  Rng rng(1);
  check_bank(GluBank<float>(kModel, kExperts, 50, rng), precision);
  check_bank(MlpBank<float>(kModel, kExperts, 50, rng), precision);
  check_bank(ClampedGluBank<float>(kModel, kExperts, 50, rng), precision);
}

TEST_CASE("Dropout drops the same hidden numbers where they are computed again",
          "[moe][experts][dropout][precision]") {
  const auto gradients = [&](Precision precision) {
    Rng rng(1);
    LinearRouter<float> router(kModel, kExperts, rng, {.init_scale = 10.0});
    MoELayer layer(std::move(router), TopKSoftmax<float>({.k = 2}), Dropless(),
                   GluBank<float>(kModel, kExperts, 50, rng, {.dropout = 0.5}));
    set_precision(layer, precision);
    typename decltype(layer)::Cache cache;
    Rng draws(5);
    layer.forward(test::random_matrix<float>(40, kModel, 2), {.training = true, .rng = &draws},
                  cache);
    layer.backward(test::random_matrix<float>(40, kModel, 3), cache);
    std::vector<Matrix<float>> all;
    for (const auto& [name, parameter] : parameters(layer)) all.push_back(parameter->gradient());
    return all;
  };
  const auto exact = gradients(Precision::kFull);
  const auto rounded = gradients(Precision::kFp8);
  for (std::size_t i = 0; i < exact.size(); ++i) {
    CHECK(test::relative_error(rounded[i], exact[i]) < 0.25);
  }
}

}  // namespace weir::rounded_mixture_test
