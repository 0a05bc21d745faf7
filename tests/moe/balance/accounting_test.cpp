// SPDX-License-Identifier: MIT
// What all balancers have to get right in a layer: padding, scales, and passes that are run again.
#include <cmath>
#include <vector>

#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/communication_loss.hpp>
#include <weir/moe/balance/device_loss.hpp>
#include <weir/moe/balance/entropy_loss.hpp>
#include <weir/moe/balance/global_batch_loss.hpp>
#include <weir/moe/balance/gshard_loss.hpp>
#include <weir/moe/balance/hierarchical_loss.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/orthogonality_loss.hpp>
#include <weir/moe/balance/second_place_loss.hpp>
#include <weir/moe/balance/similarity_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"

using namespace weir;

namespace {

auto all_balancers() {
  Rng rng(3);
  return MoELayer(LinearRouter<double>(3, 4, rng, {.init_scale = 10.0}),
                  SigmoidTopK<double>(4, {.k = 2}), Dropless{}, GluBank<double>(4, 3, 2, rng),
                  GlobalBatchLoss<double>(0.5), BiasBalance<double>(0.5), SwitchLoss<double>{0.3},
                  GShardLoss<double>{0.2}, ZLoss<double>{0.1}, ImportanceLoss<double>{0.4},
                  DeviceLoss<double>{ExpertGroups::uniform(4, 2), 0.6},
                  CommunicationLoss<double>{ExpertGroups::uniform(4, 2), 2, 0.7},
                  EntropyLoss<double>{0.3, -0.2}, SecondPlaceLoss<double>{0.2},
                  SimilarityLoss<double>{0.3}, HierarchicalLoss<double>{2, 0.4},
                  OrthogonalityLoss<double>{0.2});
}

struct Result {
  double loss;
  Matrix<double> d_router;
  RowVector<double> global, bias;  ///< What the two counted.
};

/// One step of the losses alone, `forwards` forward passes to one backward pass.
Result step(const Matrix<double>& x, const Pass& pass, int forwards = 1) {
  auto moe = all_balancers();
  decltype(moe)::Cache cache;
  for (int i = 0; i < forwards; ++i) moe.forward(x, pass, cache);
  moe.backward(Matrix<double>::Zero(x.rows(), 3), cache);
  return {cache.aux_loss, moe.router().weight().gradient(), moe.template balancer<0>().load(),
          moe.template balancer<1>().load()};
}

}  // namespace

TEST_CASE("No balancer sees padding", "[moe][balance][accounting]") {
  const Matrix<double> x = test::random_matrix(5, 3, 1);
  Matrix<double> padded = Matrix<double>::Constant(7, 3, NAN);
  padded.topRows(2) = x.topRows(2);
  padded.bottomRows(3) = x.bottomRows(3);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 0, 1, 1, 1};
  const Result expected = step(x, {});
  const Result actual = step(padded, {.mask = mask});
  CHECK(actual.loss == Approx(expected.loss));
  CHECK(test::relative_error(actual.d_router, expected.d_router) < 1e-13);
  CHECK(actual.global == expected.global);
  CHECK(actual.bias == expected.bias);
  CHECK(expected.bias.sum() == 10.0);
}

TEST_CASE("The scale of a micro-batch, or of the loss, scales losses and gradients, not counts",
          "[moe][balance][accounting]") {
  const Matrix<double> x = test::random_matrix(5, 3, 1);
  const double scale = GENERATE(0.25, 1024.0, 0.0);
  const Result expected = step(x, {});
  const Result actual = step(x, {.aux_scale = scale});
  CHECK(expected.d_router.norm() > 0.1);
  CHECK(actual.loss == Approx(scale * expected.loss));
  CHECK(test::relative_error(actual.d_router, Matrix<double>(scale * expected.d_router)) < 1e-13);
  CHECK(actual.global == expected.global);
  CHECK(actual.bias == expected.bias);
}

TEST_CASE("A forward pass that is run again changes nothing", "[moe][balance][accounting]") {
  const Matrix<double> x = test::random_matrix(5, 3, 1);
  const Result expected = step(x, {});
  const Result actual = step(x, {}, 3);
  CHECK(actual.loss == expected.loss);
  CHECK(actual.d_router == expected.d_router);
  CHECK(actual.global == expected.global);
  CHECK(actual.bias == expected.bias);
}

TEST_CASE("Balancers side by side allocate nothing in the steady state",
          "[moe][balance][accounting]") {
  if (!test::allocations_are_counted()) return;
  auto moe = all_balancers();
  decltype(moe)::Cache cache;
  const Matrix<double> x = test::random_matrix(64, 3, 1);
  const Matrix<double> dy = Matrix<double>::Zero(64, 3);
  const auto pass = [&] {
    moe.forward(x, cache);
    moe.backward(dy, cache);
    moe.update();
  };
  pass();
  CHECK(test::count_allocations(pass) == 0);
}

TEST_CASE("Losses that are means over tokens or sequences add up over micro-batches",
          "[moe][balance][accounting]") {
  const auto layer = [] {
    Rng rng(3);
    return MoELayer(LinearRouter<double>(3, 4, rng, {.init_scale = 10.0}),
                    SigmoidTopK<double>(4, {.k = 2}), Dropless{}, GluBank<double>(4, 3, 2, rng),
                    ZLoss<double>{0.1}, EntropyLoss<double>{0.3, 0.0},
                    SwitchLoss<double>{.coefficient = 0.3, .scope = Scope::kSequence},
                    GShardLoss<double>{.coefficient = 0.2, .scope = Scope::kSequence},
                    DeviceLoss<double>{ExpertGroups::uniform(4, 2), 0.6},
                    CommunicationLoss<double>{ExpertGroups::uniform(4, 2), 2, 0.7},
                    HierarchicalLoss<double>{2, 0.4, Scope::kSequence},
                    OrthogonalityLoss<double>{0.2});
  };
  const Matrix<double> x = test::random_matrix(12, 3, 1);
  auto whole = layer();
  decltype(whole)::Cache cache;
  const Sequences four = Sequences::uniform(4, 3);
  whole.forward(x, {.sequences = &four}, cache);
  whole.backward(Matrix<double>::Zero(12, 3), cache);
  const double loss = cache.aux_loss;

  auto parts = layer();
  double sum = 0.0;
  const Sequences two = Sequences::uniform(2, 3);
  for (const Index first : {0, 6}) {
    parts.forward(x.middleRows(first, 6), {.sequences = &two, .aux_scale = 0.5}, cache);
    parts.backward(Matrix<double>::Zero(6, 3), cache);
    sum += cache.aux_loss;
  }
  CHECK(sum == Approx(loss));
  CHECK(test::relative_error(parts.router().weight().gradient(),
                             whole.router().weight().gradient()) < 1e-13);
}
