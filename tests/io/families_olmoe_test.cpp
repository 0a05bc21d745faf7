// SPDX-License-Identifier: MIT
#include <variant>

#include <weir/io/families/olmoe.hpp>
#include <weir/presets/olmoe_1b_7b.hpp>
#include <weir/presets/scaled.hpp>

#include "io/families.hpp"

namespace weir::families_olmoe_test {
namespace {

using presets::OlmoeConfig;

// allenai/OLMoE-1B-7B-0924
constexpr auto kOlmoe = R"({
  "architectures": ["OlmoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "clip_qkv": null, "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048,
  "initializer_range": 0.02, "intermediate_size": 1024, "max_position_embeddings": 4096,
  "model_type": "olmoe", "norm_topk_prob": false, "num_attention_heads": 16, "num_experts": 64,
  "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
  "output_router_logits": false, "pad_token_id": 1, "rope_scaling": null, "rope_theta": 10000.0,
  "router_aux_loss_coef": 0.01, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.43.0.dev0", "use_cache": true, "vocab_size": 50304})";

TEST_CASE("OLMoE's published configuration is read to the last number", "[io][pretrained]") {
  CHECK(test::config_of<OlmoeConfig>(kOlmoe) == presets::olmoe_1b_7b());
  CHECK(test::lost_settings<OlmoeConfig>(kOlmoe).empty());
}

TEST_CASE("Settings of OLMoE that change the result are read or refused by name",
          "[io][pretrained]") {
  nlohmann::json json = nlohmann::json::parse(kOlmoe);
  json["clip_qkv"] = 8;
  json["norm_topk_prob"] = true;
  const OlmoeConfig config = test::config_of<OlmoeConfig>(json.dump());
  CHECK(config.renormalise);
  CHECK(std::get<GroupedQueryConfig>(config.shape.attention).clip_qkv == 8.0);
  CHECK(test::config_fault<OlmoeConfig>(kOlmoe, [](auto& own) { own["sliding_window"] = 8; }) ==
        "'sliding_window' is 8, expected it not to be there: weir does not know what it changes");
}

TEST_CASE("OLMoE comes back from its folder", "[io][pretrained]") {
  OlmoeConfig config = presets::scaled(presets::olmoe_1b_7b());
  std::get<GroupedQueryConfig>(config.shape.attention).clip_qkv = 0.5;
  test::check_family(config, "model.layers.1.self_attn.q_norm.weight");
  CHECK(test::SavedModel(config).comes_back_fused());
}

TEST_CASE("A layer of OLMoE is saved under its published names", "[io][pretrained]") {
  OlmoeConfig config = presets::scaled(presets::olmoe_1b_7b());
  config.shape.experts = config.shape.k = 1;
  CHECK(test::SavedModel(config).tensors("model.layers.0.") ==
        std::vector<std::string>{"model.layers.0.input_layernorm.weight [32]",
                                 "model.layers.0.mlp.experts.0.down_proj.weight [32, 16]",
                                 "model.layers.0.mlp.experts.0.gate_proj.weight [16, 32]",
                                 "model.layers.0.mlp.experts.0.up_proj.weight [16, 32]",
                                 "model.layers.0.mlp.gate.weight [1, 32]",
                                 "model.layers.0.post_attention_layernorm.weight [32]",
                                 "model.layers.0.self_attn.k_norm.weight [32]",
                                 "model.layers.0.self_attn.k_proj.weight [32, 32]",
                                 "model.layers.0.self_attn.o_proj.weight [32, 32]",
                                 "model.layers.0.self_attn.q_norm.weight [32]",
                                 "model.layers.0.self_attn.q_proj.weight [32, 32]",
                                 "model.layers.0.self_attn.v_proj.weight [32, 32]"});
}

}  // namespace
}  // namespace weir::families_olmoe_test
