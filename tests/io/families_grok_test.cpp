// SPDX-License-Identifier: MIT
#include <variant>

#include <weir/io/families/grok.hpp>
#include <weir/presets/grok_1.hpp>
#include <weir/presets/scaled.hpp>

#include "io/families.hpp"

namespace weir::families_grok_test {
namespace {

using presets::GrokConfig;

// hpcai-tech/grok-1
constexpr auto kGrok = R"({
  "architectures": ["Grok1ModelForCausalLM"],
  "auto_map": {"AutoConfig": "configuration_grok1.Grok1Config"},
  "attn_output_multiplier": 0.08838834764831845, "bos_token_id": 1,
  "embedding_multiplier_scale": 78.38367176906169, "eos_token_id": 2, "hidden_size": 6144,
  "intermediate_size": 32768, "max_attn_value": 30.0, "max_position_embeddings": 8192,
  "model_type": "grok-1", "num_attention_heads": 48, "num_experts": 8, "num_experts_per_tok": 2,
  "num_hidden_layers": 64, "num_key_value_heads": 8, "output_multiplier_scale": 0.5773502691896257,
  "output_router_logits": false, "pad_token_id": 0, "rms_norm_eps": 1e-05,
  "router_aux_loss_coef": 0.001, "torch_dtype": "bfloat16", "transformers_version": "4.35.0",
  "use_cache": true, "vocab_size": 131072})";

TEST_CASE("Grok-1's published configuration is read to the last number", "[io][pretrained]") {
  CHECK(test::config_of<GrokConfig>(kGrok) == presets::grok_1());
  nlohmann::json json = nlohmann::json::parse(kGrok);
  json["attn_output_multiplier"] = 0.5;
  json["output_router_logits"] = true;
  const GrokConfig other = test::config_of<GrokConfig>(json.dump());
  CHECK(std::get<GroupedQueryConfig>(other.shape.attention).scale == 0.5);
  CHECK(other.balance == 0.001);
}

TEST_CASE("Settings of Grok-1 that change the result are refused by name", "[io][pretrained]") {
  CHECK(test::config_fault<GrokConfig>(kGrok, [](auto& json) { json["rope_theta"] = 1e6; }) ==
        "'rope_theta' is 1000000.0, expected it not to be there: weir does not know what it "
        "changes");
  CHECK(test::config_fault<GrokConfig>(kGrok, [](auto& json) {
          json["num_attention_heads"] = 0;
        }) == "'num_attention_heads' is 0, expected at least 1");
}

TEST_CASE("Grok-1 comes back from its folder", "[io][pretrained]") {
  GrokConfig config = presets::scaled(presets::grok_1(), {.d_model = 48});
  test::check_family(config, "model.layers.1.moe_block.experts.2.linear_v.weight");
  std::get<GroupedQueryConfig>(config.shape.attention).scale = 0.5;
  config.shape.tied = false;
  CHECK(test::SavedModel(config).comes_back());
}

TEST_CASE("Grok-1's port calls gate, up and down by other names", "[io][pretrained]") {
  test::SavedModel saved(presets::scaled(presets::grok_1(), {.d_model = 48}));
  const std::string expert = "model.layers.0.moe_block.experts.2.";
  CHECK(saved.numbers(expert + "linear.weight")[49] ==
        saved.value("layers.0.moe.experts.2.gate")(1, 1));
  CHECK(saved.numbers(expert + "linear_v.weight")[49] ==
        saved.value("layers.0.moe.experts.2.up")(1, 1));
  CHECK(saved.numbers(expert + "linear_1.weight")[257] ==
        saved.value("layers.0.moe.experts.2.down")(1, 1));
}

TEST_CASE("A layer of Grok-1 is saved under the names of its port", "[io][pretrained]") {
  GrokConfig config = presets::scaled(presets::grok_1(), {.d_model = 48});
  config.shape.experts = config.shape.k = 1;
  const test::SavedModel saved(config);
  CHECK(saved.tensors("") ==
        std::vector<std::string>{"model.embed_tokens.weight [256, 48]",
                                 "model.layers.0.attn.k_proj.weight [8, 48]",
                                 "model.layers.0.attn.o_proj.weight [48, 48]",
                                 "model.layers.0.attn.q_proj.weight [48, 48]",
                                 "model.layers.0.attn.v_proj.weight [8, 48]",
                                 "model.layers.0.moe_block.experts.0.linear.weight [256, 48]",
                                 "model.layers.0.moe_block.experts.0.linear_1.weight [48, 256]",
                                 "model.layers.0.moe_block.experts.0.linear_v.weight [256, 48]",
                                 "model.layers.0.moe_block.gate.weight [1, 48]",
                                 "model.layers.0.post_attn_norm.scale [48]",
                                 "model.layers.0.post_moe_norm.scale [48]",
                                 "model.layers.0.pre_attn_norm.scale [48]",
                                 "model.layers.0.pre_moe_norm.scale [48]",
                                 "model.layers.1.attn.k_proj.weight [8, 48]",
                                 "model.layers.1.attn.o_proj.weight [48, 48]",
                                 "model.layers.1.attn.q_proj.weight [48, 48]",
                                 "model.layers.1.attn.v_proj.weight [8, 48]",
                                 "model.layers.1.moe_block.experts.0.linear.weight [256, 48]",
                                 "model.layers.1.moe_block.experts.0.linear_1.weight [48, 256]",
                                 "model.layers.1.moe_block.experts.0.linear_v.weight [256, 48]",
                                 "model.layers.1.moe_block.gate.weight [1, 48]",
                                 "model.layers.1.post_attn_norm.scale [48]",
                                 "model.layers.1.post_moe_norm.scale [48]",
                                 "model.layers.1.pre_attn_norm.scale [48]",
                                 "model.layers.1.pre_moe_norm.scale [48]",
                                 "model.norm.scale [48]"});
}

}  // namespace
}  // namespace weir::families_grok_test
