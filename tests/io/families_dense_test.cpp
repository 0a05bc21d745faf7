// SPDX-License-Identifier: MIT
#include <variant>

#include <weir/io/families/dense.hpp>
#include <weir/presets/dense.hpp>
#include <weir/presets/scaled.hpp>

#include "io/families.hpp"

namespace weir::families_dense_test {
namespace {

using presets::DenseConfig;

// meta-llama/Llama-3.1-8B
constexpr auto kLlama = R"({
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096,
  "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072,
  "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
  "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.43.0.dev0", "use_cache": true, "vocab_size": 128256})";

// mistralai/Mistral-7B-v0.1
constexpr auto kMistral = R"({
  "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
  "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
  "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
  "sliding_window": 4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000})";

// Qwen/Qwen3-8B
constexpr auto kQwen = R"({
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
  "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288,
  "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
  "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
  "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
  "use_cache": true, "use_sliding_window": false, "vocab_size": 151936})";

TEST_CASE("Published configurations of dense models are read to the last number",
          "[io][pretrained]") {
  CHECK(test::config_of<DenseConfig>(kLlama) == presets::llama_3_1_8b());
  CHECK(test::lost_settings<DenseConfig>(kLlama).empty());
  CHECK(test::config_of<DenseConfig>(kMistral) == presets::mistral_7b());
  CHECK(test::lost_settings<DenseConfig>(kMistral).empty());
  CHECK(test::config_of<DenseConfig>(kQwen) == presets::qwen3_8b());
  CHECK(test::lost_settings<DenseConfig>(kQwen).empty());
}

TEST_CASE("What a dense configuration leaves out has the library's defaults", "[io][pretrained]") {
  const auto with = [](auto change) {
    nlohmann::json json = nlohmann::json::parse(kMistral);
    change(json);
    return test::config_of<DenseConfig>(json.dump());
  };
  const auto attention = [](const DenseConfig& config) {
    return std::get<GroupedQueryConfig>(config.shape.attention);
  };
  CHECK(attention(with([](auto& json) { json.erase("sliding_window"); })).window == 4096);
  CHECK(attention(with([](auto& json) { json["sliding_window"] = nullptr; })).window == 0);
  CHECK(attention(with([](auto& json) { json.erase("num_key_value_heads"); })).kv_heads == 32);
  CHECK(attention(with([](auto& json) { json.erase("rope_theta"); })).rope_theta == 1e4);
  CHECK(with([](auto& json) { json.erase("rms_norm_eps"); }).norm_epsilon == 1e-6);
  CHECK(attention(with([](auto& json) {
          json.erase("rope_theta");
          json["rope_parameters"] = {{"rope_theta", 2e4}, {"rope_type", "default"}};
        })).rope_theta == 2e4);
}

TEST_CASE("Settings of a dense configuration that change the result are refused by name",
          "[io][pretrained]") {
  const auto fault = [](std::string_view text, auto change) {
    return test::config_fault<DenseConfig>(text, change);
  };
  CHECK(fault(kLlama, [](auto& json) { json["mlp_bias"] = true; }) ==
        "'mlp_bias' is true, expected false");
  CHECK(fault(kLlama, [](auto& json) { json["hidden_act"] = "gelu"; }) ==
        "'hidden_act' is \"gelu\", expected \"silu\"");
  CHECK(fault(kLlama, [](auto& json) { json["partial_rotary_factor"] = 0.5; }) ==
        "'partial_rotary_factor' is 0.5, expected 1.0");
  CHECK(fault(kLlama, [](auto& json) { json["qk_layernorm"] = true; }) ==
        "'qk_layernorm' is true, expected it not to be there: weir does not know what it changes");
  CHECK(fault(kLlama, [](auto& json) { json["rope_scaling"]["beta"] = 1; }) ==
        "rope_scaling: 'beta' is 1, expected it not to be there: weir does not know what it "
        "changes");
  CHECK(fault(kLlama, [](auto& json) { json.erase("intermediate_size"); }) ==
        "has no 'intermediate_size'");
  CHECK(fault(kLlama, [](auto& json) { json["model_type"] = "gpt2"; }) ==
        "'model_type' is \"gpt2\", expected one of the family that was asked for");
  CHECK(fault(kMistral, [](auto& json) { json["attention_bias"] = true; }) ==
        "'attention_bias' is true, expected false in this family");
  CHECK(fault(kQwen, [](auto& json) { json["use_sliding_window"] = true; }) ==
        "'use_sliding_window' is true, expected false");
  CHECK(fault(kMistral,
              [](auto& json) {
                json["num_hidden_layers"] = 2;
                json["layer_types"] = {"sliding_attention", "full_attention"};
              }) ==
        "'layer_types' is [\"sliding_attention\",\"full_attention\"], expected "
        "[\"sliding_attention\",\"sliding_attention\"]");
}

TEST_CASE("Dense models come back from their folders", "[io][pretrained]") {
  const std::string query = "model.layers.1.self_attn.q_proj.weight";
  SECTION("Llama") {
    DenseConfig config = presets::scaled(presets::llama_3_1_8b());
    auto& attention = std::get<GroupedQueryConfig>(config.shape.attention);
    attention.qkv_bias = attention.output_bias = true;
    test::check_family(config, query);
  }
  SECTION("Mistral") {
    test::check_family(presets::scaled(presets::mistral_7b()), query);
  }
  SECTION("Qwen3") {
    DenseConfig config = presets::scaled(presets::qwen3_8b());
    config.shape.tied = true;
    test::check_family(config, query);
  }
}

TEST_CASE("A dense layer is saved under the names of Llama", "[io][pretrained]") {
  const test::SavedModel saved(presets::scaled(presets::qwen3_8b()));
  CHECK(saved.tensors("model.layers.1.") ==
        std::vector<std::string>{"model.layers.1.input_layernorm.weight [32]",
                                 "model.layers.1.mlp.down_proj.weight [32, 96]",
                                 "model.layers.1.mlp.gate_proj.weight [96, 32]",
                                 "model.layers.1.mlp.up_proj.weight [96, 32]",
                                 "model.layers.1.post_attention_layernorm.weight [32]",
                                 "model.layers.1.self_attn.k_norm.weight [4]",
                                 "model.layers.1.self_attn.k_proj.weight [8, 32]",
                                 "model.layers.1.self_attn.o_proj.weight [32, 32]",
                                 "model.layers.1.self_attn.q_norm.weight [4]",
                                 "model.layers.1.self_attn.q_proj.weight [32, 32]",
                                 "model.layers.1.self_attn.v_proj.weight [8, 32]"});
  CHECK(saved.tensors("").size() == 11 * 2 + 3);
}

TEST_CASE("A head that a tied model has beside its embedding is left alone", "[io][pretrained]") {
  DenseConfig config = presets::scaled(presets::qwen3_8b());
  config.shape.tied = true;
  const test::SavedModel saved(config);
  test::change_tensors(saved.folder.path(), [](test::Tensors& all) {
    CHECK(!all.contains("lm_head.weight"));
    all["lm_head.weight"] = all.at("model.embed_tokens.weight");
  });
  CHECK(saved.comes_back());
}

TEST_CASE("A model that the family's configurations cannot hold is not saved", "[io][pretrained]") {
  const test::Folder folder;
  DenseConfig config = presets::scaled(presets::llama_3_1_8b());
  Rng rng(1);
  std::get<GroupedQueryConfig>(config.shape.attention).softcap = 30.0;
  Decoder<float> model = presets::make<float>(config, rng);
  CHECK(test::message_of<ConfigError>([&] { io::save_pretrained(folder.path(), model, config); }) ==
        "save_pretrained: the model has sizes or options that config.json of llama cannot hold");
}

TEST_CASE("A dense preset has no experts", "[presets]") {
  DenseConfig config = presets::scaled(presets::llama_3_1_8b());
  config.shape.experts = 4;
  config.shape.k = 2;
  config.shape.d_hidden = 8;
  Rng rng(1);
  CHECK(test::message_of<ConfigError>([&] { presets::make<float>(config, rng); }) ==
        "DenseConfig: experts = 4, expected 0");
}

}  // namespace
}  // namespace weir::families_dense_test
