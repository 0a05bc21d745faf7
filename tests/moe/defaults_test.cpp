// SPDX-License-Identifier: MIT
// Settings that are left out: what papers and programs publish, and otherwise what changes nothing.
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/communication_loss.hpp>
#include <weir/moe/balance/device_loss.hpp>
#include <weir/moe/balance/entropy_loss.hpp>
#include <weir/moe/balance/global_batch_loss.hpp>
#include <weir/moe/balance/gshard_loss.hpp>
#include <weir/moe/balance/hierarchical_load_loss.hpp>
#include <weir/moe/balance/hierarchical_loss.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/load_loss.hpp>
#include <weir/moe/balance/orthogonality_loss.hpp>
#include <weir/moe/balance/quantile_balance.hpp>
#include <weir/moe/balance/relu_l1_loss.hpp>
#include <weir/moe/balance/second_place_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/adaptive_capacity.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/device_capacity.hpp>
#include <weir/moe/capacity/dynamic_capacity.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/depths/depth_choice.hpp>
#include <weir/moe/experts/clamped_glu_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/experts/output_masking.hpp>
#include <weir/moe/experts/with_zero_experts.hpp>
#include <weir/moe/router/cosine_router.hpp>
#include <weir/moe/router/d_select_k_router.hpp>
#include <weir/moe/router/gumbel_router.hpp>
#include <weir/moe/router/input_dropout_router.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/router/temperature_router.hpp>
#include <weir/moe/selector/biased_probability_top_k.hpp>
#include <weir/moe/selector/biased_softmax_top_k.hpp>
#include <weir/moe/selector/expert_choice.hpp>
#include <weir/moe/selector/hierarchical_top_k.hpp>
#include <weir/moe/selector/relaxed_top_k.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/sinkhorn.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/sparse_mixer.hpp>
#include <weir/moe/selector/straight_through.hpp>
#include <weir/moe/selector/threshold.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/moe/selector/top_p.hpp>
#include <weir/moe/soft_moe.hpp>
#include <weir/ops/coordinate_descent.hpp>

#include "support/catch.hpp"

namespace weir::moe_defaults_test {

TEST_CASE("Losses have the coefficients of their sources", "[moe][balance][defaults]") {
  CHECK(SwitchLossConfig{}.coefficient == 0.01);
  CHECK(GlobalBatchLossConfig{}.coefficient == 0.01);
  CHECK(GShardLossConfig{}.coefficient == 0.01);
  CHECK(HierarchicalLossConfig{}.coefficient == 0.01);
  CHECK(ImportanceLossConfig{}.coefficient == 0.1);
  CHECK(LoadLossConfig{}.coefficient == 0.1);
  CHECK(HierarchicalLoadLossConfig{}.coefficient == 0.1);
  CHECK(ZLossConfig{}.coefficient == 0.001);
  CHECK(DeviceLossConfig{}.coefficient == 0.05);
  CHECK(CommunicationLossConfig{}.coefficient == 0.02);
  CHECK(SecondPlaceLossConfig{}.coefficient == 0.005);
  CHECK(OrthogonalityLossConfig{}.coefficient == 0.01);
  CHECK(ReluL1LossConfig{}.multiplier == 1.2);
  CHECK(ReluL1LossConfig{}.load_balance);
  CHECK(EntropyLossConfig{}.token == 0.0);
  CHECK(EntropyLossConfig{}.mean == 0.0);
  CHECK(BiasBalanceConfig{}.rate == 0.001);
  CHECK(QuantileBalanceConfig{}.momentum == 0.0);
  CHECK(QuantileBalanceConfig{}.recentre);
  CHECK_FALSE(BiasBalanceConfig{}.recentre);
  CHECK(CommunicationLossConfig{}.devices_per_token == 1);
  CHECK(OrthogonalityLossConfig{}.groups == 1);
}

TEST_CASE("Nothing is added to what is divided by unless a setting says so",
          "[moe][balance][defaults]") {
  CHECK(ImportanceLossConfig{}.epsilon == 0.0);
  CHECK(LoadLossConfig{}.epsilon == 0.0);
  CHECK(HierarchicalLoadLossConfig{}.epsilon == 0.0);
  CHECK(SecondPlaceLossConfig{}.epsilon == 0.0);
  CHECK(RenormaliseKeptConfig{}.epsilon == 0.0);
  CHECK(SinkhornConfig{}.epsilon == 0.0);
  CHECK(DSelectKRouterConfig{}.epsilon == 0.0);
  CHECK(SoftMoEConfig{}.epsilon == 0.0);
}

TEST_CASE("Capacities are those of their sources", "[moe][capacity][defaults]") {
  const CapacityFactorConfig factor;
  CHECK(factor.train == 1.25);
  CHECK(factor.evaluate == 2.0);
  CHECK(factor.count_k);
  CHECK(factor.group_size == 0);
  CHECK(FixedCapacityConfig{}.group_size == 0);
  CHECK(DeviceCapacityConfig{}.factor == 1.0);
  CHECK(DeviceCapacityConfig{}.protected_share == 0.1);
  CHECK_FALSE(DeviceCapacityConfig{}.evaluate);
  CHECK(DynamicCapacityConfig{}.factor == 0.0);
  CHECK(DynamicCapacityConfig{}.alignment == 1);
  CHECK(RenormaliseKeptConfig{}.scale == 1.0);
  const AdaptiveCapacityConfig adaptive;
  CHECK(adaptive.initial == 1.25);
  CHECK(adaptive.least == 1.0);
  CHECK(adaptive.most == 4.0);
  CHECK(adaptive.tolerated == 0.01);
  CHECK(adaptive.rate == 0.1);
  const MixtureOfDepthsConfig depths;
  CHECK(depths.capacity == 0.125);
  CHECK(depths.predictor_loss == 0.0);
  CHECK_FALSE(depths.causal_evaluation);
}

TEST_CASE("Selectors have one group, a scale of one, and weights as their sources",
          "[moe][selector][defaults]") {
  CHECK(GroupLimit{}.count == 1);
  CHECK(GroupLimit{}.allowed == 1);
  CHECK(GroupLimit{}.summed == 1);
  CHECK(SoftmaxTopKConfig{}.scale == 1.0);
  CHECK(SoftmaxTopKConfig{}.norm == 1.0);
  CHECK(TopKSoftmaxConfig{}.scale == 1.0);
  CHECK(SigmoidTopKConfig{}.scale == 1.0);
  CHECK(BiasedSoftmaxTopKConfig{}.scale == 1.0);
  CHECK(BiasedProbabilityTopKConfig{}.scale == 1.0);
  CHECK(StraightThroughConfig{}.scale == 1.0);
  CHECK(ThresholdConfig{}.scale == 1.0);
  CHECK_FALSE(SoftmaxTopKConfig{}.renormalise);
  CHECK_FALSE(BiasedSoftmaxTopKConfig{}.renormalise);
  CHECK_FALSE(StraightThroughConfig{}.renormalise);
  CHECK_FALSE(ThresholdConfig{}.renormalise);
  CHECK(SigmoidTopKConfig{}.renormalise);
  CHECK(BiasedProbabilityTopKConfig{}.renormalise);
  CHECK(HierarchicalTopKConfig{}.renormalise);
  CHECK(RelaxedTopKConfig{}.renormalise);
  CHECK(StraightThroughConfig{}.k == 1);
  CHECK(SinkhornConfig{}.k == 1);
  CHECK(ThresholdConfig{}.k_min == 1);
  CHECK(ThresholdConfig{}.threshold == 0.2);
  CHECK(HierarchicalTopKConfig{}.rest_k == 1);
  CHECK(TopPConfig{}.threshold == 0.4);
  CHECK(TopPConfig{}.most == 0);
  CHECK(SparseMixerConfig{}.epsilon == 0.01);
  CHECK(ExpertChoiceConfig{}.factor == 2.0);
  CHECK(ExpertChoiceConfig{}.multiple == 1);
  CHECK_FALSE(ExpertChoiceConfig{}.divide);
  CHECK(CoordinateDescentConfig{}.epsilon == 0.1);
  CHECK(CoordinateDescentConfig{}.first_epsilon == 0.0);
  CHECK(CoordinateDescentConfig{}.epsilon_decay == 1.0);
}

TEST_CASE("Routers, experts and what stands beside them begin as their sources say",
          "[moe][router][defaults]") {
  CHECK_FALSE(LinearRouterConfig{}.bias);
  CHECK(LinearRouterConfig{}.init_scale == 0.1);
  CHECK(NoisyRouterConfig{}.min_std == 0.01);
  CHECK(CosineRouterConfig{}.bias);
  CHECK(CosineRouterConfig{}.temperature == 0.5);
  CHECK(CosineRouterConfig{}.least_temperature == 0.01);
  CHECK(DSelectKRouterConfig{}.gamma == 1.0);
  CHECK(DSelectKRouterConfig{}.entropy == 0.0);
  CHECK(DSelectKRouterConfig{}.reach == 1.0);
  CHECK(GumbelRouterConfig{}.scale == 1.0);
  CHECK(InputDropoutRouterConfig{}.rate == 0.1);
  CHECK(JitterRouterConfig{}.epsilon == 0.01);
  CHECK(TemperatureRouterConfig{}.start == 1.0);
  CHECK(TemperatureRouterConfig{}.end == 1.0);
  CHECK(TemperatureRouterConfig{}.steps == 1);
  CHECK(GluBankConfig{}.init_scale == 1.0);
  CHECK(GluBankConfig{}.dropout == 0.0);
  CHECK_FALSE(MlpBankConfig{}.bias);
  CHECK(MlpBankConfig{}.init_scale == 1.0);
  CHECK(MlpBankConfig{}.dropout == 0.0);
  CHECK(ClampedGluBankConfig{}.alpha == 1.702);
  CHECK(ClampedGluBankConfig{}.limit == 7.0);
  CHECK(ClampedGluBankConfig{}.init_scale == 1.0);
  CHECK(OutputMaskingConfig{}.rate == 0.2);
  CHECK(WithZeroExpertsConfig{}.zero == 0);
  CHECK(WithZeroExpertsConfig{}.identity == 0);
  CHECK(WithZeroExpertsConfig{}.constant == 0);
  CHECK(SharedExpertsConfig{}.routed_weight == 1.0);
  CHECK(SharedExpertsConfig{}.shared_weight == 1.0);
  CHECK(SoftMoEConfig{}.slots_per_expert == 1);
  CHECK(SoftMoEConfig{}.normalise);
  CHECK(SoftMoEConfig{}.scale == 1.0);
}

}  // namespace weir::moe_defaults_test
