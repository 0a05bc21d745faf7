// SPDX-License-Identifier: MIT
// What counts do not show of a published model: its coefficients, factors and frequencies, as in
// its paper or its config.json.
#include <variant>

#include <weir/presets/dbrx.hpp>
#include <weir/presets/deepseek_moe_16b.hpp>
#include <weir/presets/deepseek_v2.hpp>
#include <weir/presets/deepseek_v2_lite.hpp>
#include <weir/presets/deepseek_v3.hpp>
#include <weir/presets/dense.hpp>
#include <weir/presets/ernie_4_5.hpp>
#include <weir/presets/glm_4_5.hpp>
#include <weir/presets/gpt_oss_20b.hpp>
#include <weir/presets/granite_moe.hpp>
#include <weir/presets/grok_1.hpp>
#include <weir/presets/llama_4_scout.hpp>
#include <weir/presets/mixtral_8x22b.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/olmoe_1b_7b.hpp>
#include <weir/presets/openmoe_8b.hpp>
#include <weir/presets/phi_3_5_moe.hpp>
#include <weir/presets/qwen2_moe.hpp>
#include <weir/presets/qwen3_30b_a3b.hpp>
#include <weir/presets/st_moe_32b.hpp>
#include <weir/presets/switch_base_8.hpp>
#include <weir/presets/switch_large.hpp>

#include "support/catch.hpp"

namespace weir::presets_settings_test {

using namespace weir::presets;

namespace {

const GroupedQueryConfig& grouped(const ModelShape& shape) {
  return std::get<GroupedQueryConfig>(shape.attention);
}

const Yarn& yarn(const ModelShape& shape) {
  return std::get<Yarn>(std::get<LatentConfig>(shape.attention).rope_scaling);
}

}  // namespace

TEST_CASE("Presets balance as their models were trained", "[presets][golden]") {
  CHECK(mixtral_8x7b().balance == 0.02);
  CHECK(mixtral_8x22b().balance == 0.02);
  CHECK(dbrx().balance == 0.05);
  CHECK(olmoe_1b_7b().balance == 0.01);
  CHECK(olmoe_1b_7b().z_loss == 0.001);
  CHECK(qwen1_5_moe_a2_7b().balance == 0.001);
  CHECK(qwen3_30b_a3b().balance == 0.001);
  CHECK(deepseek_moe_16b().balance == 0.001);
  CHECK(deepseek_v2_lite().balance == 0.001);
  CHECK(deepseek_v2().balance == 0.003);
  CHECK(deepseek_v2().device_balance == 0.05);
  CHECK(deepseek_v2().communication_balance == 0.02);
  CHECK(deepseek_v2().device_capacity == 1.0);
  CHECK(deepseek_v2().protected_share == 0.1);
  CHECK(deepseek_v3().balance == 0.0001);
  CHECK(deepseek_v3().bias_rate == 0.001);
  CHECK(deepseek_v3().prediction_weight == 0.3);
  CHECK(glm_4_5().balance == 0.0001);
  CHECK(glm_4_5().bias_rate == 0.001);
  CHECK(glm_4_5().prediction_weight == 0.3);
  CHECK(ernie_4_5_21b_a3b().balance == 0.001);
  CHECK(ernie_4_5_21b_a3b().bias_rate == 0.001);
  CHECK(granite_3_1_1b_a400m().balance == 0.001);
  CHECK(switch_base_8().balance == 0.01);
  CHECK(switch_base_8().jitter == 0.01);
  CHECK(st_moe_32b().balance == 0.01);
  CHECK(st_moe_32b().z_loss == 0.001);
  CHECK(st_moe_32b().capacity_train == 1.25);
  CHECK(st_moe_32b().capacity_evaluate == 2.0);
  CHECK(openmoe_8b().balance == 0.01);
  CHECK(openmoe_8b().z_loss == 0.0001);
  CHECK(openmoe_8b().capacity_train == 1.25);
  CHECK(openmoe_8b().capacity_evaluate == 2.0);
  // No loss that is known.
  CHECK(gpt_oss_20b().balance == 0.0);
  CHECK(grok_1().balance == 0.0);
  CHECK(llama_4_scout().balance == 0.0);
  CHECK(phi_3_5_moe().balance == 0.0);
  CHECK(deepseek_v2_lite().device_balance == 0.0);
  CHECK(deepseek_v2_lite().communication_balance == 0.0);
  CHECK(deepseek_v2_lite().protected_share == 0.0);
}

TEST_CASE("Presets weight experts as their models do", "[presets][golden]") {
  CHECK(dbrx().weight_norm == 1.0);
  CHECK_FALSE(olmoe_1b_7b().renormalise);
  CHECK_FALSE(qwen1_5_moe_a2_7b().renormalise);
  CHECK(qwen3_30b_a3b().renormalise);
  CHECK_FALSE(deepseek_moe_16b().renormalise);
  CHECK(deepseek_v3().renormalise);
  CHECK(glm_4_5_air().renormalise);
  CHECK_FALSE(grok_1().renormalise);
  CHECK(phi_3_5_moe().router_epsilon == 0.01);
  CHECK(deepseek_v2_lite().scale == 1.0);
  CHECK(deepseek_v2().scale == 16.0);
  CHECK(glm_4_5_air().scale == 1.0);
  CHECK(glm_4_5().scale == 2.5);
  CHECK(kimi_k2().scale == 2.827);
  CHECK(deepseek_v2().groups == GroupLimit{.count = 8, .allowed = 3, .summed = 1});
  CHECK(deepseek_v2_lite().groups == GroupLimit{});
  CHECK(glm_4_5().groups == GroupLimit{.count = 1, .allowed = 1, .summed = 2});
  CHECK(kimi_k2().groups == GroupLimit{.count = 1, .allowed = 1, .summed = 2});
  CHECK(qwen1_5_moe_a2_7b().shape.shared_gate);
  CHECK_FALSE(openmoe_8b().parallel);
  CHECK(granite_3_1_1b_a400m().embedding_multiplier == 12.0);
  CHECK(granite_3_1_1b_a400m().residual_multiplier == 0.22);
  CHECK(granite_3_1_1b_a400m().logits_scaling == 6.0);
}

TEST_CASE("Presets rotate and cut as their models do", "[presets][golden]") {
  CHECK(grouped(mixtral_8x22b().shape).rope_theta == 1e6);
  CHECK(grouped(deepseek_moe_16b().shape).rope_theta == 1e4);
  CHECK(grouped(dbrx().shape).rope_theta == 5e5);
  CHECK(grouped(dbrx().shape).clip_qkv == 8.0);
  CHECK(grouped(mistral_7b().shape).window == 4096);
  CHECK(grouped(phi_3_5_moe().shape).window == 131072);
  CHECK(grouped(glm_4_5().shape).rotary_dim == 64);
  CHECK(grouped(granite_3_1_1b_a400m().shape).scale == 0.015625);
  CHECK(yarn(deepseek_v2().shape).factor == 40.0);
  CHECK(yarn(deepseek_v2().shape).beta_fast == 32.0);
  CHECK(yarn(deepseek_v2().shape).beta_slow == 1.0);
  CHECK(yarn(deepseek_v2().shape).original_context == 4096);
  CHECK(yarn(deepseek_v3().shape).factor == 40.0);
  CHECK(yarn(deepseek_v3().shape).mscale_all_dim == 1.0);
  CHECK(yarn(kimi_k2().shape).factor == 32.0);
  CHECK(yarn(kimi_k2().shape).beta_fast == 1.0);
  CHECK(yarn(kimi_k2().shape).beta_slow == 1.0);
  const auto small_thetas = std::get<Yarn>(grouped(gpt_oss_20b().shape).rope_scaling);
  CHECK(small_thetas.factor == 32.0);
  CHECK_FALSE(small_thetas.truncate);
  CHECK(grouped(gpt_oss_20b().shape).window == 128);
  CHECK(std::get<GroupedQueryConfig>(*gpt_oss_20b().shape.other_attention).window == 0);
  const auto full = std::get<GroupedQueryConfig>(*llama_4_scout().shape.other_attention);
  CHECK_FALSE(full.rope);
  CHECK(full.temperature_scale == 0.1);
  CHECK(full.temperature_floor == 8192);
  const Llama3Scaling published;  // Llama 3.1's.
  CHECK(published.factor == 8.0);
  CHECK(published.low_freq_factor == 1.0);
  CHECK(published.high_freq_factor == 4.0);
}

TEST_CASE("Switch's and OpenMoE's networks are those of their sizes", "[presets][golden]") {
  CHECK(switch_base_8().shape.network == Network::kPlain);
  CHECK(switch_large_128().shape.network == Network::kPlain);
  CHECK(switch_c_2048().shape.network == Network::kPlain);
  CHECK(switch_xxl_128().shape.network == Network::kGated);
  CHECK(switch_base_8().shape.tied);
  CHECK(switch_large_128().shape.tied);
  CHECK_FALSE(switch_xxl_128().shape.tied);
  CHECK(openmoe_released(openmoe_8b()).shape.network == Network::kOpenMoE);
  CHECK_FALSE(openmoe_released(openmoe_8b()).shape.tied);
}

}  // namespace weir::presets_settings_test
