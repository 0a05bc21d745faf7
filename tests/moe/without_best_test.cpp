// SPDX-License-Identifier: MIT
// Passes whose tokens go without their best experts.
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/expert_choice.hpp>
#include <weir/moe/selector/hierarchical_top_k.hpp>
#include <weir/moe/selector/relu_routing.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/moe/selector/top_p.hpp>
#include <weir/moe/soft_moe.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::without_best_test {

namespace {

constexpr Index kTokens = 40;  // So many that every expert is left to some of them.
constexpr Index kExperts = 6;

/// The mask of all but the `count` largest logits of each token.
std::vector<std::uint8_t> mask_of(const Matrix<double>& logits, Index count) {
  std::vector<std::uint8_t> allowed;
  for (Index t = 0; t < logits.rows(); ++t) {
    for (Index e = 0; e < logits.cols(); ++e) {
      Index better = 0;
      for (Index f = 0; f < logits.cols(); ++f) better += logits(t, f) > logits(t, e) ? 1 : 0;
      allowed.push_back(better >= count ? 1 : 0);
    }
  }
  return allowed;
}

template <class Selector>
void expect_masked(const Selector& selector) {
  const Matrix<double> logits = test::random_matrix(kTokens, kExperts, 3);
  for (const Index count : {1, 2, 4}) {
    const std::vector<std::uint8_t> allowed = mask_of(logits, count);
    const Routing<double> expected = test::route(selector, logits, {.allowed = allowed});
    const Routing<double> routing = test::route(
        selector, logits, {.without_best = static_cast<double>(count) / double{kExperts} + 0.01});
    REQUIRE(expected.open_experts() == kExperts);
    CHECK(routing.offsets == expected.offsets);
    CHECK(routing.expert == expected.expert);
    CHECK(routing.weight == expected.weight);
    CHECK(routing.probabilities == expected.probabilities);
    CHECK(routing.restricted);
    CHECK(routing.open_experts() == kExperts);
  }
  const Routing<double> all = test::route(selector, logits);
  const Routing<double> none_masked = test::route(selector, logits, {.without_best = 0.05});
  CHECK(none_masked.expert == all.expert);  // A twentieth of six rounds to none.
  CHECK(none_masked.weight == all.weight);
}

}  // namespace

TEST_CASE("A token goes without its best experts as if a mask forbade them", "[moe][allowed]") {
  expect_masked(SoftmaxTopK<double>({.k = 2}));
  expect_masked(SoftmaxTopK<double>({.k = 2, .renormalise = true}));
  expect_masked(TopKSoftmax<double>({.k = 2}));
  expect_masked(SigmoidTopK<double>(kExperts, {.k = 2}));
  expect_masked(TopP<double>({.threshold = 0.6}));
  expect_masked(ReluRouting<double>());
  expect_masked(ExpertChoice<double>({.factor = 2.0}));
  expect_masked(HierarchicalTopK<double>({.groups = 3, .group_k = 1, .k = 1}));
}

TEST_CASE("Equal best experts are masked from the lowest index on", "[moe][allowed]") {
  Matrix<double> logits(1, 4);
  logits << 1, 2, 2, 2;
  const Routing<double> routing =
      test::route(SoftmaxTopK<double>({.k = 1}), logits, {.without_best = 0.5});
  CHECK(routing.expert[0] == 3);
  CHECK(routing.is_forbidden(0, 1));
  CHECK(routing.is_forbidden(0, 2));
  CHECK_FALSE(routing.is_forbidden(0, 0));
}

TEST_CASE("Masks of both kinds and padding go together", "[moe][allowed]") {
  Matrix<double> logits(3, 4);
  logits << 4, 3, 2, 1, 4, 3, 2, 1, 4, 3, 2, 1;
  logits.row(1).setConstant(std::numeric_limits<double>::quiet_NaN());
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  const std::vector<std::uint8_t> allowed = {1, 0, 1, 1};
  const Pass pass = {.mask = mask, .allowed = allowed, .without_best = 0.25};
  const Routing<double> routing = test::route(SoftmaxTopK<double>({.k = 1}), logits, pass);
  REQUIRE(routing.assignments() == 2);
  CHECK(routing.expert[0] == 2);  // 1 is forbidden to all, 0 is the best of the others.
  CHECK(routing.expert[1] == 2);
  CHECK(test::route(SoftmaxTopK<double>({.k = 1}), Matrix<double>(0, 4), {.without_best = 0.25})
            .assignments() == 0);
}

TEST_CASE("Gradients of a mixture without its best experts agree with differences",
          "[moe][allowed][gradient]") {
  Rng rng(5);
  MoELayer moe(LinearRouter<double>(4, 5, rng, {.init_scale = 1.0}), TopKSoftmax<double>({.k = 2}),
               Dropless(), GluBank<double>(4, 5, 3, rng));
  test::check_gradients(moe, test::random_matrix(6, 4, 8), {.training = true, .without_best = 0.4});
}

TEST_CASE("What no mask of the best experts can be is refused", "[moe][allowed]") {
  const auto complaint = [](double share, Index k) {
    return test::message_of<ConfigError>([&] {
      test::route(SoftmaxTopK<double>({.k = k}), test::random_matrix(2, 4, 1),
                  {.without_best = share});
    });
  };
  CHECK(complaint(-0.1, 1) ==
        "SoftmaxTopK: pass.without_best = -0.1, expected 0 <= without_best < 1");
  CHECK(complaint(1.0, 1) == "SoftmaxTopK: pass.without_best = 1, expected 0 <= without_best < 1");
  CHECK(complaint(std::nan(""), 1) ==
        "SoftmaxTopK: pass.without_best = nan, expected 0 <= without_best < 1");
  CHECK(
      complaint(0.75, 2) ==
      "SoftmaxTopK: token 0 is left 1 of 4 experts by pass.without_best = 0.75, expected at least "
      "k = 2");
  CHECK(complaint(0.75, 1) == "no exception");
  Rng rng(1);
  CHECK(test::message_of<ConfigError>([&] {
          infer(SoftMoE(GluBank<double>(4, 2, 3, rng), rng), test::random_matrix(3, 4, 1),
                {.without_best = 0.5});
        }) == "SoftMoE::forward: pass.without_best is set, expected none: slots mix tokens");
}

}  // namespace weir::without_best_test
