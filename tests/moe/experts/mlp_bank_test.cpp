// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <vector>

#include <weir/core/storage.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::mlp_bank_test {

static_assert(ExpertBank<MlpBank<float>>);
static_assert(ExpertBank<MlpBank<double, Gelu>>);

namespace {

using Matrices = std::vector<Matrix<double>>;

Matrices random_matrices(Index count, Index rows, Index cols, std::uint64_t seed) {
  Matrices matrices;
  for (Index e = 0; e < count; ++e) {
    matrices.push_back(test::random_matrix(rows, cols, seed + static_cast<std::uint64_t>(e)));
  }
  return matrices;
}

/// y_t = sum over the kept assignments of t, one number at a time.
Matrix<double> reference(const Matrix<double>& x, const Routing<double>& routing,
                         const Matrices& in, const Matrices& out, const Matrices& in_bias,
                         const Matrices& out_bias) {
  Matrix<double> y = Matrix<double>::Zero(x.rows(), out[0].rows());
  for (Index t = 0; t < x.rows(); ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      if (routing.kept[a] == 0) continue;
      const auto e = static_cast<std::size_t>(routing.expert[a]);
      for (Index o = 0; o < y.cols(); ++o) {
        double sum = out_bias.empty() ? 0.0 : out_bias[e](0, o);
        for (Index h = 0; h < in[e].rows(); ++h) {
          double z = in_bias.empty() ? 0.0 : in_bias[e](0, h);
          for (Index j = 0; j < x.cols(); ++j) z += x(t, j) * in[e](h, j);
          sum += std::max(z, 0.0) * out[e](o, h);
        }
        y(t, o) += routing.weight[a] * sum;
      }
    }
  }
  return y;
}

}  // namespace

TEST_CASE("MlpBank is the weighted sum of its experts, token by token",
          "[moe][experts][mlp_bank]") {
  const auto d_out = GENERATE(as<Index>{}, 5, 3);
  const auto bias = GENERATE(false, true);
  const Matrices in = random_matrices(4, 7, 5, 10);
  const Matrices out = random_matrices(4, d_out, 7, 20);
  const Matrices in_bias = bias ? random_matrices(4, 1, 7, 30) : Matrices{};
  const Matrices out_bias = bias ? random_matrices(4, 1, d_out, 40) : Matrices{};
  const MlpBank<double> bank(in, out, in_bias, out_bias);
  CHECK(bank.experts() == 4);
  CHECK(bank.d_in() == 5);
  CHECK(bank.d_hidden() == 7);
  CHECK(bank.d_out() == d_out);

  const Matrix<double> x = test::random_matrix(9, 5, 1);
  const std::vector<std::uint8_t> mask = {1, 1, 1, 0, 1, 1, 1, 1, 0};
  Routing<double> routing =
      test::route(SoftmaxTopK<double>({.k = 2}), test::random_matrix(9, 4, 2), {.mask = mask});
  if (GENERATE(false, true)) test::limit(FixedCapacity({.capacity = 2}), routing);
  Dispatch<double> dispatch;
  dispatch.build(routing);
  MlpBank<double>::Cache cache;
  const Matrix<double>& y = bank.forward(x, dispatch, {.mask = mask}, cache);
  CHECK(test::relative_error(y, reference(x, routing, in, out, in_bias, out_bias)) < 1e-14);
  CHECK(y.row(3).isZero(0.0));
}

TEST_CASE("MlpBank gradients agree with finite differences", "[moe][experts][mlp_bank][gradient]") {
  const auto bias = GENERATE(false, true);
  Rng rng(5);
  const auto check = [&]<class Act>(Act) {
    MoELayer moe(LinearRouter<double>(4, 3, rng, {.init_scale = 5.0}),
                 SoftmaxTopK<double>({.k = 2}), Dropless(),
                 MlpBank<double, Act>(random_matrices(3, 5, 4, 10), random_matrices(3, 3, 5, 20),
                                      bias ? random_matrices(3, 1, 5, 30) : Matrices{},
                                      bias ? random_matrices(3, 1, 3, 40) : Matrices{}));
    test::check_gradients(moe, test::random_matrix(6, 4, 3));
  };
  check(Relu{});
  check(Gelu{});
}

TEST_CASE("MlpBank leaves experts without tokens alone", "[moe][experts][mlp_bank]") {
  Rng rng(1);
  MlpBank<double> bank(4, 3, 5, rng, {.bias = true});
  Matrix<double> logits = Matrix<double>::Zero(2, 3);
  logits.col(1).setOnes();
  Dispatch<double> dispatch;
  dispatch.build(test::route(SoftmaxTopK<double>({.k = 1}), logits));
  MlpBank<double>::Cache cache;
  bank.forward(test::random_matrix(2, 4, 1), dispatch, kTraining, cache);
  std::vector<double> d_weight(2);
  bank.backward(test::random_matrix(2, 4, 2), dispatch, d_weight, cache);

  for (const auto& [name, parameter] : parameters(bank)) {
    INFO(name);
    CHECK((parameter->grad.size() > 0) == (name[0] == '1'));
  }
}

TEST_CASE("MlpBank takes no tokens", "[moe][experts][mlp_bank]") {
  Rng rng(1);
  MlpBank<double> bank(4, 3, 5, rng, {.bias = true});
  Dispatch<double> dispatch;
  dispatch.build(test::route(SoftmaxTopK<double>({.k = 2}), Matrix<double>(0, 3)));
  MlpBank<double>::Cache cache;
  const Matrix<double>& y = bank.forward(Matrix<double>(0, 4), dispatch, kTraining, cache);
  CHECK(y.rows() == 0);
  CHECK(y.cols() == 4);
  CHECK(bank.backward(Matrix<double>(0, 4), dispatch, {}, cache).cols() == 4);
}

TEST_CASE("MlpBank names its weights; its biases start at zero", "[moe][experts][mlp_bank]") {
  Rng rng(1);
  MlpBank<double> plain(4, 2, 5, rng);
  const auto weights = parameters(plain);
  REQUIRE(weights.size() == 4);
  CHECK(weights[0].name == "0.in");
  CHECK(weights[3].name == "1.out");
  MlpBank<double> wide(100, 2, 50, rng);
  // switch_init with scale 1: stddev 0.8796 sqrt(1 / fan-in), cut at two deviations.
  CHECK(parameters(wide)[0].parameter->value.norm() / std::sqrt(5000.0) ==
        Approx(0.8796 / 10.0).epsilon(0.05));

  MlpBank<double> biased(4, 2, 5, rng, {.bias = true});
  const auto all = parameters(biased);
  REQUIRE(all.size() == 8);
  CHECK(all[5].name == "1.in_bias");
  CHECK(all[7].name == "1.out_bias");
  CHECK(all[5].parameter->value == Matrix<double>::Zero(1, 5));
  CHECK(all[7].parameter->value == Matrix<double>::Zero(1, 4));
}

TEST_CASE("MlpBank keeps its biases when stored for inference, and every bit of many rows",
          "[moe][experts][mlp_bank]") {
  const Index tokens = 40;
  const bool bias = GENERATE(false, true);
  MlpBank<double> bank(random_matrices(3, 7, 5, 10), random_matrices(3, 4, 7, 20),
                       bias ? random_matrices(3, 1, 7, 30) : Matrices{},
                       bias ? random_matrices(3, 1, 4, 40) : Matrices{});
  Dispatch<double> dispatch;
  dispatch.build(
      test::route(SoftmaxTopK<double>({.k = 2}), 0.1 * test::random_matrix(tokens, 3, 2)));
  for (Index e = 0; e < 3; ++e) REQUIRE(dispatch.rows(e) > 10);
  MlpBank<double>::Cache cache;
  const Matrix<double> x = test::random_matrix(tokens, 5, 1);
  const Matrix<double> y = bank.forward(x, dispatch, {}, cache);

  set_storage(bank, Storage::kPacked);
  CHECK(bank.forward(x, dispatch, {}, cache) == y);
  const auto left = parameters(bank);
  REQUIRE(left.size() == (bias ? 6 : 0));
  if (bias) {
    CHECK(left[4].name == "2.in_bias");
    CHECK(left[5].name == "2.out_bias");
  }
}

TEST_CASE("MlpBank gives the same bits for any number of threads and allocates nothing",
          "[moe][experts][mlp_bank][parallel]") {
  Rng rng(5);
  MoELayer moe(LinearRouter<double>(16, 4, rng, {.init_scale = 5.0}), SoftmaxTopK<double>({.k = 2}),
               Dropless(),
               MlpBank<double, Gelu>(random_matrices(4, 24, 16, 10), random_matrices(4, 16, 24, 20),
                                     random_matrices(4, 1, 24, 30), random_matrices(4, 1, 16, 40)));
  const Matrix<double> x = test::random_matrix(200, 16, 1);
  decltype(moe)::Cache cache;
  const auto step = [&] {
    moe.forward(x, kTraining, cache);
    moe.backward(x, cache);
  };
  step();
  step();
  CHECK((test::count_allocations(step) == 0 || !test::allocations_are_counted()));
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
  const auto all = parameters(moe);
  for (std::size_t i = 0; i < gradients.size(); ++i) CHECK(all[i].parameter->grad == gradients[i]);
}

TEST_CASE("MlpBank says what is wrong with its arguments", "[moe][experts][mlp_bank]") {
  Rng rng(1);
  CHECK(test::message_of<ConfigError>([&] { MlpBank<double>(4, 0, 5, rng); }) ==
        "MlpBank: experts = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([&] { MlpBank<double>(0, 2, 5, rng); }) ==
        "MlpBank: d_model = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([&] { MlpBank<double>(4, 2, -1, rng); }) ==
        "MlpBank: d_hidden = -1, expected >= 1");
  CHECK(test::message_of<ConfigError>([&] { MlpBank<double>(4, 2, 5, rng, {.dropout = 1.0}); }) ==
        "MlpBank: dropout = 1, expected 0 <= dropout < 1");

  const Matrices in = random_matrices(2, 5, 4, 1);
  const Matrices out = random_matrices(2, 4, 5, 1);
  const Matrices in_bias = random_matrices(2, 1, 5, 1);
  const Matrices out_bias = random_matrices(2, 1, 4, 1);
  CHECK(test::message_of<ConfigError>([&] { MlpBank<double>(Matrices{}, {}); }) ==
        "MlpBank: 0 in, 0 out, 0 in_bias and 0 out_bias weights, expected one of each per expert, "
        "or no biases");
  CHECK(test::message_of<ConfigError>([&] { MlpBank<double>(in, out, in_bias); }) ==
        "MlpBank: 2 in, 2 out, 2 in_bias and 0 out_bias weights, expected one of each per expert, "
        "or no biases");
  CHECK(test::message_of<ShapeError>([&] {
          MlpBank<double>({in[0], out[0]}, out);
        }) == "MlpBank: in[1] is [4, 5], expected [5, 4]");
  CHECK(test::message_of<ShapeError>([&] {
          MlpBank<double>(in, {out[0], in[0]});
        }) == "MlpBank: out[1] is [5, 4], expected [4, 5]");
  CHECK(test::message_of<ShapeError>([&] { MlpBank<double>(in, out, out_bias, out_bias); }) ==
        "MlpBank: in_bias[0] is [1, 4], expected [1, 5]");
  CHECK(test::message_of<ShapeError>([&] { MlpBank<double>(in, out, in_bias, in_bias); }) ==
        "MlpBank: out_bias[0] is [1, 5], expected [1, 4]");
}

}  // namespace weir::mlp_bank_test
