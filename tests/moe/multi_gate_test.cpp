// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <weir/io/weights.hpp>
#include <weir/model/any_layer.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/output_masking.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/multi_gate.hpp>
#include <weir/moe/router/d_select_k_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/mlp.hpp>

#include "io/folder.hpp"
#include "support/allocations.hpp"
#include "support/any_stage.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/same_draws.hpp"
#include "support/threads.hpp"

namespace weir::multi_gate_test {

namespace {

constexpr Index kModel = 4;
constexpr Index kExperts = 3;
constexpr Index kOut = 5;  // Of an expert.

using Gate = test::AnyRouter<double>;
using Chooser = test::AnySelector<double>;
using Bank = test::AnyExperts<double>;
using Tower = AnyLayer<double>;
using Mixture = MultiGateMixture<Gate, Chooser, Bank, Tower>;

static_assert(Layer<Mixture>);
static_assert(HasExperts<Mixture>);

LinearRouter<double> gate(std::uint64_t task, double scale = 1.0) {
  return LinearRouter<double>(scale * test::random_matrix(kExperts, kModel, 50 + task));
}

GluBank<double> bank() {
  std::vector<Matrix<double>> gate, up, down;
  for (std::uint64_t e = 0; e < kExperts; ++e) {
    gate.push_back(test::random_matrix(6, kModel, 10 + e));
    up.push_back(test::random_matrix(6, kModel, 20 + e));
    down.push_back(test::random_matrix(kOut, 6, 30 + e));
  }
  return {gate, up, down};
}

/// Task 0 has two outputs, task 1 five, task 2 one.
std::vector<Tower> towers() {
  return {Linear<double>(test::random_matrix(2, kOut, 60), test::random_matrix(1, 2, 61)),
          Mlp<double, Silu>(test::random_matrix(3, kOut, 62), test::random_matrix(kOut, 3, 63)),
          Linear<double>(test::random_matrix(1, kOut, 64))};
}

SoftmaxTopK<double> dense() {
  return SoftmaxTopK<double>({.k = kExperts});
}

Mixture three_tasks(const Chooser& selector = dense(), double scale = 1.0) {
  return {{gate(0, scale), gate(1, scale), gate(2, scale)}, selector, bank(), towers()};
}

/// What expert e makes of a row.
Matrix<double> expert(Index e, const Matrix<double>& x) {
  const auto seed = static_cast<std::uint64_t>(e);
  const Matrix<double> z = x * test::random_matrix(6, kModel, 10 + seed).transpose();
  const Matrix<double> up = x * test::random_matrix(6, kModel, 20 + seed).transpose();
  Matrix<double> h(1, 6);
  for (Index i = 0; i < 6; ++i) h(0, i) = z(0, i) / (1.0 + std::exp(-z(0, i))) * up(0, i);
  return h * test::random_matrix(kOut, 6, 30 + seed).transpose();
}

/// f_k(x) for one row, as the paper defines it.
Matrix<double> mixture(std::uint64_t task, const Matrix<double>& x) {
  const Matrix<double> z = x * test::random_matrix(kExperts, kModel, 50 + task).transpose();
  Matrix<double> f = Matrix<double>::Zero(1, kOut);
  double sum = 0.0;
  for (Index e = 0; e < kExperts; ++e) {
    f += std::exp(z(0, e)) * expert(e, x);
    sum += std::exp(z(0, e));
  }
  return f / sum;
}

}  // namespace

TEST_CASE("MultiGateMixture is its definition", "[moe][multi_gate]") {
  const Matrix<double> x = test::random_matrix(7, kModel, 1);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 0, 1};
  Matrix<double> padded = x;
  padded.row(2).setConstant(std::numeric_limits<double>::quiet_NaN());
  const Mixture layer = three_tasks();
  Mixture::Cache cache;
  const Matrix<double> y = layer.forward(padded, {.mask = mask}, cache);
  CHECK(layer.tasks() == 3);
  REQUIRE(y.cols() == 2 + 5 + 1);
  CHECK(cache.column(1) == 2);
  CHECK(cache.columns(1) == 5);
  CHECK(cache.column(2) == 7);
  for (Index t = 0; t < 7; ++t) {
    Matrix<double> expected = Matrix<double>::Zero(1, 8);
    if (mask[static_cast<std::size_t>(t)] != 0) {
      expected.leftCols(2) = mixture(0, x.row(t)) * test::random_matrix(2, kOut, 60).transpose() +
                             test::random_matrix(1, 2, 61);
      expected.middleCols(2, 5) = infer(towers()[1], mixture(1, x.row(t)));
      expected.rightCols(1) = mixture(2, x.row(t)) * test::random_matrix(1, kOut, 64).transpose();
    }
    CHECK((y.row(t) - expected).norm() <= 1e-12 * (1.0 + expected.norm()));
  }
  // Without towers, the mixtures themselves.
  const Mixture bare({gate(0), gate(1)}, dense(), bank());
  const Matrix<double> f = bare.forward(x, {}, cache);
  REQUIRE(f.cols() == 2 * kOut);
  for (Index t = 0; t < 7; ++t) {
    CHECK(test::relative_error(f.row(t).leftCols(kOut), mixture(0, x.row(t))) <= 1e-12);
    CHECK(test::relative_error(f.row(t).rightCols(kOut), mixture(1, x.row(t))) <= 1e-12);
  }
}

TEST_CASE("One task with one gate is the mixture of MoELayer", "[moe][multi_gate]") {
  const Matrix<double> x = test::random_matrix(6, kModel, 1);
  const Matrix<double> dy = test::random_matrix(6, kOut, 2);
  for (const Index k : {1, 2, 3}) {
    const TopKSoftmax<double> selector({.k = k});
    MultiGateMixture<LinearRouter<double>, TopKSoftmax<double>, GluBank<double>> layer(
        {gate(0)}, selector, bank());
    MoELayer moe(gate(0), selector, Dropless(), bank());
    decltype(layer)::Cache cache;
    decltype(moe)::Cache expected;
    CHECK(test::relative_error(layer.forward(x, kTraining, cache),
                               moe.forward(x, kTraining, expected)) <= 1e-13);
    CHECK(test::relative_error(layer.backward(dy, cache), moe.backward(dy, expected)) <= 1e-13);
    const auto own = parameters(layer);
    const auto of_moe = parameters(moe);
    REQUIRE(own.size() == of_moe.size());
    CHECK(own[0].name == "gates.0.weight");
    CHECK(own[1].name == of_moe[1].name);
    for (std::size_t i = 0; i < own.size(); ++i) {
      INFO(own[i].name);
      CHECK((own[i].parameter->gradient() - of_moe[i].parameter->gradient()).norm() <=
            1e-12 * (1.0 + of_moe[i].parameter->gradient().norm()));
    }
  }
}

TEST_CASE("MultiGateMixture gradients agree with finite differences",
          "[moe][multi_gate][gradient]") {
  const Matrix<double> x = test::random_matrix(5, kModel, 1);
  const std::vector<std::uint8_t> mask = {1, 0, 1, 1, 1};
  Mixture all = three_tasks();
  test::check_gradients(all, x);
  test::check_gradients(all, x, {.mask = mask});
  // Sparse gates, whose choices differ from task to task.
  Mixture sparse = three_tasks(TopKSoftmax<double>({.k = 2}), 6.0);
  test::check_gradients(sparse, x);
  Mixture bare({gate(0), gate(1)}, dense(), bank());
  test::check_gradients(bare, x);
  // Gates with a loss of their own, and ones that draw.
  Rng rng(7);
  const DSelectKRouter<double> smooth(kModel, kExperts, rng, {.k = 2, .entropy = 0.1});
  const NoisyRouter<double> noisy(test::random_matrix(kExperts, kModel, 71),
                                  test::random_matrix(kExperts, kModel, 72), {.min_std = 0.3});
  test::SameDraws<Mixture> drawing{
      Mixture({smooth, noisy, gate(2)}, dense(), OutputMasking(bank(), {.rate = 0.4}), towers())};
  test::check_gradients(drawing, x);
}

TEST_CASE("An expert computes a token once, and not at all for no task", "[moe][multi_gate]") {
  const Matrix<double> x = test::random_matrix(20, kModel, 1);
  Mixture layer = three_tasks(TopKSoftmax<double>({.k = 1}), 4.0);
  Mixture::Cache cache;
  layer.forward(x, kTraining, cache);
  Index used = 0;
  for (Index t = 0; t < 20; ++t) {
    std::vector<bool> chosen(kExperts, false);
    for (const auto& task : cache.tasks) {
      for (const Index e : task.routing.experts_of(t)) chosen[static_cast<std::size_t>(e)] = true;
    }
    for (const bool is : chosen) used += is ? 1 : 0;
  }
  CHECK(cache.tokens.slots() == used);
  CHECK(used < 60);
  CHECK(used > 20);
  // All gates prefer expert 1: the others get no gradient.
  for (const auto& [name, parameter] : parameters(layer)) {
    if (!name.starts_with("gates.")) continue;
    parameter->value.setZero();
    parameter->value(1, 0) = 50.0;
  }
  const Matrix<double> positive = x.cwiseAbs();
  layer.forward(positive, kTraining, cache);
  CHECK(cache.tokens.slots() == 20);
  layer.backward(test::random_matrix(20, 8, 2), cache);
  for (const auto& [name, parameter] : parameters(layer)) {
    INFO(name);
    if (!name.starts_with("experts.")) continue;
    CHECK(parameter->gradient().isZero(0.0) != name.starts_with("experts.1."));
  }
}

TEST_CASE("Gates of MultiGateMixture keep to the experts that a pass allows", "[moe][multi_gate]") {
  const Matrix<double> x = test::random_matrix(4, kModel, 1);
  const std::vector<std::uint8_t> allowed = {1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 1};
  Mixture layer = three_tasks(TopKSoftmax<double>({.k = 2}));
  Mixture::Cache cache;
  layer.forward(x, {.training = true, .allowed = allowed}, cache);
  for (const auto& task : cache.tasks) {
    for (Index t = 0; t < 4; ++t) {
      for (const Index e : task.routing.experts_of(t)) {
        CHECK(allowed[static_cast<std::size_t>(t * kExperts + e)] == 1);
      }
    }
  }
  CHECK(cache.tokens.slots() == 8);
}

TEST_CASE("A record has what the parts of MultiGateMixture say", "[moe][multi_gate]") {
  Rng rng(7);
  const DSelectKRouter<double> smooth(kModel, kExperts, rng, {.k = 2, .entropy = 0.1});
  const Mixture layer({gate(0), smooth}, dense(), bank());
  PassRecord record(PassRecord::Collects::kLossesAndReports);
  Mixture::Cache cache;
  layer.forward(test::random_matrix(4, kModel, 1), {.training = true, .record = &record}, cache);
  REQUIRE(record.losses().size() == 1);
  CHECK(record.losses()[0].name.starts_with("gates.1."));
  REQUIRE(record.reports().size() == 2);
  CHECK(record.reports()[0].name == "gates.0");
  CHECK(record.reports()[1].report.load == std::vector<Index>{4, 4, 4});
}

TEST_CASE("MultiGateMixture takes any number of tokens, tasks and experts", "[moe][multi_gate]") {
  Mixture layer = three_tasks();
  Mixture::Cache cache;
  for (const Index tokens : {0, 1, 9}) {
    const Matrix<double> x = test::random_matrix(tokens, kModel, 1);
    CHECK(layer.forward(x, kTraining, cache).rows() == tokens);
    CHECK(layer.backward(test::random_matrix(tokens, 8, 2), cache).rows() == tokens);
  }
  const MultiGateMixture<LinearRouter<double>, SoftmaxTopK<double>, GluBank<double>> one(
      {LinearRouter<double>(test::random_matrix(1, 2, 1))}, SoftmaxTopK<double>({.k = 1}),
      GluBank<double>({test::random_matrix(3, 2, 2)}, {test::random_matrix(3, 2, 3)},
                      {test::random_matrix(2, 3, 4)}));
  CHECK(infer(one, test::random_matrix(2, 2, 5)).allFinite());
  CHECK_FALSE(one.has_towers());
  const std::vector<std::uint8_t> none = {0, 0};
  CHECK(infer(one, test::random_matrix(2, 2, 5), {.mask = none}).isZero(0.0));
}

TEST_CASE(
    "MultiGateMixture has the same bits for any number of threads, and allocates nothing "
    "anew",
    "[moe][multi_gate]") {
  using Own = MultiGateMixture<LinearRouter<double>, SoftmaxTopK<double>, GluBank<double>>;
  const Matrix<double> x = test::random_matrix(300, kModel, 1);
  const Matrix<double> dy = test::random_matrix(300, 3, 2);
  const auto make = [] {
    return Own({gate(0), gate(1)}, dense(), bank(),
               {Linear<double>(test::random_matrix(2, kOut, 60)),
                Linear<double>(test::random_matrix(1, kOut, 64))});
  };
  Own layer = make();
  Own::Cache cache;
  const Matrix<double> y = layer.forward(x, kTraining, cache);
  const Matrix<double> dx = layer.backward(dy, cache);
  {
    const test::Threads threads(3);
    Own other = make();
    Own::Cache fresh;
    CHECK(other.forward(x, kTraining, fresh) == y);
    CHECK(other.backward(dy, fresh) == dx);
    for (std::size_t i = 0; i < parameters(layer).size(); ++i) {
      CHECK(parameters(layer)[i].parameter->gradient() ==
            parameters(other)[i].parameter->gradient());
    }
  }
  CHECK(test::count_allocations([&] {
          layer.forward(x, kTraining, cache);
          layer.backward(dy, cache);
        }) == 0);
}

TEST_CASE("MultiGateMixture is saved and loaded", "[moe][multi_gate]") {
  const test::Folder folder;
  const Matrix<double> x = test::random_matrix(5, kModel, 1);
  Mixture layer = three_tasks();
  io::save_weights(folder.path() / "weights.safetensors", layer);
  Mixture other = layer;
  for (const auto& [name, parameter] : parameters(other)) parameter->value.setZero();
  CHECK(infer(other, x) != infer(layer, x));
  io::load_weights(folder.path() / "weights.safetensors", other);
  CHECK(infer(other, x) == infer(layer, x));
}

TEST_CASE("MultiGateMixture says what does not fit", "[moe][multi_gate]") {
  const auto message = [](auto&&... parts) {
    return test::message_of<ConfigError>([&] { Mixture{parts...}; });
  };
  CHECK(message(std::vector<Gate>{}, dense(), bank()) ==
        "MultiGateMixture: gates = 0, expected >= 1");
  const LinearRouter<double> narrow(test::random_matrix(kExperts, 3, 1));
  const LinearRouter<double> few(test::random_matrix(2, kModel, 1));
  CHECK(message(std::vector<Gate>{gate(0), narrow}, dense(), bank()) ==
        "MultiGateMixture: gates[1] has 3 experts and d_model = 3, expected 3 and 4 as the bank");
  CHECK(message(std::vector<Gate>{few}, dense(), bank()) ==
        "MultiGateMixture: gates[0] has 2 experts and d_model = 4, expected 3 and 4 as the bank");
  CHECK(message(std::vector<Gate>{gate(0)}, dense(), bank(), towers()) ==
        "MultiGateMixture: there are 3 towers, expected none or 1 (one per gate)");
  CHECK(message(std::vector<Gate>{gate(0)}, SoftmaxTopK<double>({.k = 4}), bank()) ==
        "SoftmaxTopK: k = 4, expected 1 <= k <= experts = 3");

  Mixture layer = three_tasks();
  Mixture::Cache cache;
  const Matrix<double> x = test::random_matrix(2, kModel, 1);
  CHECK(test::message_of<ShapeError>([&] { infer(layer, test::random_matrix(2, 3, 1)); }) ==
        "MultiGateMixture::forward: x is [2, 3], expected [tokens, 4]");
  const std::vector<std::uint8_t> mask = {1, 1, 1};
  CHECK(test::message_of<ShapeError>([&] { infer(layer, x, {.mask = mask}); }) ==
        "MultiGateMixture::forward: pass.mask has 3 entries, expected 2 (one per token)");
  layer.forward(x, {}, cache);
  CHECK(test::message_of<StateError>([&] { layer.backward(Matrix<double>::Ones(2, 8), cache); }) ==
        "MultiGateMixture::backward: the forward pass did not train, expected one with "
        "pass.training = true");
  layer.forward(x, kTraining, cache);
  CHECK(test::message_of<ShapeError>([&] { layer.backward(x, cache); }) ==
        "MultiGateMixture::backward: dy is [2, 4], expected [2, 8]");
  Matrix<double> broken = x;
  broken(1, 2) = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS_AS(layer.forward(broken, kTraining, cache), NonFiniteError);
  CHECK_THROWS_AS(layer.backward(Matrix<double>::Ones(2, 8), cache), StateError);
}

}  // namespace weir::multi_gate_test
