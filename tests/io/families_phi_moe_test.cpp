// SPDX-License-Identifier: MIT
#include <variant>
#include <vector>

#include <weir/io/families/phi_moe.hpp>
#include <weir/presets/phi_3_5_moe.hpp>
#include <weir/presets/scaled.hpp>

#include "io/families.hpp"

namespace weir::families_phi_moe_test {
namespace {

using presets::PhiMoeConfig;

// microsoft/Phi-3.5-MoE-instruct, without its 64 factors for each length.
constexpr auto kPhi = R"({
  "architectures": ["PhiMoEForCausalLM"], "attention_bias": true, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_phimoe.PhiMoEConfig"}, "bos_token_id": 1,
  "eos_token_id": 32000, "hidden_act": "silu", "hidden_dropout": 0.0, "hidden_size": 4096,
  "initializer_range": 0.02, "input_jitter_noise": 0.01, "intermediate_size": 6400,
  "lm_head_bias": true, "max_position_embeddings": 131072, "model_type": "phimoe",
  "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
  "num_key_value_heads": 8, "num_local_experts": 16, "original_max_position_embeddings": 4096,
  "output_router_logits": false, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
  "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01, "sliding_window": 131072,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.43.3",
  "use_cache": true, "vocab_size": 32064})";

TEST_CASE("Phi-3.5-MoE's published configuration is read to the last number", "[io][pretrained]") {
  CHECK(test::config_of<PhiMoeConfig>(kPhi) == presets::phi_3_5_moe());
  CHECK(test::lost_settings<PhiMoeConfig>(kPhi).empty());
  nlohmann::json json = nlohmann::json::parse(kPhi);
  const std::vector<double> near(64, 1.25);
  const std::vector<double> far(64, 2.5);
  json["rope_scaling"] = {{"long_factor", far},
                          {"long_mscale", 1.243163121016122},
                          {"original_max_position_embeddings", 4096},
                          {"short_factor", near},
                          {"short_mscale", 1.25},
                          {"type", "longrope"}};
  PhiMoeConfig expected = presets::phi_3_5_moe();
  std::get<GroupedQueryConfig>(expected.shape.attention).rope_scaling =
      LongRopeScaling{.short_factors = near,
                      .long_factors = far,
                      .short_mscale = 1.25,
                      .long_mscale = 1.243163121016122,
                      .length = 131072};
  CHECK(test::config_of<PhiMoeConfig>(json.dump()) == expected);
}

TEST_CASE("Settings of Phi-3.5-MoE that change the result are refused by name",
          "[io][pretrained]") {
  const auto fault = [](auto change) { return test::config_fault<PhiMoeConfig>(kPhi, change); };
  CHECK(fault([](auto& json) { json["mlp_bias"] = true; }) ==
        "'mlp_bias' is true, expected it not to be there: weir does not know what it changes");
  CHECK(fault([](auto& json) {
          json["rope_scaling"] = {{"type", "su"}};
        }) ==
        "rope_scaling: 'type' is \"su\", expected default, linear, dynamic, llama3, yarn or "
        "longrope");
  CHECK(fault([](auto& json) {
          json["rope_scaling"] = {{"type", "longrope"}, {"short_factor", {1.0, "x"}}};
        }) == "rope_scaling: 'short_factor' is [1.0,\"x\"], expected a list of numbers");
  CHECK(fault([](auto& json) {
          json["rope_scaling"] = {{"type", "longrope"}, {"short_factor", {1.0}}};
        }) == "rope_scaling: has no 'long_factor'");
}

TEST_CASE("How long texts are decides on the frequencies of Phi-3.5-MoE", "[io][pretrained]") {
  PhiMoeConfig config = presets::scaled(presets::phi_3_5_moe());
  auto& scaling = std::get<GroupedQueryConfig>(config.shape.attention).rope_scaling;
  scaling = LongRopeScaling{.short_factors = {1.0, 2.0},
                            .long_factors = {3.0, 4.0},
                            .short_mscale = 1.5,
                            .long_mscale = 2.0,
                            .original_context = 5,
                            .length = 8};
  Rng rng(3);
  Decoder<float> model = presets::make<float>(config, rng);
  const test::Folder folder;
  io::save_pretrained(folder.path(), model, config);
  const std::vector<Index> ids = {3, 1, 4, 1, 5};
  const auto logits = [&](Index longest) {
    const auto loaded = io::load_family<PhiMoeConfig>(folder.path(), {.longest_text = longest});
    return infer(loaded.model, ids);
  };
  const Matrix<float> far = infer(model, ids);
  std::get<LongRopeScaling>(scaling).length = 5;
  Rng again(3);
  const Matrix<float> near = infer(presets::make<float>(config, again), ids);
  CHECK(near != far);
  CHECK((logits(0) == far));
  CHECK((logits(6) == far));
  CHECK((logits(5) == near));
  CHECK_THROWS_WITH(logits(-1), "LoadConfig: longest_text = -1, expected >= 0");
}

TEST_CASE("Phi-3.5-MoE comes back from its folder", "[io][pretrained]") {
  PhiMoeConfig config = presets::scaled(presets::phi_3_5_moe());
  auto& attention = std::get<GroupedQueryConfig>(config.shape.attention);
  attention.rope_scaling = LongRopeScaling{.short_factors = {1.0, 2.0},
                                           .long_factors = {3.0, 4.0},
                                           .short_mscale = 1.5,
                                           .long_mscale = 2.0,
                                           .original_context = 4,
                                           .length = 8};
  test::check_family(config, "lm_head.bias");
  config.shape.head_bias = false;
  attention.window = 0;
  CHECK(test::SavedModel(config).comes_back());
}

TEST_CASE("A layer of Phi-3.5-MoE is saved under its published names", "[io][pretrained]") {
  PhiMoeConfig config = presets::scaled(presets::phi_3_5_moe());
  config.shape.experts = 2;
  const test::SavedModel saved(config);
  CHECK(saved.tensors("model.layers.1.") ==
        std::vector<std::string>{"model.layers.1.block_sparse_moe.experts.0.w1.weight [52, 32]",
                                 "model.layers.1.block_sparse_moe.experts.0.w2.weight [32, 52]",
                                 "model.layers.1.block_sparse_moe.experts.0.w3.weight [52, 32]",
                                 "model.layers.1.block_sparse_moe.experts.1.w1.weight [52, 32]",
                                 "model.layers.1.block_sparse_moe.experts.1.w2.weight [32, 52]",
                                 "model.layers.1.block_sparse_moe.experts.1.w3.weight [52, 32]",
                                 "model.layers.1.block_sparse_moe.gate.weight [2, 32]",
                                 "model.layers.1.input_layernorm.bias [32]",
                                 "model.layers.1.input_layernorm.weight [32]",
                                 "model.layers.1.post_attention_layernorm.bias [32]",
                                 "model.layers.1.post_attention_layernorm.weight [32]",
                                 "model.layers.1.self_attn.k_proj.bias [8]",
                                 "model.layers.1.self_attn.k_proj.weight [8, 32]",
                                 "model.layers.1.self_attn.o_proj.bias [32]",
                                 "model.layers.1.self_attn.o_proj.weight [32, 32]",
                                 "model.layers.1.self_attn.q_proj.bias [32]",
                                 "model.layers.1.self_attn.q_proj.weight [32, 32]",
                                 "model.layers.1.self_attn.v_proj.bias [8]",
                                 "model.layers.1.self_attn.v_proj.weight [8, 32]"});
  CHECK(saved.tensors("model.norm") ==
        std::vector<std::string>{"model.norm.bias [32]", "model.norm.weight [32]"});
  CHECK(saved.tensors("lm_head") ==
        std::vector<std::string>{"lm_head.bias [256]", "lm_head.weight [256, 32]"});
}

TEST_CASE("Phi-3.5-MoE has two experts for each token", "[presets]") {
  PhiMoeConfig config = presets::scaled(presets::phi_3_5_moe());
  config.shape.k = 3;
  CHECK(test::message_of<ConfigError>([&] { test::random_model(config); }) ==
        "PhiMoeConfig: k = 3, expected 2");
}

}  // namespace
}  // namespace weir::families_phi_moe_test
