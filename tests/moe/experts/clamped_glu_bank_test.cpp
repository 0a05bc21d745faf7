// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/core/storage.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/clamped_glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::clamped_glu_bank_test {

static_assert(ExpertBank<ClampedGluBank<float>>);
static_assert(ExpertBank<ClampedGluBank<double>>);

namespace {

using Matrices = std::vector<Matrix<double>>;

Matrices random_matrices(Index rows, Index cols, std::uint64_t seed) {
  return {test::random_matrix(rows, cols, seed), test::random_matrix(rows, cols, seed + 1),
          test::random_matrix(rows, cols, seed + 2)};
}

/// Three experts 5 -> d_out of width 7, biases not zero.
ClampedGluWeights<double> weights(Index d_out = 5) {
  return {random_matrices(7, 5, 10), random_matrices(7, 5, 20),     random_matrices(1, 7, 30),
          random_matrices(1, 7, 40), random_matrices(d_out, 7, 50), random_matrices(1, d_out, 60)};
}

Dispatch<double> dispatch_of(const Routing<double>& routing) {
  Dispatch<double> dispatch;
  dispatch.build(routing);
  return dispatch;
}

/// y_t = sum over the kept assignments of t, one number at a time.
Matrix<double> reference(const Matrix<double>& x, const Routing<double>& routing,
                         const ClampedGluWeights<double>& w, double alpha, double limit) {
  Matrix<double> y = Matrix<double>::Zero(x.rows(), w.down[0].rows());
  for (Index t = 0; t < x.rows(); ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      if (routing.kept[a] == 0) continue;
      const auto e = static_cast<std::size_t>(routing.expert[a]);
      y.row(t) += routing.weight[a] * w.down_bias[e];
      for (Index h = 0; h < 7; ++h) {
        double g = w.gate_bias[e](0, h);
        double u = w.up_bias[e](0, h);
        for (Index j = 0; j < 5; ++j) {
          g += x(t, j) * w.gate[e](h, j);
          u += x(t, j) * w.up[e](h, j);
        }
        g = std::min(g, limit);
        u = std::clamp(u, -limit, limit);
        const double hidden = (u + 1.0) * g / (1.0 + std::exp(-alpha * g));
        for (Index o = 0; o < y.cols(); ++o) {
          y(t, o) += routing.weight[a] * hidden * w.down[e](o, h);
        }
      }
    }
  }
  return y;
}

/// A bank of one expert of width one with these pre-activations for the token 1.
double pass_through(double gate, double up) {
  const auto number = [](double value) -> Matrices {
    return {Matrix<double>::Constant(1, 1, value)};
  };
  const ClampedGluBank<double> bank(
      {number(gate), number(up), number(0.0), number(0.0), number(1.0), number(0.0)});
  ClampedGluBank<double>::Cache cache;
  const Matrix<double> one = Matrix<double>::Ones(1, 1);
  const auto dispatch = dispatch_of(test::route(SoftmaxTopK<double>({.k = 1}), one));
  return bank.forward(one, dispatch, {}, cache)(0, 0);
}

}  // namespace

TEST_CASE("ClampedGluBank clamps the gate from above and up on both sides",
          "[moe][experts][clamped_glu_bank]") {
  const auto swish = [](double g) { return g / (1.0 + std::exp(-1.702 * g)); };
  CHECK(pass_through(2.0, 3.0) == Approx(4.0 * swish(2.0)));
  CHECK(pass_through(9.0, 3.0) == Approx(4.0 * swish(7.0)));
  CHECK(pass_through(-9.0, 3.0) == Approx(4.0 * swish(-9.0)));
  CHECK(pass_through(2.0, 9.0) == Approx(8.0 * swish(2.0)));
  CHECK(pass_through(2.0, -9.0) == Approx(-6.0 * swish(2.0)));
  CHECK(pass_through(2.0, -1.0) == 0.0);
  CHECK(std::isnan(pass_through(std::numeric_limits<double>::quiet_NaN(), 1.0)));
}

TEST_CASE("ClampedGluBank is the weighted sum of its experts, token by token",
          "[moe][experts][clamped_glu_bank]") {
  const std::vector<std::uint8_t> mask = {1, 1, 1, 0, 1, 1, 1, 1, 0};
  const Matrix<double> x = test::random_matrix(9, 5, 1);
  for (const Index d_out : {Index(5), Index(3)}) {
    for (const double limit : {7.0, 1.5}) {
      for (const Index k : {Index(1), Index(2), Index(3)}) {
        Routing<double> routing = test::route(SoftmaxTopK<double>({.k = k}),
                                              test::random_matrix(9, 3, 2), {.mask = mask});
        if (k == 2) test::limit(FixedCapacity({.capacity = 2}), routing);
        const ClampedGluBank<double> bank(weights(d_out), {.alpha = 1.3, .limit = limit});
        ClampedGluBank<double>::Cache cache;
        CHECK(test::relative_error(bank.forward(x, dispatch_of(routing), {}, cache),
                                   reference(x, routing, weights(d_out), 1.3, limit)) < 1e-14);
        CHECK(cache.y.row(3).isZero(0.0));
      }
    }
  }
}

TEST_CASE("ClampedGluBank gradients agree with finite differences",
          "[moe][experts][clamped_glu_bank][gradient]") {
  // With a limit of 1.5 many pre-activations are cut; none is near the limit.
  Rng rng(5);
  for (const double limit : {7.0, 1.5}) {
    MoELayer moe(LinearRouter<double>(5, 3, rng, {.bias = true, .init_scale = 5.0}),
                 TopKSoftmax<double>({.k = 2}), Dropless(),
                 ClampedGluBank<double>(weights(4), {.limit = limit}));
    test::check_gradients(moe, test::random_matrix(6, 5, 3));
  }
}

TEST_CASE("ClampedGluBank leaves experts without tokens alone",
          "[moe][experts][clamped_glu_bank]") {
  ClampedGluBank<double> bank(weights());
  Matrix<double> logits = Matrix<double>::Zero(2, 3);
  logits.col(1).setOnes();
  const auto dispatch = dispatch_of(test::route(SoftmaxTopK<double>({.k = 1}), logits));
  ClampedGluBank<double>::Cache cache;
  bank.forward(test::random_matrix(2, 5, 1), dispatch, kTraining, cache);
  std::vector<double> d_weight(2);
  bank.backward(test::random_matrix(2, 5, 2), dispatch, d_weight, cache);
  for (const auto& [name, parameter] : parameters(bank)) {
    INFO(name);
    CHECK((parameter->grad.size() > 0) == (name[0] == '1'));
  }
}

TEST_CASE("ClampedGluBank takes no tokens", "[moe][experts][clamped_glu_bank]") {
  ClampedGluBank<double> bank(weights(4));
  const auto dispatch =
      dispatch_of(test::route(SoftmaxTopK<double>({.k = 2}), Matrix<double>(0, 3)));
  ClampedGluBank<double>::Cache cache;
  CHECK(bank.forward(Matrix<double>(0, 5), dispatch, kTraining, cache).cols() == 4);
  CHECK(bank.backward(Matrix<double>(0, 4), dispatch, {}, cache).cols() == 5);
}

TEST_CASE("ClampedGluBank names its weights and stores them", "[moe][experts][clamped_glu_bank]") {
  Rng rng(1);
  ClampedGluBank<double> fresh(100, 2, 50, rng);
  const auto all = parameters(fresh);
  REQUIRE(all.size() == 12);
  CHECK(all[0].name == "0.gate");
  CHECK(all[1].name == "0.gate_bias");
  CHECK(all[8].name == "1.up");
  CHECK(all[11].name == "1.down_bias");
  CHECK(all[11].parameter->value.isZero(0.0));
  CHECK(fresh.d_in() == 100);
  CHECK(fresh.experts() == 2);
  CHECK(fresh.d_hidden() == 50);
  // switch_init with scale 1: stddev 0.8796 sqrt(1 / fan-in), cut at two deviations.
  const Matrix<double>& gate = all[0].parameter->value;
  CHECK(gate.norm() / std::sqrt(5000.0) == Approx(0.8796 / 10.0).epsilon(0.05));

  ClampedGluBank<double> bank(weights(4));
  const Matrix<double> x = test::random_matrix(6, 5, 1);
  const auto dispatch =
      dispatch_of(test::route(SoftmaxTopK<double>({.k = 2}), test::random_matrix(6, 3, 2)));
  ClampedGluBank<double>::Cache cache;
  const Matrix<double> before = bank.forward(x, dispatch, {}, cache);
  set_storage(bank, Storage::kPacked);
  CHECK(parameters(bank).size() == 9);  // The biases.
  CHECK(test::relative_error(bank.forward(x, dispatch, {}, cache), before) < 1e-14);
  std::vector<double> d_weight(12);
  CHECK(test::message_of<StateError>([&] { bank.backward(before, dispatch, d_weight, cache); }) ==
        "ClampedGluBank::backward: the weights are stored for inference, expected "
        "Storage::kTrainable");
  set_storage(bank, Storage::kTrainable);
  CHECK(bank.forward(x, dispatch, {}, cache) == before);
}

TEST_CASE("ClampedGluBank gives the same bits for any number of threads and allocates nothing",
          "[moe][experts][clamped_glu_bank]") {
  Rng rng(5);
  MoELayer moe(LinearRouter<double>(16, 4, rng, {.init_scale = 5.0}), SoftmaxTopK<double>({.k = 2}),
               Dropless(), ClampedGluBank<double>(16, 4, 24, rng));
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
  Matrices gradients;
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

TEST_CASE("ClampedGluBank says what is wrong with its arguments",
          "[moe][experts][clamped_glu_bank]") {
  Rng rng(1);
  using Bank = ClampedGluBank<double>;
  CHECK(test::message_of<ConfigError>([&] { Bank(4, 0, 5, rng); }) ==
        "ClampedGluBank: experts = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([&] { Bank(0, 2, 5, rng); }) ==
        "ClampedGluBank: d_model = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([&] { Bank(4, 2, -1, rng); }) ==
        "ClampedGluBank: d_hidden = -1, expected >= 1");
  CHECK(test::message_of<ConfigError>([&] { Bank(4, 2, 5, rng, {.alpha = 0.0}); }) ==
        "ClampedGluBank: alpha = 0, expected a finite number > 0");
  CHECK(test::message_of<ConfigError>([&] { Bank(weights(), {.limit = -7.0}); }) ==
        "ClampedGluBank: limit = -7, expected a finite number > 0");

  auto few = weights();
  few.down_bias.pop_back();
  CHECK(test::message_of<ConfigError>([&] { Bank{few}; }) ==
        "ClampedGluBank: 3 gate, 3 up, 3 gate_bias, 3 up_bias, 3 down and 2 down_bias weights, "
        "expected one of each per expert");
  auto wrong = weights();
  wrong.up_bias[1] = Matrix<double>::Zero(1, 6);
  CHECK(test::message_of<ShapeError>([&] { Bank{wrong}; }) ==
        "ClampedGluBank: up_bias[1] is [1, 6], expected [1, 7]");
  wrong = weights();
  wrong.down[2] = Matrix<double>::Zero(5, 6);
  CHECK(test::message_of<ShapeError>([&] { Bank{wrong}; }) ==
        "ClampedGluBank: down[2] is [5, 6], expected [5, 7]");
  wrong = weights();
  wrong.gate[1] = Matrix<double>::Zero(6, 5);
  CHECK(test::message_of<ShapeError>([&] { Bank{wrong}; }) ==
        "ClampedGluBank: gate[1] is [6, 5], expected [7, 5]");
  wrong = weights();
  wrong.up[0] = Matrix<double>::Zero(7, 3);
  CHECK(test::message_of<ShapeError>([&] { Bank{wrong}; }) ==
        "ClampedGluBank: up[0] is [7, 3], expected [7, 5]");
  wrong = weights();
  wrong.gate_bias[2] = Matrix<double>::Zero(2, 7);
  CHECK(test::message_of<ShapeError>([&] { Bank{wrong}; }) ==
        "ClampedGluBank: gate_bias[2] is [2, 7], expected [1, 7]");
  wrong = weights();
  wrong.down_bias[1] = Matrix<double>::Zero(1, 4);
  CHECK(test::message_of<ShapeError>([&] { Bank{wrong}; }) ==
        "ClampedGluBank: down_bias[1] is [1, 4], expected [1, 5]");
}

}  // namespace weir::clamped_glu_bank_test
