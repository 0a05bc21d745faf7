// SPDX-License-Identifier: MIT
#include <cmath>
#include <string>
#include <vector>

#include <weir/analysis/expert_redundancy.hpp>
#include <weir/core/token_ids.hpp>
#include <weir/core/verbs.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/scaled.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"
#include "support/texts.hpp"

namespace weir::expert_redundancy_test {

/// A model with one mixture of four experts, of which the lower one is always the better one; the
/// logit of the right next token, 1 in all texts here, is 3, 2, 1 or 0 by the expert.
struct ByHand {
  using Scalar = double;
  Index k = 1;
};

Matrix<double> infer(const ByHand& model, TokenIds ids, const Pass& pass) {
  Matrix<double> scores(ids.count(), 4);
  scores.rowwise() = RowVector<double>{{4.0, 3.0, 2.0, 1.0}};
  const Routing<double> routing = test::route(SoftmaxTopK<double>({.k = model.k}), scores, pass);
  Matrix<double> logits = Matrix<double>::Zero(ids.count(), 2);
  for (Index t = 0; t < ids.count(); ++t) {
    logits(t, 1) = 3.0 - static_cast<double>(routing.expert[routing.first(t)]);
  }
  if (pass.record != nullptr) {
    LayerReport report;
    report.load.assign(4, 0);
    pass.record->add_report(report);
  }
  return logits;
}

namespace {

double loss_of(double logit) {
  return std::log(1.0 + std::exp(-logit));
}

}  // namespace

TEST_CASE("The loss without the best experts by hand", "[analysis]") {
  const std::vector<std::vector<Index>> texts = {{0, 1, 1}, {0, 1}, {1}};
  const auto losses = loss_without_best(
      ByHand{}, texts,
      {.shares = {0.0, 0.25, 0.5, 0.75, 0.1}, .batch = 2, .bootstrap = {.replicates = 20}});
  REQUIRE(losses.size() == 5);
  for (Index masked = 0; masked < 4; ++masked) {
    const Estimate& e = losses[static_cast<std::size_t>(masked)];
    CHECK(e.value == Approx(loss_of(3.0 - static_cast<double>(masked))));
    CHECK(e.low == Approx(e.value));  // All tokens have the same loss.
    CHECK(e.high == Approx(e.value));
  }
  CHECK(losses[4].value == losses[0].value);  // A tenth of four rounds to none.
}

TEST_CASE("The loss without random experts is that of the best one left", "[analysis]") {
  // Of four experts, one masked at random is the best with the probability 1/4; of three masked,
  // each is the last one with the same probability.
  const std::vector<std::vector<Index>> texts(40, std::vector<Index>(101, 1));
  const auto losses =
      loss_without_best(ByHand{}, texts, {.shares = {0.0, 0.25, 0.75}, .random_masks = 2});
  CHECK(losses[0].chance == Approx(losses[0].value));
  CHECK(losses[1].chance == Approx(0.75 * loss_of(3.0) + 0.25 * loss_of(2.0)).epsilon(0.03));
  const double all = loss_of(3.0) + loss_of(2.0) + loss_of(1.0) + loss_of(0.0);
  CHECK(losses[2].chance == Approx(all / 4.0).epsilon(0.03));
  CHECK(std::isnan(loss_without_best(ByHand{}, texts, {.random_masks = 0})[0].chance));
}

TEST_CASE("The loss of a decoder without its best experts", "[analysis]") {
  const auto config = presets::scaled(presets::mixtral_8x7b(), {.d_model = 16, .vocab = 40});
  Rng rng(3);
  Decoder<float> model = presets::make<float>(config, rng);
  std::vector<std::vector<Index>> texts;
  for (std::uint64_t s = 0; s < 3; ++s) texts.push_back(test::random_ids(12, 40, s));
  const RedundancyConfig shares = {.shares = {0.0, 0.25}, .batch = 2, .random_masks = 1};
  const auto losses = loss_without_best(model, texts, shares);

  double sum = 0.0;
  for (const std::vector<Index>& text : texts) {
    const std::vector<Index> before(text.begin(), text.end() - 1);
    const std::vector<Index> next(text.begin() + 1, text.end());
    CrossEntropy<float>::Cache cache;
    sum += static_cast<double>(CrossEntropy<float>().forward(infer(model, before), next, cache));
  }
  CHECK(losses[0].value == Approx(sum / 3.0).epsilon(1e-5));
  CHECK(losses[0].chance == Approx(losses[0].value).epsilon(1e-5));
  CHECK(losses[1].value != Approx(losses[0].value).epsilon(1e-5));
  CHECK(losses[1].low < losses[1].high);
  set_storage(model, Storage::kPacked);
  CHECK(loss_without_best(model, texts, shares)[1].value == Approx(losses[1].value).epsilon(1e-4));
}

TEST_CASE("The loss without the best experts says what is wrong", "[analysis]") {
  const auto complaint = [](const std::vector<std::vector<Index>>& texts,
                            const RedundancyConfig& config, Index k = 1) {
    return test::message_of<ConfigError>([&] { loss_without_best(ByHand{.k = k}, texts, config); });
  };
  const std::vector<std::vector<Index>> text = {{0, 1}};
  CHECK(complaint(text, {.shares = {1.0}}) ==
        "RedundancyConfig: shares has 1, expected 0 <= share < 1");
  CHECK(complaint(text, {.shares = {NAN}}) ==
        "RedundancyConfig: shares has nan, expected 0 <= share < 1");
  CHECK(complaint(text, {.batch = 0}) == "RedundancyConfig: batch = 0, expected >= 1");
  CHECK(complaint(text, {.random_masks = -1}) ==
        "RedundancyConfig: random_masks = -1, expected >= 0");
  CHECK(complaint({}, {}) == "loss_without_best: texts = 0, expected >= 1");
  CHECK(complaint({{0}, {}}, {}) == "loss_without_best: tokens of a text = 0, expected >= 1");
  CHECK(
      complaint(text, {.shares = {0.75}}, 2) ==
      "SoftmaxTopK: token 0 is left 1 of 4 experts by pass.without_best = 0.75, expected at least "
      "k = 2");
  CHECK(std::isnan(loss_without_best(ByHand{}, {{0}}, {.shares = {0.0}})[0].value));
}

}  // namespace weir::expert_redundancy_test
