// SPDX-License-Identifier: MIT
#include <variant>

#include <weir/io/families/llama4.hpp>
#include <weir/presets/llama_4_scout.hpp>
#include <weir/presets/scaled.hpp>

#include "io/families.hpp"

namespace weir::families_llama4_test {
namespace {

using presets::Llama4Config;

// meta-llama/Llama-4-Scout-17B-16E, with the text model's settings alone.
constexpr auto kScout = R"({
  "architectures": ["Llama4ForConditionalGeneration"], "boi_token_index": 200080,
  "eoi_token_index": 200081, "image_token_index": 200092, "model_type": "llama4",
  "text_config": {
    "_attn_implementation_autoset": true, "attention_bias": false, "attention_chunk_size": 8192,
    "attention_dropout": 0.0, "bos_token_id": 200000, "eos_token_id": [200001, 200007, 200008],
    "for_llm_compressor": false, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
    "initializer_range": 0.02, "interleave_moe_layer_step": 1, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "max_position_embeddings": 262144,
    "model_type": "llama4_text", "no_rope_layers": [], "num_attention_heads": 40,
    "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8,
    "num_local_experts": 16, "output_router_logits": false, "pad_token_id": 200018,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
    "torch_dtype": "bfloat16", "use_cache": true, "use_qk_norm": true, "vocab_size": 202048},
  "torch_dtype": "bfloat16", "transformers_version": "4.51.0.dev0",
  "vision_config": {"hidden_size": 1408, "model_type": "llama4_vision_model"}})";

TEST_CASE("Llama 4 Scout's published configuration is read to the last number",
          "[io][pretrained]") {
  CHECK(test::config_of<Llama4Config>(kScout) == presets::llama_4_scout());
  CHECK(test::config_of<Llama4Config>(nlohmann::json::parse(kScout)["text_config"].dump()) ==
        presets::llama_4_scout());
}

TEST_CASE("Llama 4's configurations say what each layer is", "[io][pretrained]") {
  nlohmann::json json = nlohmann::json::parse(kScout)["text_config"];
  json.update(
      {{"interleave_moe_layer_step", 2},
       {"num_hidden_layers", 4},
       {"use_qk_norm", false},
       {"attn_temperature_tuning", 4},
       {"attn_scale", 0.2},
       {"floor_scale", 16},
       {"no_rope_layers", {1, 1, 1, 0}},
       {"moe_layers", {1, 3}},
       {"layer_types",
        {"chunked_attention", "chunked_attention", "chunked_attention", "full_attention"}}});
  const Llama4Config config = test::config_of<Llama4Config>(json.dump());
  CHECK(config.shape.interleave == Interleave{.stride = 2});
  CHECK(config.shape.dense_hidden == 16384);
  CHECK(std::get<GroupedQueryConfig>(config.shape.attention).qk_norm == QkNorm::kNone);
  const auto& full = std::get<GroupedQueryConfig>(*config.shape.other_attention);
  CHECK(full.temperature_scale == 0.2);
  CHECK(full.temperature_floor == 16);
  json["attn_temperature_tuning"] = false;
  const Llama4Config plain = test::config_of<Llama4Config>(json.dump());
  CHECK(std::get<GroupedQueryConfig>(*plain.shape.other_attention).temperature_scale == 0.0);
}

TEST_CASE("Settings of Llama 4 that change the result are refused by name", "[io][pretrained]") {
  const auto fault = [](auto change) {
    return test::config_fault<Llama4Config>(kScout, [&](nlohmann::json& json) {
      json["text_config"]["num_hidden_layers"] = 4;
      change(json["text_config"]);
    });
  };
  CHECK(fault([](auto& json) {
          json["no_rope_layers"] = {0, 1, 1, 1};
        }) == "text_config: 'no_rope_layers' is [0,1,1,1], expected [1,1,1,0]");
  CHECK(fault([](auto& json) {
          json["moe_layers"] = {0, 1};
        }) == "text_config: 'moe_layers' is [0,1], expected [0,1,2,3]");
  CHECK(fault([](auto& json) { json["router_jitter_noise"] = 0.1; }) ==
        "text_config: 'router_jitter_noise' is 0.1, expected 0.0");
  CHECK(fault([](auto& json) { json["sliding_window"] = 4; }) ==
        "text_config: 'sliding_window' is 4, expected it not to be there: weir does not know what "
        "it changes");
  CHECK(test::config_fault<Llama4Config>(kScout, [](auto& json) { json["audio_config"] = 1; }) ==
        "'audio_config' is 1, expected it not to be there: weir does not know what it changes");
}

TEST_CASE("Llama 4 comes back from its folder", "[io][pretrained]") {
  Llama4Config config = presets::scaled(presets::llama_4_scout());
  test::check_family(config, "model.layers.3.feed_forward.experts.gate_up_proj");
  config.shape.interleave = {.stride = 2};  // As in Maverick.
  config.shape.dense_hidden = 40;
  CHECK(test::SavedModel(config).comes_back());
}

TEST_CASE("A bias that Llama 4's files have no place for is not lost", "[io][pretrained]") {
  test::SavedModel saved(presets::scaled(presets::llama_4_scout()));
  for (auto& [name, buffer] : buffers(saved.model)) buffer->value(0, 1) = 0.5F;
  CHECK(test::message_of<ConfigError>(
            [&] { io::save_pretrained(saved.folder.path(), saved.model, saved.config); }) ==
        "save_pretrained: 'layers.0.moe.selector.bias' is not zero, and the family's files "
        "have no place for it");
}

TEST_CASE("A layer of Llama 4 is saved under its published names", "[io][pretrained]") {
  Llama4Config config = presets::scaled(presets::llama_4_scout());
  config.shape.interleave = {.stride = 2};
  config.shape.dense_hidden = 40;
  const test::SavedModel saved(config);
  CHECK(saved.tensors("model.layers.1.") ==
        std::vector<std::string>{
            "model.layers.1.feed_forward.experts.down_proj [4, 52, 32]",
            "model.layers.1.feed_forward.experts.gate_up_proj [4, 32, 104]",
            "model.layers.1.feed_forward.router.weight [4, 32]",
            "model.layers.1.feed_forward.shared_expert.down_proj.weight [32, 52]",
            "model.layers.1.feed_forward.shared_expert.gate_proj.weight [52, 32]",
            "model.layers.1.feed_forward.shared_expert.up_proj.weight [52, 32]",
            "model.layers.1.input_layernorm.weight [32]",
            "model.layers.1.post_attention_layernorm.weight [32]",
            "model.layers.1.self_attn.k_proj.weight [8, 32]",
            "model.layers.1.self_attn.o_proj.weight [32, 40]",
            "model.layers.1.self_attn.q_proj.weight [40, 32]",
            "model.layers.1.self_attn.v_proj.weight [8, 32]"});
  CHECK(saved.tensors("model.layers.0.feed_forward") ==
        std::vector<std::string>{"model.layers.0.feed_forward.down_proj.weight [32, 40]",
                                 "model.layers.0.feed_forward.gate_proj.weight [40, 32]",
                                 "model.layers.0.feed_forward.up_proj.weight [40, 32]"});
}

TEST_CASE("Llama 4 keeps the columns of gate left of those of up", "[io][pretrained]") {
  test::SavedModel saved(presets::scaled(presets::llama_4_scout()));
  const std::vector<float> both =
      saved.numbers("model.layers.1.feed_forward.experts.gate_up_proj");  // [4, 32, 104]
  const auto at = [&](Index e, Index in, Index column) {
    return both[static_cast<std::size_t>((e * 32 + in) * 104 + column)];
  };
  CHECK(at(3, 7, 5) == saved.value("layers.1.moe.experts.3.gate")(5, 7));
  CHECK(at(3, 7, 52 + 5) == saved.value("layers.1.moe.experts.3.up")(5, 7));
}

TEST_CASE("Llama 4's text model is found within one that also sees", "[io][pretrained]") {
  const test::SavedModel saved(presets::scaled(presets::llama_4_scout()));
  test::change_tensors(saved.folder.path(), [](test::Tensors& all) {
    test::Tensors longer;
    for (auto& [name, tensor] : all) longer["language_model." + name] = std::move(tensor);
    longer["vision_model.class_embedding"] = {{1}, {1.0F}};
    longer["multi_modal_projector.linear_1.weight"] = {{1}, {1.0F}};
    all = std::move(longer);
  });
  CHECK(saved.comes_back());
}

}  // namespace
}  // namespace weir::families_llama4_test
