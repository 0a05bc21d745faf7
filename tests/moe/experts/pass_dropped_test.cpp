// SPDX-License-Identifier: MIT
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/core/storage.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/input_weighted.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/experts/pass_dropped.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/around/rank_policy.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::pass_dropped_test {

static_assert(ExpertBank<PassDropped<GluBank<float>>>);
static_assert(ExpertBank<PassDropped<InputWeighted<MlpBank<double>>>>);
static_assert(kPassesDropped<PassDropped<GluBank<float>>>);
static_assert(!kPassesDropped<InputWeighted<GluBank<float>>>);

namespace {

GluBank<double> glu() {
  Rng rng(1);
  return {4, 4, 3, rng};
}

/// d_model 4, four experts.
template <class S, class C, class B, class... L>
auto layer_of(const S& selector, const C& capacity, const B& bank, const L&... losses) {
  Rng rng(2);
  LinearRouter<double> router(4, 4, rng, {.init_scale = 5.0});
  return MoELayer(router, selector, capacity, bank, losses...);
}

}  // namespace

TEST_CASE("PassDropped passes dropped tokens on, times their weights",
          "[moe][experts][pass_dropped]") {
  const Matrix<double> x = test::random_matrix(9, 4, 1);
  const std::vector<std::uint8_t> mask = {1, 1, 1, 0, 1, 1, 1, 1, 0};
  Routing<double> routing =
      test::route(SoftmaxTopK<double>({.k = 3}), test::random_matrix(9, 4, 2), {.mask = mask});
  test::limit(FixedCapacity({.capacity = 3}), routing);
  for (const bool renormalised : {false, true}) {
    if (renormalised) test::limit(RenormaliseKept(Dropless()), routing);
    Dispatch<double> dispatch;
    dispatch.build(routing);
    GluBank<double>::Cache plain;
    Matrix<double> expected = glu().forward(x, dispatch, {}, plain);
    int dropped = 0;
    for (Index t = 0; t < 9; ++t) {
      for (Index a = routing.first(t); a < routing.last(t); ++a) {
        if (routing.kept[a] != 0) continue;
        ++dropped;
        expected.row(t) += routing.weight[a] * x.row(t);
      }
    }
    CHECK(dropped > 3);
    PassDropped<GluBank<double>>::Cache cache;
    const PassDropped bank(glu());
    const Matrix<double>& y = bank.forward(x, dispatch, {.mask = mask}, cache);
    CHECK(test::relative_error(y, expected) < 1e-14);
    CHECK(y.row(3).isZero(0.0));
  }
}

TEST_CASE("PassDropped without drops is the bank alone", "[moe][experts][pass_dropped]") {
  const Matrix<double> x = test::random_matrix(9, 4, 1);
  Dispatch<double> dispatch;
  dispatch.build(test::route(SoftmaxTopK<double>({.k = 2}), test::random_matrix(9, 4, 2)));
  PassDropped bank(glu());
  GluBank<double> alone = glu();
  decltype(bank)::Cache cache;
  GluBank<double>::Cache plain;
  CHECK(bank.forward(x, dispatch, kTraining, cache) ==
        alone.forward(x, dispatch, kTraining, plain));
  std::vector<double> d_weight(18), expected(18);
  CHECK(bank.backward(x, dispatch, d_weight, cache) ==
        alone.backward(x, dispatch, expected, plain));
  CHECK(d_weight == expected);
}

TEST_CASE("PassDropped sets the gradient of the weight of every assignment",
          "[moe][experts][pass_dropped]") {
  Routing<double> routing =
      test::route(SoftmaxTopK<double>({.k = 2}), test::random_matrix(9, 4, 2));
  test::limit(FixedCapacity({.capacity = 3}), routing);
  Dispatch<double> dispatch;
  dispatch.build(routing);
  const Matrix<double> x = test::random_matrix(9, 4, 1);
  const Matrix<double> dy = test::random_matrix(9, 4, 3);
  PassDropped bank(glu());
  decltype(bank)::Cache cache;
  bank.forward(x, dispatch, kTraining, cache);
  std::vector<double> d_weight(18, std::numeric_limits<double>::quiet_NaN());
  bank.backward(dy, dispatch, d_weight, cache);
  for (std::size_t a = 0; a < 18; ++a) CHECK(d_weight[a] == d_weight[a]);
  for (const auto& dropped : dispatch.dropped()) {
    CHECK(d_weight[static_cast<std::size_t>(dropped.assignment)] ==
          Approx(x.row(dropped.token).dot(dy.row(dropped.token))));
  }
}

TEST_CASE("PassDropped keeps the tokens for backward only in training",
          "[moe][experts][pass_dropped]") {
  const auto layer =
      layer_of(TopKSoftmax<double>({.k = 1}), FixedCapacity({.capacity = 1}), PassDropped(glu()));
  const Matrix<double> x = test::random_matrix(10, 4, 5);
  std::remove_const_t<decltype(layer)>::Cache cache;
  layer.forward(x, {}, cache);
  CHECK(cache.bank.x.rows() == 0);
  layer.forward(x, kTraining, cache);
  CHECK(cache.bank.x.rows() == std::ssize(cache.dispatch.dropped()));
}

TEST_CASE("PassDropped gradients agree with finite differences",
          "[moe][experts][pass_dropped][gradient]") {
  const Matrix<double> x = test::random_matrix(8, 4, 2);
  const FixedCapacity capacity({.capacity = 4});
  const SoftmaxTopK<double> raw({.k = 3});
  const auto check = [&](auto layer, const Pass& pass = {}) {
    typename decltype(layer)::Cache cache;
    layer.forward(x, pass, cache);
    CHECK(layer.report(cache).dropped > 0);
    test::check_gradients(layer, x, pass);
  };
  check(layer_of(raw, capacity, PassDropped(glu())));
  check(layer_of(raw, RenormaliseKept(capacity, {.scale = 1.5}), PassDropped(glu()),
                 ImportanceLoss<double>()));
  check(layer_of(SigmoidTopK<double>(4, {.k = 3, .renormalise = false}), RenormaliseKept(capacity),
                 PassDropped(glu())));
  check(layer_of(raw, capacity, PassDropped(InputWeighted(glu()))));
  check(layer_of(RankPolicy(raw, {.train = RankRule::kThreshold}), Dropless(), PassDropped(glu())));
  const std::vector<std::uint8_t> mask = {1, 1, 1, 0, 1, 1, 1, 1};
  check(layer_of(raw, FixedCapacity({.capacity = 3}), PassDropped(glu())), {.mask = mask});
}

TEST_CASE("PassDropped never looks at padding, and takes no tokens",
          "[moe][experts][pass_dropped]") {
  auto layer =
      layer_of(TopKSoftmax<double>({.k = 2}), FixedCapacity({.capacity = 1}), PassDropped(glu()));
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  Matrix<double> x = test::random_matrix(3, 4, 1);
  x.row(1).setConstant(std::numeric_limits<double>::quiet_NaN());
  decltype(layer)::Cache cache;
  const Matrix<double> y = layer.forward(x, {.training = true, .mask = mask}, cache);
  CHECK(y.allFinite());
  CHECK(y.row(1).isZero(0.0));
  const Matrix<double> dx = layer.backward(x, cache);
  CHECK(dx.allFinite());
  CHECK(dx.row(1).isZero(0.0));

  CHECK(layer.forward(Matrix<double>(0, 4), kTraining, cache).cols() == 4);
  CHECK(layer.backward(Matrix<double>(0, 4), cache).cols() == 4);
}

TEST_CASE("PassDropped gives the same bits for any number of threads and allocates nothing",
          "[moe][experts][pass_dropped]") {
  auto layer = layer_of(TopKSoftmax<double>({.k = 2}), CapacityFactor({.train = 0.6, .minimum = 0}),
                        PassDropped(glu()));
  const Matrix<double> x = test::random_matrix(600, 4, 1);
  decltype(layer)::Cache cache;
  const auto step = [&] {
    layer.forward(x, kTraining, cache);
    layer.backward(x, cache);
  };
  step();
  if (test::allocations_are_counted()) CHECK(test::count_allocations(step) == 0);
  const Matrix<double> y = cache.bank.y;
  const Matrix<double> dx = cache.dx;
  const RowVector<double> d_weight = cache.gradient.weights;
  const test::Threads threads(3);
  step();
  CHECK(cache.bank.y == y);
  CHECK(cache.dx == dx);
  CHECK(cache.gradient.weights == d_weight);
}

TEST_CASE("PassDropped refuses a bank that changes the width", "[moe][experts][pass_dropped]") {
  const MlpBank<double> narrow({test::random_matrix(5, 4, 1)}, {test::random_matrix(2, 5, 1)});
  CHECK(test::message_of<ConfigError>([&] { PassDropped{narrow}; }) ==
        "PassDropped: the bank yields 2 features, expected 4 as it takes");
}

TEST_CASE("BankWrapper does what the bank inside does", "[moe][experts][bank_wrapper]") {
  struct Around : BankWrapper<GluBank<double>> {
    explicit Around(GluBank<double> bank) : BankWrapper(std::move(bank)) {}
  };
  static_assert(ExpertBank<Around>);
  const Matrix<double> x = test::random_matrix(9, 4, 1);
  Dispatch<double> dispatch;
  dispatch.build(test::route(SoftmaxTopK<double>({.k = 2}), test::random_matrix(9, 4, 2)));
  Around bank(glu());
  GluBank<double> alone = glu();
  Around::Cache cache;
  GluBank<double>::Cache plain;
  CHECK(bank.experts() == 4);
  CHECK(bank.d_in() == 4);
  CHECK(bank.d_out() == 4);
  CHECK(bank.forward(x, dispatch, kTraining, cache) ==
        alone.forward(x, dispatch, kTraining, plain));
  std::vector<double> d_weight(18), expected(18);
  CHECK(bank.backward(x, dispatch, d_weight, cache) ==
        alone.backward(x, dispatch, expected, plain));
  CHECK(d_weight == expected);

  const auto all = parameters(bank);
  REQUIRE(all.size() == 12);
  CHECK(all[11].name == "3.down");
  CHECK(all[11].parameter->grad == parameters(alone)[11].parameter->grad);
  set_storage(bank, Storage::kPacked);
  CHECK(bank.bank().storage() == Storage::kPacked);
}

}  // namespace weir::pass_dropped_test
