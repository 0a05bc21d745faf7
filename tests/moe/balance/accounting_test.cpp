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

namespace weir::accounting_test {

namespace {

auto all_balancers() {
  Rng rng(3);
  return MoELayer(
      LinearRouter<double>(3, 4, rng, {.init_scale = 10.0}), SigmoidTopK<double>(4, {.k = 2}),
      Dropless(), GluBank<double>(3, 4, 2, rng), GlobalBatchLoss<double>({.coefficient = 0.5}),
      BiasBalance<double>({.rate = 0.5}), SwitchLoss<double>({.coefficient = 0.3}),
      GShardLoss<double>({.coefficient = 0.2}), ZLoss<double>({.coefficient = 0.1}),
      ImportanceLoss<double>({.coefficient = 0.4}),
      DeviceLoss<double>(ExpertGroups::uniform(4, 2), {.coefficient = 0.6}),
      CommunicationLoss<double>(ExpertGroups::uniform(4, 2),
                                {.devices_per_token = 2, .coefficient = 0.7}),
      EntropyLoss<double>({.token = 0.3, .mean = -0.2}),
      SecondPlaceLoss<double>({.coefficient = 0.2}), SimilarityLoss<double>({.coefficient = 0.3}),
      HierarchicalLoss<double>({.groups = 2, .coefficient = 0.4}),
      OrthogonalityLoss<double>({.coefficient = 0.2}));
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
  PassRecord record;
  for (int i = 0; i < forwards; ++i) {
    record.clear();
    moe.forward(x, test::recorded(pass, record), cache);
  }
  moe.backward(Matrix<double>::Zero(x.rows(), 3), cache);
  return {record.aux_loss(), moe.router().weight().gradient(), moe.template balancer<0>().load(),
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
    moe.forward(x, kTraining, cache);
    moe.backward(dy, cache);
    update(moe);
  };
  pass();
  CHECK(test::count_allocations(pass) == 0);
}

TEST_CASE("Losses that are means over tokens or sequences add up over micro-batches",
          "[moe][balance][accounting]") {
  const auto layer = [] {
    Rng rng(3);
    return MoELayer(
        LinearRouter<double>(3, 4, rng, {.init_scale = 10.0}), SigmoidTopK<double>(4, {.k = 2}),
        Dropless(), GluBank<double>(3, 4, 2, rng), ZLoss<double>({.coefficient = 0.1}),
        EntropyLoss<double>({.token = 0.3, .mean = 0.0}),
        SwitchLoss<double>({.coefficient = 0.3, .scope = Scope::kSequence}),
        GShardLoss<double>({.coefficient = 0.2, .scope = Scope::kSequence}),
        DeviceLoss<double>(ExpertGroups::uniform(4, 2), {.coefficient = 0.6}),
        CommunicationLoss<double>(ExpertGroups::uniform(4, 2),
                                  {.devices_per_token = 2, .coefficient = 0.7}),
        HierarchicalLoss<double>({.groups = 2, .coefficient = 0.4, .scope = Scope::kSequence}),
        OrthogonalityLoss<double>({.coefficient = 0.2}));
  };
  const Matrix<double> x = test::random_matrix(12, 3, 1);
  auto whole = layer();
  decltype(whole)::Cache cache;
  const Sequences four = Sequences::uniform(4, 3);
  PassRecord of_whole, of_parts;
  whole.forward(x, test::recorded({.sequences = &four}, of_whole), cache);
  whole.backward(Matrix<double>::Zero(12, 3), cache);

  auto parts = layer();
  decltype(parts)::Cache parts_cache;
  const Sequences two = Sequences::uniform(2, 3);
  for (const Index first : {0, 6}) {
    const Pass half{.sequences = &two, .aux_scale = 0.5};
    parts.forward(x.middleRows(first, 6), test::recorded(half, of_parts), parts_cache);
    parts.backward(Matrix<double>::Zero(6, 3), parts_cache);
  }
  CHECK(of_parts.aux_loss() == Approx(of_whole.aux_loss()));
  CHECK(test::relative_error(parts.router().weight().gradient(),
                             whole.router().weight().gradient()) < 1e-13);
}

}  // namespace weir::accounting_test
