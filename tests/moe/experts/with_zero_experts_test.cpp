// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/core/storage.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/experts/with_zero_experts.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::with_zero_experts_test {

static_assert(ExpertBank<WithZeroExperts<GluBank<float>>>);
static_assert(ExpertBank<WithZeroExperts<MlpBank<double>>>);

namespace {

/// Two experts 4 -> 4.
GluBank<double> bank() {
  Rng rng(1);
  return {4, 2, 5, rng, {.init_scale = 3.0}};
}

WithZeroExperts<GluBank<double>> with(WithZeroExpertsConfig config) {
  Rng rng(2);
  return {bank(), rng, config};
}

/// A row [1, experts] of logits that chooses `expert`.
Matrix<double> chooses(Index experts, Index expert) {
  Matrix<double> logits = Matrix<double>::Zero(1, experts);
  logits(0, expert) = 1.0;
  return logits;
}

/// What `expert` alone makes of one token.
template <class Bank>
Matrix<double> one(const Bank& bank, const Matrix<double>& x, Index expert) {
  Routing<double> routing =
      test::route(SoftmaxTopK<double>({.k = 1}), chooses(bank.experts(), expert));
  routing.weight[0] = 1.0;
  Dispatch<double> dispatch;
  dispatch.build(routing);
  typename Bank::Cache cache;
  return bank.forward(x, dispatch, {}, cache);
}

}  // namespace

TEST_CASE("Zero experts are zero, the token and a mix with a constant",
          "[moe][experts][with_zero_experts]") {
  // softmax(W_c x) = softmax(ln 3, 0) = (3/4, 1/4) for x = (1, 0, 0, 0).
  Matrix<double> mix = Matrix<double>::Zero(2, 4);
  mix(0, 0) = std::log(3.0);
  Matrix<double> constant(1, 4);
  constant << 4.0, 8.0, -4.0, 0.0;
  const WithZeroExperts all(bank(), {mix}, {constant}, {1, 1, 1});
  CHECK(all.experts() == 5);
  Matrix<double> x = Matrix<double>::Zero(1, 4);
  x(0, 0) = 1.0;

  CHECK(one(all, x, 0) == one(bank(), x, 0));
  CHECK(one(all, x, 1) == one(bank(), x, 1));
  CHECK(one(all, x, 2).isZero(0.0));
  CHECK(one(all, x, 3) == x);
  Matrix<double> expected(1, 4);
  expected << 1.75, 2.0, -1.0, 0.0;
  CHECK(test::relative_error(one(all, x, 4), expected) < 1e-15);
}

TEST_CASE("WithZeroExperts is the weighted sum of all its experts",
          "[moe][experts][with_zero_experts]") {
  const std::vector<std::uint8_t> mask = {1, 1, 1, 0, 1, 1, 1, 1, 0};
  const Matrix<double> x = test::random_matrix(9, 4, 1);
  for (const WithZeroExpertsConfig config :
       {WithZeroExpertsConfig{0, 0, 0}, WithZeroExpertsConfig{1, 2, 2},
        WithZeroExpertsConfig{0, 1, 0}, WithZeroExpertsConfig{0, 0, 2},
        WithZeroExpertsConfig{3, 0, 1}}) {
    const auto experts = with(config);
    for (const Index k : {Index(1), Index(2), experts.experts()}) {
      Routing<double> routing =
          test::route(SoftmaxTopK<double>({.k = k, .renormalise = false}),
                      test::random_matrix(9, experts.experts(), 2), {.mask = mask});
      if (k == 2) test::limit(FixedCapacity({.capacity = 2}), routing);
      Matrix<double> expected = Matrix<double>::Zero(9, 4);
      for (Index t = 0; t < 9; ++t) {
        for (Index a = routing.first(t); a < routing.last(t); ++a) {
          if (routing.kept[a] == 0) continue;
          expected.row(t) += routing.weight[a] * one(experts, x.row(t), routing.expert[a]);
        }
      }
      Dispatch<double> dispatch;
      dispatch.build(routing);
      WithZeroExperts<GluBank<double>>::Cache cache;
      CHECK(test::relative_error(experts.forward(x, dispatch, {.mask = mask}, cache), expected) <
            1e-14);
      CHECK(cache.y.row(3).isZero(0.0));
    }
  }
}

TEST_CASE("WithZeroExperts gradients agree with finite differences",
          "[moe][experts][with_zero_experts][gradient]") {
  Rng rng(5);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1};
  const Matrix<double> x = test::random_matrix(6, 4, 3);
  const LinearRouter<double> router(4, 7, rng, {.init_scale = 5.0});
  MoELayer all(router, SoftmaxTopK<double>({.k = 7}), Dropless(), with({1, 2, 2}),
               SwitchLoss<double>({.coefficient = 0.3}));
  test::check_gradients(all, x, {.mask = mask});
  MoELayer some(router, SoftmaxTopK<double>({.k = 3, .renormalise = false}),
                FixedCapacity({.capacity = 3}), with({1, 2, 2}));
  test::check_gradients(some, x);
}

TEST_CASE("The weight of a zero expert has no gradient", "[moe][experts][with_zero_experts]") {
  auto experts = with({1, 1, 0});
  for (const Index expert : {Index(2), Index(3)}) {
    Dispatch<double> dispatch;
    dispatch.build(test::route(SoftmaxTopK<double>({.k = 1}), chooses(4, expert)));
    decltype(experts)::Cache cache;
    const Matrix<double> x = test::random_matrix(1, 4, 1);
    const Matrix<double> dy = test::random_matrix(1, 4, 2);
    std::vector<double> d_weight = {7.0};  // To be overwritten.
    experts.forward(x, dispatch, kTraining, cache);
    experts.backward(dy, dispatch, d_weight, cache);
    // Expert 2 is zero whatever its weight, expert 3 is the token.
    CHECK(d_weight[0] == Approx(expert == 2 ? 0.0 : x.row(0).dot(dy.row(0))).margin(1e-15));
  }
}

TEST_CASE("WithZeroExperts never looks at padding", "[moe][experts][with_zero_experts]") {
  Rng rng(5);
  MoELayer moe(LinearRouter<double>(4, 5, rng), SoftmaxTopK<double>({.k = 5}), Dropless(),
               with({1, 1, 1}));
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  Matrix<double> x = test::random_matrix(3, 4, 1);
  x.row(1).setConstant(std::numeric_limits<double>::quiet_NaN());
  decltype(moe)::Cache cache;
  const Matrix<double> y = moe.forward(x, {.training = true, .mask = mask}, cache);
  CHECK(y.row(1).isZero(0.0));
  CHECK(y.allFinite());
  const Matrix<double> dx = moe.backward(x, cache);
  CHECK(dx.allFinite());
  for (const auto& [name, parameter] : parameters(moe)) CHECK(parameter->grad.allFinite());
}

TEST_CASE("WithZeroExperts leaves experts without tokens alone",
          "[moe][experts][with_zero_experts]") {
  auto experts = with({0, 0, 2});
  Dispatch<double> dispatch;
  dispatch.build(test::route(SoftmaxTopK<double>({.k = 1}), chooses(4, 3)));
  decltype(experts)::Cache cache;
  std::vector<double> d_weight(1);
  experts.forward(test::random_matrix(1, 4, 1), dispatch, kTraining, cache);
  experts.backward(test::random_matrix(1, 4, 2), dispatch, d_weight, cache);
  for (const auto& [name, parameter] : parameters(experts)) {
    INFO(name);
    CHECK((parameter->grad.size() > 0) == (name[0] == '3'));
  }
}

TEST_CASE("WithZeroExperts takes no tokens", "[moe][experts][with_zero_experts]") {
  Rng rng(1);
  MoELayer moe(LinearRouter<double>(4, 5, rng), SoftmaxTopK<double>({.k = 2}), Dropless(),
               with({1, 1, 1}));
  decltype(moe)::Cache cache;
  CHECK(moe.forward(Matrix<double>(0, 4), kTraining, cache).cols() == 4);
  CHECK(moe.backward(Matrix<double>(0, 4), cache).cols() == 4);
}

TEST_CASE("WithZeroExperts names its weights and stores those of the bank",
          "[moe][experts][with_zero_experts]") {
  auto experts = with({1, 1, 2});
  const auto all = parameters(experts);
  REQUIRE(all.size() == 10);
  CHECK(all[0].name == "0.gate");
  CHECK(all[6].name == "4.mix");
  CHECK(all[7].name == "4.constant");
  CHECK(all[9].name == "5.constant");

  Rng rng(1);
  MoELayer moe(LinearRouter<double>(4, 6, rng), SoftmaxTopK<double>({.k = 2}), Dropless(), experts);
  const Matrix<double> x = test::random_matrix(5, 4, 1);
  const Matrix<double> before = infer(moe, x);
  set_storage(moe, Storage::kPacked);
  CHECK(moe.bank().bank().storage() == Storage::kPacked);
  CHECK(parameters(moe.bank()).size() == 4);
  CHECK(test::relative_error(infer(moe, x), before) < 1e-14);
  decltype(moe)::Cache cache;
  moe.forward(x, kTraining, cache);
  CHECK(test::message_of<StateError>([&] { moe.backward(x, cache); }) ==
        "GluBank::backward: the weights are stored for inference, expected Storage::kTrainable");
}

TEST_CASE("WithZeroExperts gives the same bits for any number of threads and allocates nothing",
          "[moe][experts][with_zero_experts]") {
  Rng rng(5);
  MoELayer moe(LinearRouter<double>(16, 8, rng, {.init_scale = 5.0}), SoftmaxTopK<double>({.k = 3}),
               Dropless(), WithZeroExperts(GluBank<double>(16, 4, 24, rng), rng, {1, 1, 2}));
  const Matrix<double> x = test::random_matrix(200, 16, 1);
  decltype(moe)::Cache cache;
  const auto step = [&] {
    moe.forward(x, kTraining, cache);
    moe.backward(x, cache);
  };
  step();
  step();
  CHECK(test::count_allocations(step) == 0);
  zero_gradients(moe);
  step();
  const Matrix<double> y = cache.bank.y;
  const Matrix<double> dx = cache.dx;
  std::vector<Matrix<double>> gradients;
  for (const auto& [name, parameter] : parameters(moe)) gradients.push_back(parameter->grad);
  zero_gradients(moe);
  const test::Threads threads(3);
  step();
  CHECK(cache.bank.y == y);
  CHECK(cache.dx == dx);
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    CHECK(parameters(moe)[i].parameter->grad == gradients[i]);
  }
}

TEST_CASE("WithZeroExperts says what is wrong with its arguments",
          "[moe][experts][with_zero_experts]") {
  CHECK(test::message_of<ConfigError>([&] { with({.zero = -1}); }) ==
        "WithZeroExperts: zero = -1, expected >= 0");
  CHECK(test::message_of<ConfigError>([&] { with({.identity = -2}); }) ==
        "WithZeroExperts: identity = -2, expected >= 0");
  CHECK(test::message_of<ConfigError>([&] { with({.constant = -3}); }) ==
        "WithZeroExperts: constant = -3, expected >= 0");

  const Matrix<double> mix = test::random_matrix(2, 4, 1);
  const Matrix<double> constant = test::random_matrix(1, 4, 1);
  using Experts = WithZeroExperts<GluBank<double>>;
  CHECK(
      test::message_of<ConfigError>([&] { Experts(bank(), {mix}, {constant}, {.constant = 2}); }) ==
      "WithZeroExperts: 1 mix and 1 constant weights, expected 2 of each (one per constant "
      "expert)");
  CHECK(test::message_of<ShapeError>([&] {
          Experts(bank(), {constant}, {mix}, {.constant = 1});
        }) == "WithZeroExperts: mix[0] is [1, 4], expected [2, 4]");
  CHECK(test::message_of<ShapeError>([&] { Experts(bank(), {mix}, {mix}, {.constant = 1}); }) ==
        "WithZeroExperts: constant[0] is [2, 4], expected [1, 4]");

  const MlpBank<double> narrow({test::random_matrix(5, 4, 1)}, {test::random_matrix(2, 5, 1)});
  CHECK(WithZeroExperts(narrow, {.zero = 1}).experts() == 2);
  CHECK(test::message_of<ConfigError>([&] { Experts(bank(), {.constant = 1}); }) ==
        "WithZeroExperts: 0 mix and 0 constant weights, expected 1 of each (one per constant "
        "expert)");
  CHECK(test::message_of<ConfigError>([&] { WithZeroExperts(narrow, {.identity = 1}); }) ==
        "WithZeroExperts: the bank yields 2 features, expected 4 beside identity and constant "
        "experts");

  Dispatch<double> dispatch;
  dispatch.build(test::route(SoftmaxTopK<double>({.k = 1}), test::random_matrix(5, 3, 2)));
  Experts::Cache cache;
  CHECK(test::message_of<ShapeError>([&] {
          with({.zero = 1}).forward(test::random_matrix(4, 4, 1), dispatch, {}, cache);
        }) == "WithZeroExperts::forward: x is [4, 4], expected [5, 4]");
}

}  // namespace weir::with_zero_experts_test
