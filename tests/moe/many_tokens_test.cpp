// SPDX-License-Identifier: MIT
#include <weir/core/random.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/clamped_glu_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/input_weighted.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/experts/with_zero_experts.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/cosine_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/glu.hpp>

#include "support/catch.hpp"
#include "support/few_at_a_time.hpp"

namespace weir::many_tokens_test {

TEST_CASE("Many tokens get what a few at a time get", "[moe][many_rows]") {
  constexpr Index kModel = 40;
  constexpr Index kExperts = 5;
  Rng rng(5);
  const LinearRouter<double> linear(kModel, kExperts, rng);
  const GluBank<double> glu(kModel, kExperts, 9, rng);
  const auto check = [&](const auto& layer) { test::check_many_rows(layer, kModel); };
  check(MoELayer(linear, SoftmaxTopK<double>({.k = 2}), Dropless(), glu));
  check(MoELayer(linear, TopKSoftmax<double>({.k = 3}), Dropless(), InputWeighted(glu)));
  check(MoELayer(CosineRouter<double>(kModel, kExperts, rng, {.d_projection = 6}),
                 SigmoidTopK<double>(kExperts, {.k = 2}), Dropless(),
                 ClampedGluBank<double>(kModel, kExperts, 9, rng)));
  check(SharedExperts(MoELayer(linear, SoftmaxTopK<double>({.k = 1}), Dropless(),
                               MlpBank<double, Silu>(kModel, kExperts, 9, rng, {.bias = true})),
                      Glu<double>(kModel, 9, rng), Linear<double>(kModel, 1, rng)));
  check(MoELayer(LinearRouter<double>(kModel, 8, rng), SoftmaxTopK<double>({.k = 2}), Dropless(),
                 WithZeroExperts(glu, rng, {.zero = 1, .identity = 1, .constant = 1})));
}

}  // namespace weir::many_tokens_test
