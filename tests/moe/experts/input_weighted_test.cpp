// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include <weir/core/storage.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/any_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/input_weighted.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/experts/pass_dropped.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/glu.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::input_weighted_test {

static_assert(ExpertBank<InputWeighted<GluBank<float>>>);
static_assert(ExpertBank<InputWeighted<InputWeighted<MlpBank<double>>>>);

namespace {

/// Three experts 4 -> 4; the same for the same seed.
GluBank<double> glu_bank(std::uint64_t seed = 1) {
  Rng rng(seed);
  return {4, 3, 5, rng, {.init_scale = 3.0}};
}

/// Three experts 4 -> 2 with biases that are not zero.
MlpBank<double> biased_bank() {
  std::vector<Matrix<double>> in, out, in_bias, out_bias;
  for (std::uint64_t e = 0; e < 3; ++e) {
    in.push_back(test::random_matrix(5, 4, 10 + e));
    out.push_back(test::random_matrix(2, 5, 20 + e));
    in_bias.push_back(test::random_matrix(1, 5, 30 + e));
    out_bias.push_back(test::random_matrix(1, 2, 40 + e));
  }
  return {in, out, in_bias, out_bias};
}

/// What the expert of each kept assignment makes of its weighted token, one at a time.
template <class Bank>
Matrix<double> reference(const Bank& bank, const Matrix<double>& x,
                         const Routing<double>& routing) {
  Matrix<double> y = Matrix<double>::Zero(x.rows(), bank.d_out());
  for (Index t = 0; t < x.rows(); ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      if (routing.kept[a] == 0) continue;
      Matrix<double> logits = Matrix<double>::Zero(1, routing.experts());
      logits(0, routing.expert[a]) = 1.0;
      Routing<double> alone = test::route(SoftmaxTopK<double>({.k = 1}), logits);
      alone.weight[0] = 1.0;
      Dispatch<double> dispatch;
      dispatch.build(alone);
      typename Bank::Cache cache;
      y.row(t) += bank.forward(routing.weight[a] * x.row(t), dispatch, {}, cache);
    }
  }
  return y;
}

}  // namespace

TEST_CASE("InputWeighted weights what experts take", "[moe][experts][input_weighted]") {
  const Matrix<double> x = test::random_matrix(9, 4, 1);
  const std::vector<std::uint8_t> mask = {1, 1, 1, 0, 1, 1, 1, 1, 0};
  for (const Index k : {Index(1), Index(2), Index(3)}) {
    for (const bool dropping : {false, true}) {
      Routing<double> routing = test::route(SigmoidTopK<double>(3, {.k = k, .renormalise = false}),
                                            test::random_matrix(9, 3, 2), {.mask = mask});
      if (dropping) test::limit(FixedCapacity({.capacity = 2}), routing);
      Dispatch<double> dispatch;
      dispatch.build(routing);
      const auto check = [&](const auto& bank) {
        const InputWeighted weighted(bank);
        typename std::remove_cvref_t<decltype(weighted)>::Cache cache;
        const Matrix<double>& y = weighted.forward(x, dispatch, {.mask = mask}, cache);
        CHECK(test::relative_error(y, reference(bank, x, routing)) < 1e-14);
        CHECK(y.row(3).isZero(0.0));
      };
      check(glu_bank());
      check(biased_bank());
    }
  }
}

TEST_CASE("InputWeighted with weights of one is the bank alone", "[moe][experts][input_weighted]") {
  const Matrix<double> x = test::random_matrix(6, 4, 1);
  Routing<double> routing =
      test::route(SoftmaxTopK<double>({.k = 2}), test::random_matrix(6, 3, 2));
  routing.weight.assign(routing.assignments(), 1.0);
  Dispatch<double> dispatch;
  dispatch.build(routing);
  InputWeighted<MlpBank<double>>::Cache cache;
  MlpBank<double>::Cache alone;
  CHECK(test::relative_error(InputWeighted(biased_bank()).forward(x, dispatch, {}, cache),
                             biased_bank().forward(x, dispatch, {}, alone)) < 1e-14);
}

TEST_CASE("InputWeighted scales a network that is homogeneous by its degree",
          "[moe][experts][input_weighted]") {
  // An expert with ReLU and no biases yields g E(x) for g x; with squared ReLU, g^2 E(x).
  const Matrix<double> x = test::random_matrix(5, 4, 1);
  const Routing<double> routing =
      test::route(SoftmaxTopK<double>({.k = 1}), test::random_matrix(5, 3, 2));
  Dispatch<double> dispatch;
  dispatch.build(routing);
  const auto check = [&]<class Act>(Act, bool squared) {
    Rng rng(1);
    const MlpBank<double, Act> bank(4, 3, 5, rng);
    typename MlpBank<double, Act>::Cache alone;
    typename InputWeighted<MlpBank<double, Act>>::Cache cache;
    Matrix<double> expected = bank.forward(x, dispatch, {}, alone);
    for (Index t = 0; squared && t < 5; ++t) {
      expected.row(t) *= routing.weight[t];
    }
    CHECK(test::relative_error(InputWeighted(bank).forward(x, dispatch, {}, cache), expected) <
          1e-14);
  };
  check(Relu{}, false);
  check(SquaredRelu{}, true);
}

TEST_CASE("InputWeighted gradients agree with finite differences",
          "[moe][experts][input_weighted][gradient]") {
  Rng rng(5);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1};
  const Matrix<double> x = test::random_matrix(6, 4, 3);
  const LinearRouter<double> router(4, 3, rng, {.init_scale = 5.0});
  MoELayer llama(router, SigmoidTopK<double>(3, {.k = 1, .renormalise = false}), Dropless(),
                 InputWeighted(glu_bank()));
  test::check_gradients(llama, x);
  MoELayer two(router, SigmoidTopK<double>(3, {.k = 2}), Dropless(), InputWeighted(biased_bank()),
               SwitchLoss<double>({.coefficient = 0.3}));
  test::check_gradients(two, x, {.mask = mask});
  MoELayer dropping(router, SoftmaxTopK<double>({.k = 2}), FixedCapacity({.capacity = 3}),
                    PassDropped(InputWeighted(glu_bank())));
  test::check_gradients(dropping, x);
}

TEST_CASE("InputWeighted beside a shared expert is the layer of Llama 4",
          "[moe][experts][input_weighted]") {
  Rng rng(5);
  const LinearRouter<double> router(4, 3, rng, {.init_scale = 5.0});
  const Glu<double> shared(4, 6, rng);
  std::vector<Matrix<double>> gate, up, down;
  std::vector<Glu<double>> experts;
  for (std::uint64_t e = 0; e < 3; ++e) {
    gate.push_back(test::random_matrix(5, 4, 10 + e));
    up.push_back(test::random_matrix(5, 4, 20 + e));
    down.push_back(test::random_matrix(4, 5, 30 + e));
    experts.emplace_back(gate.back(), up.back(), down.back());
  }
  const SharedExperts layer(MoELayer(router, SigmoidTopK<double>(3, {.k = 1, .renormalise = false}),
                                     Dropless(), InputWeighted(GluBank<double>(gate, up, down))),
                            shared);

  const Matrix<double> x = test::random_matrix(7, 4, 1);
  const Matrix<double> logits = infer(router, x);
  Matrix<double> expected = infer(shared, x);
  for (Index t = 0; t < 7; ++t) {
    Index best = 0;
    const double logit = logits.row(t).maxCoeff(&best);
    const Matrix<double> input = x.row(t) / (1.0 + std::exp(-logit));
    expected.row(t) += infer(experts[static_cast<std::size_t>(best)], input);
  }
  CHECK(test::relative_error(infer(layer, x), expected) < 1e-14);
}

TEST_CASE("InputWeighted never looks at padding", "[moe][experts][input_weighted]") {
  Rng rng(5);
  MoELayer moe(LinearRouter<double>(4, 3, rng), SigmoidTopK<double>(3, {.k = 2}), Dropless(),
               InputWeighted(glu_bank()));
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  Matrix<double> x = test::random_matrix(3, 4, 1);
  x.row(1).setConstant(std::numeric_limits<double>::quiet_NaN());
  Matrix<double> dy = test::random_matrix(3, 4, 2);
  dy.row(1).setConstant(std::numeric_limits<double>::quiet_NaN());
  decltype(moe)::Cache cache;
  const Matrix<double> y = moe.forward(x, {.training = true, .mask = mask}, cache);
  CHECK(y.row(1).isZero(0.0));
  const Matrix<double> dx = moe.backward(dy, cache);
  CHECK(dx.allFinite());
  CHECK(dx.row(1).isZero(0.0));
}

TEST_CASE("InputWeighted takes no tokens", "[moe][experts][input_weighted]") {
  Rng rng(1);
  MoELayer moe(LinearRouter<double>(4, 3, rng), SigmoidTopK<double>(3), Dropless(),
               InputWeighted(biased_bank()));
  decltype(moe)::Cache cache;
  const Matrix<double>& y = moe.forward(Matrix<double>(0, 4), kTraining, cache);
  CHECK(y.rows() == 0);
  CHECK(y.cols() == 2);
  CHECK(moe.backward(Matrix<double>(0, 2), cache).cols() == 4);
}

TEST_CASE("InputWeighted names the weights of its bank and stores them",
          "[moe][experts][input_weighted]") {
  InputWeighted weighted(glu_bank());
  CHECK(weighted.experts() == 3);
  CHECK(weighted.d_in() == 4);
  CHECK(weighted.d_out() == 4);
  REQUIRE(parameters(weighted).size() == 9);
  CHECK(parameters(weighted)[0].name == "0.gate");

  const Matrix<double> x = test::random_matrix(5, 4, 1);
  Dispatch<double> dispatch;
  dispatch.build(test::route(SoftmaxTopK<double>({.k = 2}), test::random_matrix(5, 3, 2)));
  decltype(weighted)::Cache cache;
  const Matrix<double> before = weighted.forward(x, dispatch, {}, cache);
  set_storage(weighted, Storage::kPacked);
  CHECK(weighted.bank().storage() == Storage::kPacked);
  CHECK(parameters(weighted).empty());
  CHECK(test::relative_error(weighted.forward(x, dispatch, {}, cache), before) < 1e-14);
  std::vector<double> d_weight(10);
  CHECK(test::message_of<StateError>([&] { weighted.backward(x, dispatch, d_weight, cache); }) ==
        "GluBank::backward: the weights are stored for inference, expected Storage::kTrainable");
}

TEST_CASE("InputWeighted gives the same bits for any number of threads and allocates nothing",
          "[moe][experts][input_weighted]") {
  Rng rng(5);
  MoELayer moe(LinearRouter<double>(16, 4, rng, {.init_scale = 5.0}),
               SoftmaxTopK<double>({.k = 2, .renormalise = false}), FixedCapacity({.capacity = 60}),
               InputWeighted(GluBank<double>(16, 4, 24, rng)));
  const Matrix<double> x = test::random_matrix(200, 16, 1);
  decltype(moe)::Cache cache;
  const auto step = [&] {
    zero_gradients(moe);
    moe.forward(x, kTraining, cache);
    moe.backward(x, cache);
  };
  step();
  step();
  CHECK(test::count_allocations([&] {
          moe.forward(x, kTraining, cache);
          moe.backward(x, cache);
        }) == 0);
  step();
  const Matrix<double> y = cache.bank.y;
  const Matrix<double> dx = cache.dx;
  const Matrix<double> d_gate = parameters(moe)[1].parameter->grad;
  const test::Threads threads(3);
  step();
  CHECK(cache.bank.y == y);
  CHECK(cache.dx == dx);
  CHECK(parameters(moe)[1].parameter->grad == d_gate);
}

TEST_CASE("InputWeighted tells layers as experts which tokens they have",
          "[moe][experts][input_weighted]") {
  struct Probe {
    using Scalar = double;
    struct Cache {
      std::vector<Index> token_ids;
      Matrix<double> y, dx;
    };
    const Matrix<double>& forward(MatrixIn<double> x, const Pass& pass, Cache& cache) const {
      pass.check("Probe", x.rows());
      cache.token_ids.assign(pass.token_ids.begin(), pass.token_ids.end());
      cache.y = x;
      return cache.y;
    }
    const Matrix<double>& backward(MatrixIn<double> dy, Cache& cache) {
      cache.dx = dy;
      return cache.dx;
    }
    static void visit(Probe& /*self*/, Walk<double>& /*visit*/) {}
  };
  const InputWeighted bank(AnyBank<Probe>(std::vector<Probe>(2), 4, 4));
  Routing<double> routing;
  routing.begin("Test", Matrix<double>::Zero(3, 2), {});
  routing.assign_each(2);
  routing.expert = {0, 1, 1, 0, 0, 1};
  routing.kept[2] = 0;
  Dispatch<double> dispatch;
  dispatch.build(routing);
  const std::vector<Index> ids = {7, 8, 9};
  const std::vector<std::uint8_t> mask = {1, 1, 1};
  const Sequences sequences({1, 2});
  std::remove_const_t<decltype(bank)>::Cache cache;
  bank.forward(test::random_matrix(3, 4, 1), dispatch,
               {.sequences = &sequences, .mask = mask, .token_ids = ids}, cache);
  CHECK(cache.inner.experts[0].token_ids == std::vector<Index>{7, 8, 9});
  CHECK(cache.inner.experts[1].token_ids == std::vector<Index>{7, 9});
}

TEST_CASE("InputWeighted says what is wrong with its arguments", "[moe][experts][input_weighted]") {
  Dispatch<double> dispatch;
  dispatch.build(test::route(SoftmaxTopK<double>({.k = 1}), test::random_matrix(5, 3, 2)));
  InputWeighted<GluBank<double>>::Cache cache;
  CHECK(test::message_of<ShapeError>([&] {
          InputWeighted(glu_bank()).forward(test::random_matrix(4, 4, 1), dispatch, {}, cache);
        }) == "InputWeighted::forward: x is [4, 4], expected [5, 4]");
}

}  // namespace weir::input_weighted_test
