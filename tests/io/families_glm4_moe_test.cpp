// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdint>

#include <weir/io/families/glm4_moe.hpp>
#include <weir/presets/glm_4_5.hpp>
#include <weir/presets/scaled.hpp>

#include "io/families.hpp"

namespace weir::families_glm4_moe_test {
namespace {

using presets::Glm4MoeConfig;

// zai-org/GLM-4.5-Air
constexpr auto kAir = R"({
  "architectures": ["Glm4MoeForCausalLM"], "attention_bias": true, "attention_dropout": 0.0,
  "eos_token_id": [151329, 151336, 151338], "first_k_dense_replace": 1, "head_dim": 128,
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 10944, "max_position_embeddings": 131072, "model_type": "glm4_moe",
  "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
  "norm_topk_prob": true, "num_attention_heads": 96, "num_experts_per_tok": 8,
  "num_hidden_layers": 46, "num_key_value_heads": 8, "num_nextn_predict_layers": 1,
  "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05,
  "rope_scaling": null, "rope_theta": 1000000, "routed_scaling_factor": 1.0,
  "tie_word_embeddings": false, "topk_group": 1, "torch_dtype": "bfloat16",
  "transformers_version": "4.54.0", "use_cache": true, "use_qk_norm": false,
  "vocab_size": 151552})";

TEST_CASE("GLM-4.5's published configurations are read to the last number", "[io][pretrained]") {
  CHECK(test::config_of<Glm4MoeConfig>(kAir) == presets::glm_4_5_air());
  CHECK(test::lost_settings<Glm4MoeConfig>(kAir).empty());
  nlohmann::json json = nlohmann::json::parse(kAir);  // Where GLM-4.5 differs.
  json.update({{"first_k_dense_replace", 3},
               {"hidden_size", 5120},
               {"intermediate_size", 12288},
               {"moe_intermediate_size", 1536},
               {"n_routed_experts", 160},
               {"num_hidden_layers", 92},
               {"routed_scaling_factor", 2.5},
               {"use_qk_norm", true}});
  CHECK(test::config_of<Glm4MoeConfig>(json.dump()) == presets::glm_4_5());
  // Newer versions of the library keep what belongs to positions together.
  json.erase("partial_rotary_factor");
  json.erase("rope_theta");
  json["rope_parameters"] = {
      {"partial_rotary_factor", 0.5}, {"rope_theta", 1e6}, {"rope_type", "default"}};
  CHECK(test::config_of<Glm4MoeConfig>(json.dump()) == presets::glm_4_5());
  json["rope_parameters"].erase("partial_rotary_factor");
  CHECK(test::config_of<Glm4MoeConfig>(json.dump()) == presets::glm_4_5());
}

TEST_CASE("Settings of GLM-4.5 that change the result are refused by name", "[io][pretrained]") {
  const auto fault = [](auto change) { return test::config_fault<Glm4MoeConfig>(kAir, change); };
  CHECK(fault([](auto& json) { json["scoring_func"] = "softmax"; }) ==
        "'scoring_func' is \"softmax\", expected \"sigmoid\"");
  CHECK(fault([](auto& json) { json["partial_rotary_factor"] = 1e300; }) ==
        "'partial_rotary_factor' is 1e+300, expected a number from 0 to 1, without 0");
  CHECK(fault([](auto& json) { json["num_hidden_layers"] = std::int64_t{1} << 40; }) ==
        "'num_hidden_layers' is 1099511627776, expected at most 100000");
  CHECK(fault([](auto& json) { json["n_shared_experts"] = std::int64_t{1} << 60; }) ==
        "'n_shared_experts' is 1152921504606846976, expected a number of parts that exist");
  CHECK(fault([](auto& json) { json["index_topk"] = 8; }) ==
        "'index_topk' is 8, expected it not to be there: weir does not know what it changes");
}

TEST_CASE("GLM-4.5 comes back from its folder", "[io][pretrained]") {
  Glm4MoeConfig config = presets::scaled(presets::glm_4_5(), {.d_model = 64});
  config.shape.prediction_modules = 0;
  test::check_family(config, "model.layers.1.mlp.gate.e_score_correction_bias");
  CHECK(test::SavedModel(config).comes_back_fused());
}

TEST_CASE("A layer of GLM-4.5 is saved under its published names", "[io][pretrained]") {
  Glm4MoeConfig config = presets::scaled(presets::glm_4_5());
  config.shape.prediction_modules = 0;
  config.shape.experts = 2;
  config.shape.k = 1;
  CHECK(test::SavedModel(config).tensors("model.layers.1.") ==
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
                                 "model.layers.1.self_attn.k_norm.weight [4]",
                                 "model.layers.1.self_attn.k_proj.bias [8]",
                                 "model.layers.1.self_attn.k_proj.weight [8, 32]",
                                 "model.layers.1.self_attn.o_proj.weight [32, 96]",
                                 "model.layers.1.self_attn.q_norm.weight [4]",
                                 "model.layers.1.self_attn.q_proj.bias [96]",
                                 "model.layers.1.self_attn.q_proj.weight [96, 32]",
                                 "model.layers.1.self_attn.v_proj.bias [8]",
                                 "model.layers.1.self_attn.v_proj.weight [8, 32]"});
}

TEST_CASE("GLM-4.5's module of prediction comes back", "[io][pretrained]") {
  const Glm4MoeConfig config = presets::scaled(presets::glm_4_5_air());
  const test::Folder folder;
  Decoder<float> model = test::random_model(config);
  Rng rng(5);
  MultiToken<float> prediction = presets::make_prediction<float>(config, rng);
  io::save_pretrained(folder.path(), model, config, {}, &prediction);
  auto loaded = io::load_family<Glm4MoeConfig>(folder.path());
  REQUIRE(loaded.prediction.has_value());
  const auto ours = io::tensors_of("test", prediction);
  const auto theirs = io::tensors_of("test", *loaded.prediction);
  REQUIRE(ours.size() == theirs.size());
  CHECK(std::equal(ours.begin(), ours.end(), theirs.begin(), [](const auto& a, const auto& b) {
    return a.first == b.first && *a.second == *b.second;
  }));
}

}  // namespace
}  // namespace weir::families_glm4_moe_test
