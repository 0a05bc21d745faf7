// SPDX-License-Identifier: MIT
#include <weir/io/families/dbrx.hpp>
#include <weir/presets/dbrx.hpp>
#include <weir/presets/scaled.hpp>

#include "io/families.hpp"

namespace weir::families_dbrx_test {
namespace {

using presets::DbrxConfig;

// databricks/dbrx-base
constexpr auto kDbrx = R"({
  "architectures": ["DbrxForCausalLM"],
  "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
  "auto_map": {"AutoConfig": "configuration_dbrx.DbrxConfig",
               "AutoModelForCausalLM": "modeling_dbrx.DbrxForCausalLM"},
  "d_model": 6144, "emb_pdrop": 0.0,
  "ffn_config": {"ffn_hidden_size": 10752, "model_type": "", "moe_jitter_eps": 0.01,
                 "moe_loss_weight": 0.05, "moe_num_experts": 16, "moe_top_k": 4},
  "initializer_range": 0.02, "max_seq_len": 32768, "model_type": "dbrx", "n_heads": 48,
  "n_layers": 40, "output_router_logits": false, "resid_pdrop": 0.0, "router_aux_loss_coef": 0.05,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.38.2",
  "use_cache": true, "vocab_size": 100352})";

TEST_CASE("DBRX's published configuration is read to the last number", "[io][pretrained]") {
  CHECK(test::config_of<DbrxConfig>(kDbrx) == presets::dbrx());
}

TEST_CASE("Settings of DBRX that change the result are read or refused by name",
          "[io][pretrained]") {
  const auto norm_with = [](const nlohmann::json& value) {
    nlohmann::json json = nlohmann::json::parse(kDbrx);
    json["ffn_config"]["moe_normalize_expert_weights"] = value;
    return test::config_of<DbrxConfig>(json.dump()).weight_norm;
  };
  CHECK(norm_with(2) == 2.0);
  CHECK(norm_with(nullptr) == 0.0);
  const auto fault = [](auto change) { return test::config_fault<DbrxConfig>(kDbrx, change); };
  CHECK(fault([](auto& json) {
          json["ffn_config"]["ffn_act_fn"] = {{"name", "gelu"}};
        }) == "ffn_config: 'ffn_act_fn' is {\"name\":\"gelu\"}, expected {\"name\":\"silu\"}");
  CHECK(fault([](auto& json) { json["attn_config"]["attn_type"] = "x"; }) ==
        "attn_config: 'attn_type' is \"x\", expected it not to be there: weir does not know what "
        "it changes");
  CHECK(fault([](auto& json) { json["tie_word_embeddings"] = true; }) ==
        "'tie_word_embeddings' is true, expected false");
  CHECK(fault([](auto& json) { json["n_heads"] = 0; }) == "'n_heads' is 0, expected at least 1");
}

TEST_CASE("DBRX comes back from its folder", "[io][pretrained]") {
  DbrxConfig config = presets::scaled(presets::dbrx(), {.d_model = 48});
  test::check_family(config, "transformer.blocks.1.ffn.experts.mlp.w2");
  config.weight_norm = 0.0;
  CHECK(test::SavedModel(config).comes_back());
}

TEST_CASE("A layer of DBRX is saved under its published names", "[io][pretrained]") {
  const test::SavedModel saved(presets::scaled(presets::dbrx(), {.d_model = 48}));
  CHECK(saved.tensors("") ==
        std::vector<std::string>{
            "lm_head.weight [256, 48]", "transformer.blocks.0.ffn.experts.mlp.v1 [672, 48]",
            "transformer.blocks.0.ffn.experts.mlp.w1 [672, 48]",
            "transformer.blocks.0.ffn.experts.mlp.w2 [672, 48]",
            "transformer.blocks.0.ffn.router.layer.weight [8, 48]",
            "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight [64, 48]",
            "transformer.blocks.0.norm_attn_norm.attn.out_proj.weight [48, 48]",
            "transformer.blocks.0.norm_attn_norm.norm_1.weight [48]",
            "transformer.blocks.0.norm_attn_norm.norm_2.weight [48]",
            "transformer.blocks.1.ffn.experts.mlp.v1 [672, 48]",
            "transformer.blocks.1.ffn.experts.mlp.w1 [672, 48]",
            "transformer.blocks.1.ffn.experts.mlp.w2 [672, 48]",
            "transformer.blocks.1.ffn.router.layer.weight [8, 48]",
            "transformer.blocks.1.norm_attn_norm.attn.Wqkv.weight [64, 48]",
            "transformer.blocks.1.norm_attn_norm.attn.out_proj.weight [48, 48]",
            "transformer.blocks.1.norm_attn_norm.norm_1.weight [48]",
            "transformer.blocks.1.norm_attn_norm.norm_2.weight [48]",
            "transformer.norm_f.weight [48]", "transformer.wte.weight [256, 48]"});
}

}  // namespace
}  // namespace weir::families_dbrx_test
