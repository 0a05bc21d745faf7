// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include <weir/moe/balance/global_batch_loss.hpp>
#include <weir/moe/balance/load_count.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/loss_gradient.hpp"
#include "support/routing.hpp"

namespace weir::load_count_test {

namespace {

Matrix<double> logits_of_five() {
  Matrix<double> logits(5, 4);
  logits << 1.0, 0.5, -0.5, 0.2,  //
      0.3, -0.2, 0.9, 0.4,        //
      -1.0, 0.1, 0.6, 0.7,        //
      0.8, 0.7, -0.3, -0.9,       //
      0.2, 1.1, 0.0, -0.4;
  return logits;
}

/// The gate of DeepSeek-V3 in small: a bias and a group limit.
SigmoidTopK<double> biased() {
  SigmoidTopK<double> selector(4, {.k = 2, .groups = {.count = 2, .allowed = 1}});
  selector.selection_bias().value << -0.3, 0.0, 0.1, 0.25;
  return selector;
}

RowVector<double> load_of(LoadCount count, const Routing<double>& routing) {
  RowVector<double> load = RowVector<double>::Zero(routing.experts());
  add_counted_load(count, routing, 0, routing.tokens(), load);
  return load;
}

RowVector<double> row(std::initializer_list<double> numbers) {
  RowVector<double> v(static_cast<Index>(numbers.size()));
  std::copy(numbers.begin(), numbers.end(), v.data());
  return v;
}

}  // namespace

TEST_CASE("The k largest probabilities do not know the bias and the groups",
          "[moe][balance][load_count]") {
  const Routing<double> routing = test::route(biased(), logits_of_five());
  CHECK(load_of(LoadCount::kAssignments, routing) == row({2, 2, 3, 3}));
  CHECK(load_of(LoadCount::kTopProbabilities, routing) == row({3, 3, 2, 2}));
  const SoftmaxTopK<double> plain({.k = 2});
  const Routing<double> same = test::route(plain, logits_of_five());
  CHECK(load_of(LoadCount::kTopProbabilities, same) == load_of(LoadCount::kAssignments, same));
}

TEST_CASE("The loss of the k largest probabilities has the values of a script of its own",
          "[moe][balance][load_count]") {
  // experts * sum_e f_e P_e with normalised sigmoids; sequences of 3 and 2 tokens.
  const Sequences sequences({3, 2});
  const Routing<double> routing =
      test::route(biased(), logits_of_five(), {.sequences = &sequences});
  const auto loss = [&](LoadCount count, Scope scope) {
    return test::loss_of(SwitchLoss<double>({.coefficient = 1.0, .count = count, .scope = scope}),
                         routing);
  };
  CHECK(loss(LoadCount::kTopProbabilities, Scope::kSequence) ==
        Approx(1.133015345696).epsilon(1e-11));
  CHECK(loss(LoadCount::kAssignments, Scope::kSequence) == Approx(1.153231584047).epsilon(1e-11));
  CHECK(loss(LoadCount::kTopProbabilities, Scope::kBatch) == Approx(1.012387310437).epsilon(1e-11));
  CHECK(loss(LoadCount::kAssignments, Scope::kBatch) == Approx(0.987612689563).epsilon(1e-11));
}

TEST_CASE("The global batch's loss counts the k largest probabilities in every micro-batch",
          "[moe][balance][load_count]") {
  const GlobalBatchLossConfig config{.coefficient = 1.0, .count = LoadCount::kTopProbabilities};
  GlobalBatchLoss<double> loss(config);
  const Routing<double> routing = test::route(biased(), logits_of_five());
  CHECK(test::loss_of(loss, routing) == Approx(1.012387310437).epsilon(1e-11));
  loss.observe(routing);
  CHECK(loss.load() == row({3, 3, 2, 2}));
}

TEST_CASE("The k largest probabilities are among the allowed experts, and none for padding",
          "[moe][balance][load_count]") {
  Matrix<double> logits(2, 4);
  logits << 9.0, -800.0, -900.0, 0.0,  //
      1.0, 2.0, 3.0, 4.0;
  const std::vector<std::uint8_t> allowed = {0, 1, 1, 0};
  const std::vector<std::uint8_t> mask = {1, 0};
  const Routing<double> routing =
      test::route(SoftmaxTopK<double>({.k = 2}), logits, {.mask = mask, .allowed = allowed});
  CHECK(load_of(LoadCount::kTopProbabilities, routing) == row({0, 1, 1, 0}));
}

TEST_CASE("The loss of the k largest probabilities has its exact gradient",
          "[moe][balance][load_count][gradient]") {
  const Sequences sequences({3, 2});
  const SwitchLoss<double> loss(
      {.coefficient = 0.7, .count = LoadCount::kTopProbabilities, .scope = Scope::kSequence});
  test::check_logit_gradient(biased(), loss, logits_of_five(), {.sequences = &sequences});
}

}  // namespace weir::load_count_test
