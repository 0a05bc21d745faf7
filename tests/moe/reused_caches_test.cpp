// SPDX-License-Identifier: MIT
// Mixtures compute the same with a cache that has served passes of other sizes. compositions_fuzz
// has the stages of MoELayer.
#include <weir/moe/beside/residual_moe.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/depths/mixture_of_depths.hpp>
#include <weir/moe/depths/token_predictor.hpp>
#include <weir/moe/experts/clamped_glu_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/multi_gate.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/soft_moe.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>

#include "support/caches.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::moe_reused_caches_test {
namespace {

constexpr Index kModel = 5;

LinearRouter<double> router(Rng& rng) {
  return {kModel, 4, rng, {.init_scale = 3.0}};
}

auto mixture(Rng& rng) {
  return MoELayer(router(rng), SoftmaxTopK<double>({.k = 2}), Dropless(),
                  GluBank<double>(kModel, 4, 3, rng));
}

template <class L>
void check(const L& layer) {
  test::check_reused_caches(layer, test::random_matrix(9, kModel, 1));
}

}  // namespace

TEST_CASE("Caches of mixtures serve pass after pass", "[moe][caches]") {
  Rng rng(1);
  check(mixture(rng));
  check(MoELayer(router(rng), SoftmaxTopK<double>({.k = 1}),
                 CapacityFactor({.train = 0.6, .minimum = 1}),
                 ClampedGluBank<double>(kModel, 4, 3, rng)));
  check(SharedExperts(mixture(rng), Glu<double>(kModel, 3, rng)));
  check(SharedExperts(mixture(rng), Glu<double>(kModel, 3, rng), Linear<double>(kModel, 1, rng)));
  check(ResidualMoE(mixture(rng), Glu<double>(kModel, 3, rng), Linear<double>(kModel, 2, rng)));
  using Gates = MultiGateMixture<LinearRouter<double>, SoftmaxTopK<double>, GluBank<double>>;
  check(Gates({router(rng), router(rng)}, SoftmaxTopK<double>({.k = 2}),
              GluBank<double>(kModel, 4, 3, rng)));
  check(SoftMoE(GluBank<double>(kModel, 4, 3, rng), rng, {.slots_per_expert = 2}));
}

TEST_CASE("Caches of mixtures of depths serve pass after pass", "[moe][caches]") {
  Rng rng(2);
  check(MixtureOfDepths(Linear<double>(kModel, kModel, rng), kModel, rng,
                        {.capacity = 0.5, .predictor_loss = 0.1}));
  check(MixtureOfDepths(mixture(rng), kModel, rng, {.capacity = 0.4}));
  check(TokenPredictor<double>(kModel, 6, rng));
}

}  // namespace weir::moe_reused_caches_test
