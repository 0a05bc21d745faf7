// SPDX-License-Identifier: MIT
// Whatever chooses or weighs experts or tokens keeps full precision in every storage: rounding it
// would send tokens elsewhere.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include <weir/moe/beside/residual_moe.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/depths/mixture_of_depths.hpp>
#include <weir/moe/depths/token_predictor.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/cosine_router.hpp>
#include <weir/moe/router/d_select_k_router.hpp>
#include <weir/moe/router/gumbel_router.hpp>
#include <weir/moe/router/hierarchical_router.hpp>
#include <weir/moe/router/layer_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::router_storage_test {

namespace {

constexpr Index kWidth = 6;
constexpr Index kExperts = 4;

using Values = std::vector<std::pair<std::string, Matrix<float>>>;

template <class Part>
Values values(Part& part) {
  Values all;
  for (auto& [name, parameter] : parameters(part)) all.emplace_back(name, parameter->value);
  return all;
}

/// All parameters of `part` stay, bit for bit, and so does its output.
template <class Part>
void check_whole(Part part) {
  const Matrix<float> x = test::random_matrix<float>(9, kWidth, 1);
  const Matrix<float> output = infer(part, x);
  const Values before = values(part);
  REQUIRE(!before.empty());
  for (const Storage storage : {Storage::kBfloat16, Storage::kPacked, Storage::kTrainable}) {
    set_storage(part, storage);
    CHECK(values(part) == before);
    CHECK(infer(part, x) == output);
  }
}

/// The parameters that `layer` keeps in storage kBfloat16 are `kept`, bit for bit.
template <class L>
void check_kept(L layer, const std::vector<std::string>& kept) {
  const Values before = values(layer);
  set_storage(layer, Storage::kBfloat16);
  const Values after = values(layer);
  REQUIRE(after.size() == kept.size());
  for (std::size_t i = 0; i < kept.size(); ++i) {
    CHECK(after[i].first == kept[i]);
    CHECK(std::find(before.begin(), before.end(), after[i]) != before.end());
  }
}

MoELayer<LinearRouter<float>, TopKSoftmax<float>, Dropless, GluBank<float>> mixture(Rng& rng) {
  return {LinearRouter<float>(kWidth, kExperts, rng), TopKSoftmax<float>({.k = 2}), Dropless(),
          GluBank<float>(kWidth, kExperts, 5, rng)};
}

}  // namespace

TEST_CASE("Routers of all kinds keep full precision in every storage", "[moe][router][storage]") {
  Rng rng(2);
  check_whole(LinearRouter<float>(kWidth, kExperts, rng, {.bias = true}));
  check_whole(NoisyRouter<float>(test::random_matrix<float>(kExperts, kWidth, 5),
                                 test::random_matrix<float>(kExperts, kWidth, 6)));
  check_whole(CosineRouter<float>(kWidth, kExperts, rng, {.d_projection = 3, .bias = true}));
  check_whole(DSelectKRouter<float>(kWidth, kExperts, rng, {.k = 2}));
  check_whole(LayerRouter(Linear<float>(kWidth, kExperts, rng), kWidth, kExperts));
  check_whole(LayerRouter(CosineRouter<float>(kWidth, kExperts, rng), kWidth, kExperts));
  check_whole(GumbelRouter(CosineRouter<float>(kWidth, kExperts, rng)));
  check_whole(HierarchicalRouter(LinearRouter<float>(kWidth, 2, rng),
                                 CosineRouter<float>(kWidth, kExperts, rng)));
}

TEST_CASE("What predicts the choice of tokens keeps full precision", "[moe][storage]") {
  Rng rng(3);
  check_whole(TokenPredictor<float>(kWidth, 3, rng));
  check_kept(
      MixtureOfDepths<Glu<float>, TokenPredictor<float>>(Glu<float>(kWidth, 5, rng), kWidth, rng,
                                                         {}, TokenPredictor<float>(kWidth, 3, rng)),
      {"router", "predictor.in.weight", "predictor.in.bias", "predictor.out.weight",
       "predictor.out.bias"});
  check_kept(MixtureOfDepths<Glu<float>, Linear<float>>(Glu<float>(kWidth, 5, rng), kWidth, rng, {},
                                                        Linear<float>(kWidth, 1, rng)),
             {"router", "predictor.weight"});
}

TEST_CASE("Gates beside a mixture keep full precision", "[moe][storage]") {
  Rng rng(4);
  check_kept(mixture(rng), {"router.weight"});
  check_kept(SharedExperts(mixture(rng), Glu<float>(kWidth, 5, rng), Linear<float>(kWidth, 1, rng)),
             {"router.weight", "shared_gate.weight"});
  check_kept(ResidualMoE(mixture(rng), Glu<float>(kWidth, 5, rng), Linear<float>(kWidth, 2, rng)),
             {"router.weight", "mix.weight"});
}

}  // namespace weir::router_storage_test
