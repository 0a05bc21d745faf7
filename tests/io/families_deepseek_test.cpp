// SPDX-License-Identifier: MIT
#include <filesystem>
#include <string>

#include <weir/io/families/deepseek.hpp>
#include <weir/presets/deepseek_v2_lite.hpp>
#include <weir/presets/scaled.hpp>

#include "io/families.hpp"
#include "io/files.hpp"

namespace weir::families_deepseek_test {
namespace {

using presets::DeepSeekMoEConfig;
using presets::DeepSeekV2Config;
using presets::DeepSeekV3Config;

// deepseek-ai/deepseek-moe-16b-base
constexpr auto kMoE = R"({
  "architectures": ["DeepseekForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"}, "bos_token_id": 100000,
  "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
  "initializer_range": 0.02, "intermediate_size": 10944, "max_position_embeddings": 4096,
  "model_type": "deepseek", "moe_intermediate_size": 1408, "moe_layer_freq": 1,
  "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": false,
  "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 28,
  "num_key_value_heads": 16, "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": null,
  "rope_theta": 10000, "scoring_func": "softmax", "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.36.0", "use_cache": true,
  "vocab_size": 102400})";

// deepseek-ai/DeepSeek-V2
constexpr auto kV2 = R"({
  "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001,
  "bos_token_id": 100000, "eos_token_id": 100001, "ep_size": 1, "first_k_dense_replace": 1,
  "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
  "intermediate_size": 12288, "kv_lora_rank": 512, "max_position_embeddings": 163840,
  "model_type": "deepseek_v2", "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 8,
  "n_routed_experts": 160, "n_shared_experts": 2, "norm_topk_prob": false,
  "num_attention_heads": 128, "num_experts_per_tok": 6, "num_hidden_layers": 60,
  "num_key_value_heads": 128, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707,
                   "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
                   "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 16.0, "scoring_func": "softmax", "seq_aux": true,
  "tie_word_embeddings": false, "topk_group": 3, "topk_method": "group_limited_greedy",
  "torch_dtype": "bfloat16", "transformers_version": "4.39.3", "use_cache": true,
  "v_head_dim": 128, "vocab_size": 102400})";

// deepseek-ai/DeepSeek-V3
constexpr auto kV3 = R"({
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0,
  "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
  "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
  "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
  "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
  "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128,
  "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
  "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64,
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                          "weight_block_size": [128, 128]},
  "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                   "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                   "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
  "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc",
  "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": true,
  "v_head_dim": 128, "vocab_size": 129280})";

TEST_CASE("Published configurations of DeepSeek's models are read to the last number",
          "[io][pretrained]") {
  CHECK(test::config_of<DeepSeekMoEConfig>(kMoE) == presets::deepseek_moe_16b());
  CHECK(test::lost_settings<DeepSeekMoEConfig>(kMoE).empty());
  CHECK(test::config_of<DeepSeekV3Config>(kV3) == presets::deepseek_v3());

  DeepSeekV2Config v2 = presets::deepseek_v2();  // The losses that the paper trained with.
  v2.balance = 0.001;
  v2.device_balance = v2.communication_balance = v2.protected_share = 0.0;
  CHECK(test::config_of<DeepSeekV2Config>(kV2) == v2);

  nlohmann::json json = nlohmann::json::parse(kV2);  // Where V2-Lite differs.
  json.update({{"hidden_size", 2048},
               {"intermediate_size", 10944},
               {"moe_intermediate_size", 1408},
               {"n_group", 1},
               {"n_routed_experts", 64},
               {"num_attention_heads", 16},
               {"num_hidden_layers", 27},
               {"num_key_value_heads", 16},
               {"q_lora_rank", nullptr},
               {"routed_scaling_factor", 1.0},
               {"topk_group", 1},
               {"topk_method", "greedy"}});
  CHECK(test::config_of<DeepSeekV2Config>(json.dump()) == presets::deepseek_v2_lite());

  json = nlohmann::json::parse(kV3);  // Where Kimi K2 differs.
  json.update({{"aux_loss_alpha", 0.0001},
               {"first_k_dense_replace", 1},
               {"model_type", "kimi_k2"},
               {"n_group", 1},
               {"n_routed_experts", 384},
               {"num_attention_heads", 64},
               {"num_key_value_heads", 64},
               {"num_nextn_predict_layers", 0},
               {"rope_theta", 50000.0},
               {"routed_scaling_factor", 2.827},
               {"topk_group", 1},
               {"vocab_size", 163840}});
  json["rope_scaling"].update({{"beta_fast", 1.0}, {"beta_slow", 1.0}, {"factor", 32.0}});
  CHECK(test::config_of<DeepSeekV3Config>(json.dump()) == presets::kimi_k2());
}

TEST_CASE("Settings of DeepSeek's models that change the result are refused by name",
          "[io][pretrained]") {
  const auto v3 = [](auto change) { return test::config_fault<DeepSeekV3Config>(kV3, change); };
  CHECK(v3([](auto& json) { json["scoring_func"] = "softmax"; }) ==
        "'scoring_func' is \"softmax\", expected \"sigmoid\"");
  CHECK(v3([](auto& json) { json["topk_method"] = "greedy"; }) ==
        "'topk_method' is \"greedy\", expected \"noaux_tc\"");
  CHECK(v3([](auto& json) { json["attention_bias"] = true; }) ==
        "'attention_bias' is true, expected false");
  CHECK(v3([](auto& json) { json["rope_interleave"] = false; }) ==
        "'rope_interleave' is false, expected true");
  CHECK(v3([](auto& json) { json["num_key_value_heads"] = 8; }) ==
        "'num_key_value_heads' is 8, expected 128");
  CHECK(v3([](auto& json) { json["qk_nope_head_dim"] = 1'000'001; }) ==
        "'qk_nope_head_dim' is 1000001, expected at most 1000000");
  CHECK(v3([](auto& json) { json["index_topk"] = 2048; }) ==
        "'index_topk' is 2048, expected it not to be there: weir does not know what it changes");
  const auto v2 = [](auto change) { return test::config_fault<DeepSeekV2Config>(kV2, change); };
  CHECK(v2([](auto& json) { json["topk_method"] = "noaux_tc"; }) ==
        "'topk_method' is \"noaux_tc\", expected greedy or group_limited_greedy");
  CHECK(v2([](auto& json) { json["norm_topk_prob"] = true; }) ==
        "'norm_topk_prob' is true, expected false");
}

TEST_CASE("DeepSeekMoE comes back from its folder", "[io][pretrained]") {
  DeepSeekMoEConfig config = presets::scaled(presets::deepseek_moe_16b());
  test::check_family(config, "model.layers.1.mlp.shared_experts.down_proj.weight");
  config.renormalise = true;
  config.shape.layers = 4;
  config.shape.interleave = {.stride = 2, .first_dense = 1, .phase = 0};
  CHECK(test::SavedModel(config).comes_back());
}

TEST_CASE("DeepSeek-V2 comes back from its folder", "[io][pretrained]") {
  test::check_family(presets::scaled(presets::deepseek_v2()),
                     "model.layers.1.self_attn.kv_b_proj.weight");
  CHECK(test::SavedModel(presets::scaled(presets::deepseek_v2_lite())).comes_back_fused());
}

TEST_CASE("A layer of DeepSeek-V3 is saved under its published names", "[io][pretrained]") {
  DeepSeekV3Config config = presets::scaled(presets::deepseek_v3());
  config.shape.experts = 2;
  config.shape.k = 1;
  config.groups = {.summed = 2};
  const test::SavedModel saved(config);
  CHECK(saved.tensors("model.layers.1.") ==
        std::vector<std::string>{"model.layers.1.input_layernorm.weight [32]",
                                 "model.layers.1.mlp.experts.0.down_proj.weight [32, 8]",
                                 "model.layers.1.mlp.experts.0.gate_proj.weight [8, 32]",
                                 "model.layers.1.mlp.experts.0.up_proj.weight [8, 32]",
                                 "model.layers.1.mlp.experts.1.down_proj.weight [32, 8]",
                                 "model.layers.1.mlp.experts.1.gate_proj.weight [8, 32]",
                                 "model.layers.1.mlp.experts.1.up_proj.weight [8, 32]",
                                 "model.layers.1.mlp.gate.e_score_correction_bias [2]",
                                 "model.layers.1.mlp.gate.weight [2, 32]",
                                 "model.layers.1.mlp.shared_experts.down_proj.weight [32, 8]",
                                 "model.layers.1.mlp.shared_experts.gate_proj.weight [8, 32]",
                                 "model.layers.1.mlp.shared_experts.up_proj.weight [8, 32]",
                                 "model.layers.1.post_attention_layernorm.weight [32]",
                                 "model.layers.1.self_attn.kv_a_layernorm.weight [8]",
                                 "model.layers.1.self_attn.kv_a_proj_with_mqa.weight [12, 32]",
                                 "model.layers.1.self_attn.kv_b_proj.weight [32, 8]",
                                 "model.layers.1.self_attn.o_proj.weight [32, 16]",
                                 "model.layers.1.self_attn.q_a_layernorm.weight [12]",
                                 "model.layers.1.self_attn.q_a_proj.weight [12, 32]",
                                 "model.layers.1.self_attn.q_b_proj.weight [24, 12]"});
}

TEST_CASE("DeepSeek-V3 comes back from its folder", "[io][pretrained]") {
  DeepSeekV3Config config = presets::scaled(presets::deepseek_v3());
  config.shape.prediction_modules = 0;
  test::check_family(config, "model.layers.1.mlp.gate.e_score_correction_bias");
  CHECK(test::SavedModel(config).comes_back_fused());
}

TEST_CASE("Modules of multi-token prediction come back as the layers that would follow",
          "[io][pretrained]") {
  const DeepSeekV3Config config = presets::scaled(presets::deepseek_v3());
  const test::Folder folder;
  Decoder<float> model = test::random_model(config);
  Rng rng(5);
  MultiToken<float> prediction = presets::make_prediction<float>(config, rng);
  for (auto& [name, buffer] : buffers(prediction)) buffer->value.setConstant(0.25F);
  io::save_pretrained(folder.path(), model, config, {}, &prediction);

  const std::vector<std::string> tensors = test::tensors_in(folder.path(), "model.layers.2.");
  for (const std::string name :
       {"enorm.weight [32]", "hnorm.weight [32]", "eh_proj.weight [32, 64]",
        "shared_head.norm.weight [32]", "self_attn.q_a_proj.weight [12, 32]",
        "mlp.gate.e_score_correction_bias [16]", "mlp.experts.15.up_proj.weight [8, 32]"}) {
    INFO(name);
    CHECK(std::find(tensors.begin(), tensors.end(), "model.layers.2." + name) != tensors.end());
  }
  // What the files of the published model have beside them: copies of embedding and head.
  test::change_tensors(folder.path(), [](test::Tensors& all) {
    all["model.layers.2.embed_tokens.weight"] = all.at("model.embed_tokens.weight");
    all["model.layers.2.shared_head.head.weight"] = all.at("lm_head.weight");
  });
  auto loaded = io::load_family<DeepSeekV3Config>(folder.path());
  REQUIRE(loaded.prediction.has_value());
  CHECK(infer(loaded.model, test::kIds) == infer(model, test::kIds));
  const auto ours = io::tensors_of("test", prediction);
  const auto theirs = io::tensors_of("test", *loaded.prediction);
  REQUIRE(ours.size() == theirs.size());
  for (std::size_t i = 0; i < ours.size(); ++i) {
    INFO(ours[i].first);
    CHECK(ours[i].first == theirs[i].first);
    CHECK(*ours[i].second == *theirs[i].second);
  }
}

TEST_CASE("Weights of DeepSeek-V3 in 8 bits are multiplied by their factors", "[io][pretrained]") {
  DeepSeekV3Config config = presets::scaled(presets::deepseek_v3());
  config.shape.prediction_modules = 0;
  test::SavedModel saved(config);
  const std::string name = "model.layers.1.self_attn.o_proj.weight";  // [32, 16]
  const std::filesystem::path& folder = saved.folder.path();
  nlohmann::json places;
  test::change_tensors(folder, [&](test::Tensors& all) {
    all.erase(name);
    for (const auto& [other, tensor] : all) places[other] = "plain.safetensors";
  });
  std::filesystem::rename(folder / "model.safetensors", folder / "plain.safetensors");
  // E4M3: 0x38 is 1, 0xC0 is -2.
  std::string bytes(32 * 16, '\x38');
  bytes[17] = '\xC0';
  const std::string header =
      R"({")" + name + R"(":{"dtype":"F8_E4M3","shape":[32,16],"data_offsets":[0,512]},")" + name +
      R"(_scale_inv":{"dtype":"F32","shape":[1,1],"data_offsets":[512,516]}})";
  test::write_text(folder / "eight.safetensors",
                   test::file_of(header, bytes + test::bytes_of<float>({0.0625F})));
  places[name] = places[name + "_scale_inv"] = "eight.safetensors";
  test::write_text(folder / "model.safetensors.index.json",
                   nlohmann::json{{"weight_map", places}}.dump());
  for (auto& [own, parameter] : parameters(saved.model)) {
    if (own != "layers.1.attention.output") continue;
    parameter->value.setConstant(0.0625F);
    parameter->value(1, 1) = -0.125F;
  }
  CHECK(saved.comes_back());
}

}  // namespace
}  // namespace weir::families_deepseek_test
