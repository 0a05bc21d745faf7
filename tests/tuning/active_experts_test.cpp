// SPDX-License-Identifier: MIT
#include <optional>
#include <string>
#include <vector>

#include <weir/model/decoder.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/around/sampled_choice.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/moe/selector/top_p.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/tuning/active_experts.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::active_experts_test {

namespace {

template <class Selector>
auto mixture(Selector selector) {
  Rng rng(3);
  return MoELayer(LinearRouter<double>(4, 5, rng, {.init_scale = 4.0}), std::move(selector),
                  Dropless(), GluBank<double>(4, 5, 3, rng));
}

}  // namespace

TEST_CASE("A mixture with another k is one that was made with it, forward and backward",
          "[tuning][gradient]") {
  const Matrix<double> x = test::random_matrix<double>(6, 4, 1);
  const auto check = [&](auto before, auto after) {
    auto layer = mixture(before);
    auto made = mixture(after);
    CHECK(infer(layer, x) != infer(made, x));
    CHECK(set_active_experts(layer, "*", 3) == 1);
    CHECK(infer(layer, x) == infer(made, x));
    test::check_gradients(layer, x);
  };
  check(TopKSoftmax<double>({.k = 1}), TopKSoftmax<double>({.k = 3}));
  check(SoftmaxTopK<double>({.k = 2, .renormalise = true}),
        SoftmaxTopK<double>({.k = 3, .renormalise = true}));
  check(SigmoidTopK<double>(5, {.k = 5}), SigmoidTopK<double>(5, {.k = 3}));
  check(BiasedSoftmaxTopK<double>(5, {.k = 1}), BiasedSoftmaxTopK<double>(5, {.k = 3}));
}

TEST_CASE("Mixtures of a decoder have their own k by name", "[tuning]") {
  Rng rng(3);
  std::vector<Block<double>> blocks;
  for (int l = 0; l < 2; ++l) {
    std::vector<Branch<double>> branches;
    branches.push_back({"moe", RmsNorm<double>(4), mixture(TopKSoftmax<double>({.k = 2}))});
    blocks.emplace_back(std::move(branches));
  }
  Decoder<double> model(Embedding<double>(7, 4, rng), std::move(blocks), RmsNorm<double>(4));
  CHECK(set_active_experts(model, "layers.1.moe", 4) == 1);
  PassRecord record(PassRecord::Collects::kLossesAndReports);
  const std::vector<Index> ids = {1, 2, 3};
  infer(model, ids, {.record = &record});
  REQUIRE(record.reports().size() == 2);
  CHECK(record.reports()[0].report.assignments == 6);
  CHECK(record.reports()[1].report.assignments == 12);
  CHECK(set_active_experts(model, "*", 1) == 2);
}

TEST_CASE("k falls from dense to sparse in a straight line", "[tuning]") {
  const AnnealedExperts k = {.first = 8, .last = 2, .steps = 12};
  CHECK(k(0) == 8);
  CHECK(k(1) == 8);  // 7.5 is rounded up.
  CHECK(k(2) == 7);
  CHECK(k(6) == 5);
  CHECK(k(11) == 3);
  CHECK(k(12) == 2);
  CHECK(k(1000) == 2);
  CHECK(AnnealedExperts{.first = 4, .last = 1, .steps = 0}(0) == 1);
  CHECK(test::message_of<ConfigError>([&] { k(-1); }) == "AnnealedExperts: t = -1, expected >= 0");
  const auto refused = [](const AnnealedExperts& schedule) {
    return test::message_of<ConfigError>([&] { schedule(0); });
  };
  CHECK(refused({.first = 0}) == "AnnealedExperts: first = 0, expected >= 1");
  CHECK(refused({.last = 0}) == "AnnealedExperts: last = 0, expected >= 1");
  CHECK(refused({.steps = -1}) == "AnnealedExperts: steps = -1, expected >= 0");
}

TEST_CASE("A k that cannot be served is refused, and so is backward over a change", "[tuning]") {
  auto layer = mixture(TopKSoftmax<double>({.k = 2}));
  const Matrix<double> x = test::random_matrix<double>(6, 4, 1);
  const Matrix<double> y = infer(layer, x);
  const auto message = [](auto& of, Index k) {
    return test::message_of<ConfigError>([&] { set_active_experts(of, "*", k); });
  };
  CHECK(message(layer, 6) == "TopKSoftmax: k = 6, expected 1 <= k <= experts = 5");
  CHECK(message(layer, 0) == "set_active_experts: k = 0, expected >= 1");
  CHECK(infer(layer, x) == y);
  auto by_share = mixture(TopP<double>());
  CHECK(message(by_share, 2) ==
        "set_active_experts: no mixture matches '*', expected at least one");
  decltype(layer)::Cache cache;
  layer.forward(x, kTraining, cache);
  set_active_experts(layer, "*", 3);
  CHECK(test::message_of<StateError>([&] { layer.backward(x, cache); }) ==
        "MoELayer::backward: the experts were changed since the forward pass, expected a new one");
}

}  // namespace weir::active_experts_test
