// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"

namespace weir::glu_bank_test {

static_assert(ExpertBank<GluBank<float>>);
static_assert(ExpertBank<GluBank<double, GeluTanh>>);

namespace {

using Matrices = std::vector<Matrix<double>>;

Matrices random_matrices(Index count, Index rows, Index cols, std::uint64_t seed) {
  Matrices matrices;
  for (Index e = 0; e < count; ++e) {
    matrices.push_back(test::random_matrix(rows, cols, seed + static_cast<std::uint64_t>(e)));
  }
  return matrices;
}

double silu(double z) {
  return z / (1.0 + std::exp(-z));
}

/// y_t = sum over the kept assignments of t, one number at a time.
Matrix<double> reference(const Matrix<double>& x, const Routing<double>& routing,
                         const Matrices& gate, const Matrices& up, const Matrices& down) {
  Matrix<double> y = Matrix<double>::Zero(x.rows(), down[0].rows());
  for (Index t = 0; t < x.rows(); ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      if (routing.kept[a] == 0) continue;
      const auto e = static_cast<std::size_t>(routing.expert[a]);
      for (Index h = 0; h < gate[e].rows(); ++h) {
        double z = 0.0;
        double u = 0.0;
        for (Index j = 0; j < x.cols(); ++j) {
          z += x(t, j) * gate[e](h, j);
          u += x(t, j) * up[e](h, j);
        }
        for (Index o = 0; o < y.cols(); ++o) {
          y(t, o) += routing.weight[a] * silu(z) * u * down[e](o, h);
        }
      }
    }
  }
  return y;
}

}  // namespace

TEST_CASE("GluBank is the weighted sum of its experts, token by token",
          "[moe][experts][glu_bank]") {
  const auto d_out = GENERATE(as<Index>{}, 5, 3);
  const Matrices gate = random_matrices(4, 7, 5, 10);
  const Matrices up = random_matrices(4, 7, 5, 20);
  const Matrices down = random_matrices(4, d_out, 7, 30);
  const GluBank<double> bank(gate, up, down);
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
  GluBank<double>::Cache cache;
  const Matrix<double>& y = bank.forward(x, dispatch, {.mask = mask}, cache);
  CHECK(test::relative_error(y, reference(x, routing, gate, up, down)) < 1e-14);
  CHECK(y.row(3).isZero(0.0));
}

TEST_CASE("GluBank gradients agree with finite differences", "[moe][experts][glu_bank][gradient]") {
  Rng rng(5);
  const auto check = [&]<class Act>(Act) {
    MoELayer moe(LinearRouter<double>(4, 3, rng, {.init_scale = 5.0}),
                 SoftmaxTopK<double>({.k = 2}), Dropless(),
                 GluBank<double, Act>(random_matrices(3, 5, 4, 10), random_matrices(3, 5, 4, 20),
                                      random_matrices(3, 3, 5, 30)));
    test::check_gradients(moe, test::random_matrix(6, 4, 3));
  };
  check(Silu{});
  check(GeluTanh{});
}

TEST_CASE("GluBank leaves experts without tokens alone", "[moe][experts][glu_bank]") {
  Rng rng(1);
  GluBank<double> bank(4, 3, 5, rng);
  Matrix<double> logits = Matrix<double>::Zero(2, 3);
  logits.col(1).setOnes();
  Dispatch<double> dispatch;
  dispatch.build(test::route(SoftmaxTopK<double>({.k = 1}), logits));
  GluBank<double>::Cache cache;
  bank.forward(test::random_matrix(2, 4, 1), dispatch, kTraining, cache);
  std::vector<double> d_weight(2);
  bank.backward(test::random_matrix(2, 4, 2), dispatch, d_weight, cache);

  for (const auto& [name, parameter] : parameters(bank)) {
    INFO(name);
    CHECK((parameter->grad.size() > 0) == (name[0] == '1'));
  }
}

TEST_CASE("GluBank takes no tokens", "[moe][experts][glu_bank]") {
  Rng rng(1);
  GluBank<double> bank(4, 3, 5, rng);
  Dispatch<double> dispatch;
  dispatch.build(test::route(SoftmaxTopK<double>({.k = 2}), Matrix<double>(0, 3)));
  GluBank<double>::Cache cache;
  const Matrix<double>& y = bank.forward(Matrix<double>(0, 4), dispatch, kTraining, cache);
  CHECK(y.rows() == 0);
  CHECK(y.cols() == 4);
  const Matrix<double>& dx = bank.backward(Matrix<double>(0, 4), dispatch, {}, cache);
  CHECK(dx.rows() == 0);
  CHECK(dx.cols() == 4);
}

TEST_CASE("GluBank names its weights and starts them from one expert's fan-in",
          "[moe][experts][glu_bank]") {
  Rng rng(1);
  GluBank<double> bank(100, 2, 50, rng);
  const auto all = parameters(bank);
  REQUIRE(all.size() == 6);
  CHECK(all[0].name == "0.gate");
  CHECK(all[4].name == "1.up");
  CHECK(all[5].name == "1.down");

  // switch_init with scale 1: stddev 0.8796 sqrt(1 / fan-in), cut at two deviations.
  const auto stddev = [](const Matrix<double>& m) {
    return m.norm() / std::sqrt(static_cast<double>(m.size()));
  };
  CHECK(stddev(all[0].parameter->value) == Approx(0.8796 * std::sqrt(1.0 / 100)).epsilon(0.05));
  CHECK(stddev(all[5].parameter->value) == Approx(0.8796 * std::sqrt(1.0 / 50)).epsilon(0.05));
}

TEST_CASE("GluBank stores its weights as it is told", "[moe][experts][glu_bank]") {
  Rng rng(1);
  GluBank<double> bank(4, 2, 3, rng);
  const Matrix<double> x = test::random_matrix(5, 4, 1);
  Dispatch<double> dispatch;
  dispatch.build(test::route(SoftmaxTopK<double>({.k = 2}), test::random_matrix(5, 2, 2)));
  GluBank<double>::Cache cache;
  const Matrix<double> exact = bank.forward(x, dispatch, {}, cache);
  std::vector<double> d_weight(10);
  for (const Storage storage : {Storage::kPacked, Storage::kBfloat16}) {
    bank.set_storage(storage);
    CHECK(bank.storage() == storage);
    CHECK(parameters(bank).empty());
    CHECK_THROWS_AS(bank.backward(x, dispatch, d_weight, cache), StateError);
    const double error = test::relative_error(bank.forward(x, dispatch, {}, cache), exact);
    CHECK(error < (storage == Storage::kPacked ? 1e-14 : 2e-2));
    CHECK((error > 1e-5) == (storage == Storage::kBfloat16));
  }
  bank.set_storage(Storage::kTrainable);
  CHECK(bank.storage() == Storage::kTrainable);
  CHECK(parameters(bank).size() == 6);
}

TEST_CASE("GluBank says what is wrong with its arguments", "[moe][experts][glu_bank]") {
  Rng rng(1);
  CHECK(test::message_of<ConfigError>([&] { GluBank<double>(4, 0, 5, rng); }) ==
        "GluBank: experts = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([&] { GluBank<double>(0, 2, 5, rng); }) ==
        "GluBank: d_model = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([&] { GluBank<double>(4, 2, -1, rng); }) ==
        "GluBank: d_hidden = -1, expected >= 1");
  CHECK(test::message_of<ConfigError>([&] { GluBank<double>(4, 2, 5, rng, {-1.0}); }) ==
        "switch_init: scale = -1, expected a finite number > 0");
  CHECK(test::message_of<ConfigError>([&] { GluBank<double>(4, 2, 5, rng, {.dropout = 1.0}); }) ==
        "GluBank: dropout = 1, expected 0 <= dropout < 1");

  const Matrices in = random_matrices(2, 5, 4, 1);
  const Matrices out = random_matrices(2, 4, 5, 1);
  CHECK(test::message_of<ConfigError>([&] { GluBank<double>(Matrices{}, {}, {}); }) ==
        "GluBank: 0 gate, 0 up and 0 down weights, expected one of each per expert");
  CHECK(test::message_of<ConfigError>([&] { GluBank<double>(in, in, {out[0]}); }) ==
        "GluBank: 2 gate, 2 up and 1 down weights, expected one of each per expert");
  CHECK(test::message_of<ShapeError>([&] {
          GluBank<double>({in[0], out[0]}, in, out);
        }) == "GluBank: gate[1] is [4, 5], expected [5, 4]");
  CHECK(test::message_of<ShapeError>([&] { GluBank<double>(in, out, out); }) ==
        "GluBank: up[0] is [4, 5], expected [5, 4]");
  CHECK(test::message_of<ShapeError>([&] {
          GluBank<double>(in, in, {out[0], in[0]});
        }) == "GluBank: down[1] is [5, 4], expected [4, 5]");
}

}  // namespace weir::glu_bank_test
