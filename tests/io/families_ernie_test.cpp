// SPDX-License-Identifier: MIT
#include <weir/io/families/ernie.hpp>
#include <weir/presets/ernie_4_5.hpp>
#include <weir/presets/scaled.hpp>

#include "io/families.hpp"

namespace weir::families_ernie_test {
namespace {

using presets::ErnieMoeConfig;

// baidu/ERNIE-4.5-21B-A3B-PT
constexpr auto kErnie = R"({
  "architectures": ["Ernie4_5_MoeForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 12288,
  "max_position_embeddings": 131072, "model_type": "ernie4_5_moe", "num_attention_heads": 20,
  "num_key_value_heads": 4, "num_hidden_layers": 28, "pad_token_id": 0, "rms_norm_eps": 1e-05,
  "use_cache": false, "vocab_size": 103424, "rope_theta": 500000, "use_bias": false,
  "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
  "moe_intermediate_size": 1536, "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_k": 6,
  "moe_layer_interval": 1, "moe_use_aux_free": true, "num_nextn_predict_layers": 1,
  "tie_word_embeddings": true, "torch_dtype": "bfloat16"})";

TEST_CASE("ERNIE 4.5's published configuration is read to the last number", "[io][pretrained]") {
  CHECK(test::config_of<ErnieMoeConfig>(kErnie) == presets::ernie_4_5_21b_a3b());
  CHECK(test::lost_settings<ErnieMoeConfig>(kErnie).empty());
  nlohmann::json json = nlohmann::json::parse(kErnie);  // The library's defaults.
  for (const auto* const key :
       {"moe_gate", "moe_intermediate_size", "moe_k", "moe_layer_interval", "moe_layer_start_index",
        "moe_num_experts", "moe_num_shared_experts", "moe_use_aux_free", "rms_norm_eps",
        "rope_theta", "tie_word_embeddings", "use_bias"}) {
    json.erase(key);
  }
  CHECK(test::config_of<ErnieMoeConfig>(json.dump()) == presets::ernie_4_5_21b_a3b());
  json["moe_layer_end_index"] = 27;
  CHECK(test::config_of<ErnieMoeConfig>(json.dump()) == presets::ernie_4_5_21b_a3b());
  json["moe_layer_end_index"] = -1;
  CHECK(test::config_of<ErnieMoeConfig>(json.dump()) == presets::ernie_4_5_21b_a3b());
}

TEST_CASE("Settings of ERNIE 4.5 that change the result are refused by name", "[io][pretrained]") {
  const auto fault = [](auto change) { return test::config_fault<ErnieMoeConfig>(kErnie, change); };
  CHECK(fault([](auto& json) { json["moe_layer_end_index"] = 20; }) ==
        "'moe_layer_end_index' is 20, expected 27");
  CHECK(fault([](auto& json) { json["use_bias"] = true; }) == "'use_bias' is true, expected false");
  CHECK(fault([](auto& json) { json["moe_norm_min"] = 0.1; }) ==
        "'moe_norm_min' is 0.1, expected 1e-12");
  CHECK(fault([](auto& json) { json["moe_gate_act"] = "sigmoid"; }) ==
        "'moe_gate_act' is \"sigmoid\", expected it not to be there: weir does not know what it "
        "changes");
}

TEST_CASE("ERNIE 4.5 comes back from its folder", "[io][pretrained]") {
  const ErnieMoeConfig config = presets::scaled(presets::ernie_4_5_21b_a3b());
  test::check_family(config, "model.layers.1.mlp.moe_statics.e_score_correction_bias");
  const test::SavedModel saved(config);
  CHECK(saved.comes_back_fused());
  // The published files have modules of prediction, which are not read.
  test::change_tensors(saved.folder.path(), [](test::Tensors& all) {
    all["model.mtp_block.0.input_layernorm.weight"] = {{1}, {1.0F}};
    all["model.mtp_emb_norm.0.weight"] = {{1}, {1.0F}};
  });
  CHECK(saved.comes_back());
}

TEST_CASE("A layer of ERNIE 4.5 is saved under its published names", "[io][pretrained]") {
  ErnieMoeConfig config = presets::scaled(presets::ernie_4_5_21b_a3b());
  config.shape.experts = 2;
  config.shape.k = 1;
  CHECK(test::SavedModel(config).tensors("model.layers.1.") ==
        std::vector<std::string>{"model.layers.1.input_layernorm.weight [32]",
                                 "model.layers.1.mlp.experts.0.down_proj.weight [32, 20]",
                                 "model.layers.1.mlp.experts.0.gate_proj.weight [20, 32]",
                                 "model.layers.1.mlp.experts.0.up_proj.weight [20, 32]",
                                 "model.layers.1.mlp.experts.1.down_proj.weight [32, 20]",
                                 "model.layers.1.mlp.experts.1.gate_proj.weight [20, 32]",
                                 "model.layers.1.mlp.experts.1.up_proj.weight [20, 32]",
                                 "model.layers.1.mlp.gate.weight [2, 32]",
                                 "model.layers.1.mlp.moe_statics.e_score_correction_bias [1, 2]",
                                 "model.layers.1.mlp.shared_experts.down_proj.weight [32, 40]",
                                 "model.layers.1.mlp.shared_experts.gate_proj.weight [40, 32]",
                                 "model.layers.1.mlp.shared_experts.up_proj.weight [40, 32]",
                                 "model.layers.1.post_attention_layernorm.weight [32]",
                                 "model.layers.1.self_attn.k_proj.weight [8, 32]",
                                 "model.layers.1.self_attn.o_proj.weight [32, 40]",
                                 "model.layers.1.self_attn.q_proj.weight [40, 32]",
                                 "model.layers.1.self_attn.v_proj.weight [8, 32]"});
}

}  // namespace
}  // namespace weir::families_ernie_test
