// SPDX-License-Identifier: MIT
#include <vector>

#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/any_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"

using namespace weir;

static_assert(ExpertBank<AnyBank<Glu<float>>>);
static_assert(ExpertBank<AnyBank<Linear<double>>>);

namespace {

/// y = a x: a layer of a user's own that returns its results by value.
struct Scale {
  using Scalar = double;
  struct Cache {
    Matrix<double> x;
  };

  Matrix<double> forward(MatrixIn<double> x) const { return a.value(0, 0) * x; }
  Matrix<double> forward(MatrixIn<double> x, Cache& cache) const {
    cache.x = x;
    return forward(x);
  }
  Matrix<double> backward(MatrixIn<double> dy, Cache& cache) {
    a.gradient()(0, 0) += dy.cwiseProduct(cache.x).sum();
    return a.value(0, 0) * dy;
  }
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("a", self.a);
  }

  Parameter<double> a;
};

std::vector<Scale> scales(const std::vector<double>& factors) {
  std::vector<Scale> experts;
  for (const double a : factors) experts.push_back({{Matrix<double>::Constant(1, 1, a)}});
  return experts;
}

Routing<double> route(const Matrix<double>& logits, Index k, const Pass& pass = {}) {
  Routing<double> routing;
  SoftmaxTopK<double>{k}.select(logits, pass, routing);
  return routing;
}

}  // namespace

TEST_CASE("AnyBank runs each expert on its tokens", "[moe][experts][any_bank]") {
  const AnyBank<Scale> bank(scales({10.0, 1.0, -2.0}), 4, 4);
  CHECK(bank.experts() == 3);
  CHECK(bank.d_in() == 4);
  CHECK(bank.d_out() == 4);

  const Matrix<double> x = test::random_matrix(8, 4, 1);
  const std::vector<std::uint8_t> mask = {1, 1, 1, 0, 1, 1, 1, 1};
  Routing<double> routing = route(test::random_matrix(8, 3, 2), 2, {.mask = mask});
  if (GENERATE(false, true)) FixedCapacity{2}.apply(routing);
  Dispatch<double> dispatch;
  dispatch.build(routing);

  const double factor[] = {10.0, 1.0, -2.0};
  Matrix<double> expected = Matrix<double>::Zero(8, 4);
  for (Index t = 0; t < 8; ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      const auto i = static_cast<std::size_t>(a);
      if (routing.kept[i] != 0) {
        expected.row(t) += routing.weight[i] * factor[routing.expert[i]] * x.row(t);
      }
    }
  }
  AnyBank<Scale>::Cache cache;
  CHECK(test::relative_error(bank.forward(x, dispatch, cache), expected) < 1e-14);
}

TEST_CASE("AnyBank of Glu is GluBank", "[moe][experts][any_bank]") {
  constexpr Index kExperts = 3;
  std::vector<Matrix<double>> gate;
  std::vector<Matrix<double>> up;
  std::vector<Matrix<double>> down;
  std::vector<Glu<double>> experts;
  for (std::uint64_t e = 0; e < kExperts; ++e) {
    gate.push_back(test::random_matrix(5, 4, 10 + e));
    up.push_back(test::random_matrix(5, 4, 20 + e));
    down.push_back(test::random_matrix(4, 5, 30 + e));
    experts.emplace_back(gate.back(), up.back(), down.back());
  }
  GluBank<double> glu(gate, up, down);
  AnyBank<Glu<double>> any(experts, 4, 4);

  Routing<double> routing = route(test::random_matrix(9, kExperts, 2), 2);
  FixedCapacity{5}.apply(routing);
  Dispatch<double> dispatch;
  dispatch.build(routing);
  const Matrix<double> x = test::random_matrix(9, 4, 3);
  const Matrix<double> dy = test::random_matrix(9, 4, 4);
  GluBank<double>::Cache glu_cache;
  AnyBank<Glu<double>>::Cache any_cache;
  CHECK(test::relative_error(any.forward(x, dispatch, any_cache),
                             glu.forward(x, dispatch, glu_cache)) < 1e-14);

  std::vector<double> glu_weight(18);
  std::vector<double> any_weight(18);
  CHECK(test::relative_error(any.backward(dy, dispatch, any_weight, any_cache),
                             glu.backward(dy, dispatch, glu_weight, glu_cache)) < 1e-14);
  for (std::size_t a = 0; a < 18; ++a) CHECK(any_weight[a] == Approx(glu_weight[a]));
  const auto expected = parameters(glu);
  const auto actual = parameters(any);
  REQUIRE(actual.size() == expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CHECK(actual[i].name == expected[i].name);
    INFO(expected[i].name);
    CHECK(test::relative_error(actual[i].parameter->grad, expected[i].parameter->grad) < 1e-14);
  }
}

TEST_CASE("AnyBank gradients agree with finite differences", "[moe][experts][any_bank][gradient]") {
  Rng rng(5);
  SECTION("of layers that change the width") {
    std::vector<Linear<double>> experts;
    for (int e = 0; e < 3; ++e) experts.emplace_back(4, 2, rng, LinearConfig{.bias = true});
    MoELayer moe(LinearRouter<double>(4, 3, rng, {.init_scale = 5.0}), SoftmaxTopK<double>{2},
                 Dropless{}, AnyBank(experts, 4, 2));
    test::check_gradients(moe, test::random_matrix(6, 4, 3));
  }
  SECTION("of layers of a user's own") {
    MoELayer moe(LinearRouter<double>(4, 3, rng, {.init_scale = 5.0}), SoftmaxTopK<double>{2},
                 Dropless{}, AnyBank(scales({1.0, -0.5, 2.0}), 4, 4));
    test::check_gradients(moe, test::random_matrix(6, 4, 3));
  }
}

TEST_CASE("AnyBank leaves experts without tokens alone", "[moe][experts][any_bank]") {
  AnyBank<Scale> bank(scales({1.0, 2.0, 3.0}), 4, 4);
  Matrix<double> logits = Matrix<double>::Zero(2, 3);
  logits.col(1).setOnes();
  Dispatch<double> dispatch;
  dispatch.build(route(logits, 1));
  AnyBank<Scale>::Cache cache;
  bank.forward(test::random_matrix(2, 4, 1), dispatch, cache);
  std::vector<double> d_weight(2);
  bank.backward(test::random_matrix(2, 4, 2), dispatch, d_weight, cache);
  const auto all = parameters(bank);
  REQUIRE(all.size() == 3);
  CHECK(all[1].name == "1.a");
  CHECK(all[0].parameter->grad.size() == 0);
  CHECK(all[1].parameter->grad.size() == 1);
  CHECK(all[2].parameter->grad.size() == 0);
}

TEST_CASE("AnyBank takes no tokens", "[moe][experts][any_bank]") {
  Rng rng(1);
  AnyBank<Linear<double>> bank({Linear<double>(4, 2, rng)}, 4, 2);
  Dispatch<double> dispatch;
  dispatch.build(route(Matrix<double>(0, 1), 1));
  AnyBank<Linear<double>>::Cache cache;
  CHECK(bank.forward(Matrix<double>(0, 4), dispatch, cache).cols() == 2);
  CHECK(bank.backward(Matrix<double>(0, 2), dispatch, {}, cache).cols() == 4);
}

TEST_CASE("AnyBank says what is wrong with its arguments", "[moe][experts][any_bank]") {
  CHECK(test::message_of<ConfigError>([] { AnyBank<Scale>({}, 4, 4); }) ==
        "AnyBank: experts = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([] { AnyBank<Scale>(scales({1.0}), 0, 4); }) ==
        "AnyBank: d_in = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([] { AnyBank<Scale>(scales({1.0}), 4, 0); }) ==
        "AnyBank: d_out = 0, expected >= 1");

  const AnyBank<Scale> bank(scales({1.0}), 4, 5);
  Dispatch<double> dispatch;
  dispatch.build(route(Matrix<double>::Zero(3, 1), 1));
  AnyBank<Scale>::Cache cache;
  CHECK(test::message_of<ShapeError>([&] {
          bank.forward(test::random_matrix(3, 4, 1), dispatch, cache);
        }) == "AnyBank::forward: an expert's output is [3, 4], expected [3, 5]");
}
