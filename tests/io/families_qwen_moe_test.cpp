// SPDX-License-Identifier: MIT
#include <cstdint>

#include <weir/io/families/qwen_moe.hpp>
#include <weir/presets/qwen2_moe.hpp>
#include <weir/presets/qwen3_30b_a3b.hpp>
#include <weir/presets/scaled.hpp>

#include "io/families.hpp"

namespace weir::families_qwen_moe_test {
namespace {

using presets::Qwen2MoeConfig;
using presets::Qwen3Config;

// Qwen/Qwen3-30B-A3B
constexpr auto kQwen3 = R"({
  "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
  "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
  "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
  "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true,
  "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
  "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06,
  "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
  "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false,
  "vocab_size": 151936})";

// Qwen/Qwen1.5-MoE-A2.7B
constexpr auto kQwen2 = R"({
  "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
  "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
  "model_type": "qwen2_moe", "num_attention_heads": 16, "num_hidden_layers": 24,
  "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
  "sliding_window": 32768, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.39.0.dev0", "use_cache": true, "use_sliding_window": false,
  "vocab_size": 151936, "decoder_sparse_step": 1, "moe_intermediate_size": 1408,
  "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60,
  "norm_topk_prob": false, "output_router_logits": false, "router_aux_loss_coef": 0.001})";

TEST_CASE("Published configurations of Qwen's mixtures are read to the last number",
          "[io][pretrained]") {
  CHECK(test::config_of<Qwen3Config>(kQwen3) == presets::qwen3_30b_a3b());
  CHECK(test::lost_settings<Qwen3Config>(kQwen3).empty());
  CHECK(test::config_of<Qwen2MoeConfig>(kQwen2) == presets::qwen1_5_moe_a2_7b());
  CHECK(test::lost_settings<Qwen2MoeConfig>(kQwen2).empty());
}

TEST_CASE("Qwen's configurations say which layers are dense", "[io][pretrained]") {
  nlohmann::json json = nlohmann::json::parse(kQwen3);
  json["decoder_sparse_step"] = 2;
  json["mlp_only_layers"] = {0, 1, 2};
  const Qwen3Config config = test::config_of<Qwen3Config>(json.dump());
  CHECK(config.shape.interleave == Interleave{.stride = 2, .first_dense = 3});
  CHECK(config.shape.dense_hidden == 6144);
  CHECK(!config.shape.is_sparse(1));
  CHECK(config.shape.is_sparse(3));
  json.erase("norm_topk_prob");
  json["num_local_experts"] = json["num_experts"];
  json.erase("num_experts");
  CHECK(!test::config_of<Qwen3Config>(json.dump()).renormalise);
  CHECK(test::config_of<Qwen3Config>(json.dump()).shape.experts == 128);
}

TEST_CASE("Settings of Qwen's mixtures that change the result are refused by name",
          "[io][pretrained]") {
  const auto fault = [](auto change) { return test::config_fault<Qwen3Config>(kQwen3, change); };
  CHECK(fault([](auto& json) { json["num_hidden_layers"] = std::int64_t{1} << 60; }) ==
        "'num_hidden_layers' is 1152921504606846976, expected at most 100000");
  CHECK(fault([](auto& json) { json["mlp_only_layers"] = {1}; }) ==
        "'mlp_only_layers' is [1], expected the first layers, such as [0, 1]");
  CHECK(fault([](auto& json) { json["decoder_sparse_step"] = 0; }) ==
        "'decoder_sparse_step' is 0, expected at least 1");
  CHECK(fault([](auto& json) { json["use_sliding_window"] = true; }) ==
        "'use_sliding_window' is true, expected false");
  CHECK(fault([](auto& json) { json["attention_gate"] = true; }) ==
        "'attention_gate' is true, expected it not to be there: weir does not know what it "
        "changes");
  CHECK(fault([](auto& json) { json.erase("num_experts"); }) == "has no 'num_local_experts'");
}

TEST_CASE("Qwen3-MoE comes back from its folder", "[io][pretrained]") {
  Qwen3Config config = presets::scaled(presets::qwen3_30b_a3b());
  test::check_family(config, "model.layers.1.mlp.experts.15.down_proj.weight");
  config.shape.interleave = {.stride = 2, .first_dense = 1};
  config.shape.dense_hidden = 24;
  const test::SavedModel saved(config);
  CHECK(saved.comes_back());
  CHECK(saved.comes_back_fused());
}

TEST_CASE("Qwen2-MoE comes back from its folder", "[io][pretrained]") {
  const Qwen2MoeConfig config = presets::scaled(presets::qwen1_5_moe_a2_7b());
  test::check_family(config, "model.layers.0.mlp.shared_expert_gate.weight");
  CHECK(test::SavedModel(config).comes_back_fused());
}

TEST_CASE("A layer of Qwen2-MoE is saved under its published names", "[io][pretrained]") {
  Qwen2MoeConfig config = presets::scaled(presets::qwen1_5_moe_a2_7b());
  config.shape.experts = 2;
  config.shape.k = 1;
  const test::SavedModel saved(config);
  CHECK(saved.tensors("model.layers.1.") ==
        std::vector<std::string>{"model.layers.1.input_layernorm.weight [32]",
                                 "model.layers.1.mlp.experts.0.down_proj.weight [32, 24]",
                                 "model.layers.1.mlp.experts.0.gate_proj.weight [24, 32]",
                                 "model.layers.1.mlp.experts.0.up_proj.weight [24, 32]",
                                 "model.layers.1.mlp.experts.1.down_proj.weight [32, 24]",
                                 "model.layers.1.mlp.experts.1.gate_proj.weight [24, 32]",
                                 "model.layers.1.mlp.experts.1.up_proj.weight [24, 32]",
                                 "model.layers.1.mlp.gate.weight [2, 32]",
                                 "model.layers.1.mlp.shared_expert.down_proj.weight [32, 96]",
                                 "model.layers.1.mlp.shared_expert.gate_proj.weight [96, 32]",
                                 "model.layers.1.mlp.shared_expert.up_proj.weight [96, 32]",
                                 "model.layers.1.mlp.shared_expert_gate.weight [1, 32]",
                                 "model.layers.1.post_attention_layernorm.weight [32]",
                                 "model.layers.1.self_attn.k_proj.bias [32]",
                                 "model.layers.1.self_attn.k_proj.weight [32, 32]",
                                 "model.layers.1.self_attn.o_proj.weight [32, 32]",
                                 "model.layers.1.self_attn.q_proj.bias [32]",
                                 "model.layers.1.self_attn.q_proj.weight [32, 32]",
                                 "model.layers.1.self_attn.v_proj.bias [32]",
                                 "model.layers.1.self_attn.v_proj.weight [32, 32]"});
}

}  // namespace
}  // namespace weir::families_qwen_moe_test
