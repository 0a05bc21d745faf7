// SPDX-License-Identifier: MIT
#include <cmath>
#include <string>
#include <variant>

#include <weir/io/families/gpt_oss.hpp>
#include <weir/io/mxfp4_tensor.hpp>
#include <weir/presets/gpt_oss_20b.hpp>
#include <weir/presets/scaled.hpp>

#include "io/families.hpp"
#include "io/files.hpp"

namespace weir::families_gpt_oss_test {
namespace {

using presets::GptOssConfig;

// openai/gpt-oss-20b, whose layer_types have 24 entries.
constexpr auto kGptOss = R"({
  "architectures": ["GptOssForCausalLM"], "attention_bias": true, "attention_dropout": 0.0,
  "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
  "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02,
  "intermediate_size": 2880,
  "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention",
                  "sliding_attention", "full_attention", "sliding_attention", "full_attention",
                  "sliding_attention", "full_attention", "sliding_attention", "full_attention",
                  "sliding_attention", "full_attention", "sliding_attention", "full_attention",
                  "sliding_attention", "full_attention", "sliding_attention", "full_attention",
                  "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
  "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
  "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
  "num_local_experts": 32, "output_router_logits": false, "pad_token_id": 199999,
  "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn",
                                                     "model.layers.*.mlp.router",
                                                     "model.embed_tokens", "lm_head"],
                          "quant_method": "mxfp4"},
  "rms_norm_eps": 1e-05,
  "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                   "original_max_position_embeddings": 4096, "rope_type": "yarn",
                   "truncate": false},
  "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
  "tie_word_embeddings": false, "transformers_version": "4.55.0.dev0", "use_cache": true,
  "vocab_size": 201088})";

TEST_CASE("gpt-oss-20b's published configuration is read to the last number", "[io][pretrained]") {
  CHECK(test::config_of<GptOssConfig>(kGptOss) == presets::gpt_oss_20b());
  CHECK(test::lost_settings<GptOssConfig>(kGptOss).empty());
  nlohmann::json json = nlohmann::json::parse(kGptOss);  // The library's defaults.
  for (const auto* const key : {"attention_bias", "head_dim", "layer_types", "rms_norm_eps",
                                "rope_scaling", "rope_theta", "sliding_window", "swiglu_limit"}) {
    json.erase(key);
  }
  CHECK(test::config_of<GptOssConfig>(json.dump()) == presets::gpt_oss_20b());
}

TEST_CASE("Settings of gpt-oss that change the result are refused by name", "[io][pretrained]") {
  const auto fault = [](auto change) { return test::config_fault<GptOssConfig>(kGptOss, change); };
  CHECK(fault([](auto& json) { json["swiglu_limit"] = 5.0; }) ==
        "'swiglu_limit' is 5.0, expected 7.0");
  CHECK(fault([](auto& json) { json["experts_per_token"] = 2; }) ==
        "'experts_per_token' is 2, expected 4");
  CHECK(fault([](auto& json) {
          json["num_hidden_layers"] = 2;
          json["layer_types"] = {"full_attention", "sliding_attention"};
        }) ==
        "'layer_types' is [\"full_attention\",\"sliding_attention\"], expected "
        "[\"sliding_attention\",\"full_attention\"]");
  CHECK(fault([](auto& json) { json["rope_scaling"]["mscale_all_dim"] = 1.0; }) ==
        "rope_scaling: 'mscale_all_dim' is 1.0, expected none in this family");
}

TEST_CASE("gpt-oss comes back from its folder", "[io][pretrained]") {
  test::check_family(presets::scaled(presets::gpt_oss_20b()), "model.layers.1.self_attn.sinks");
}

TEST_CASE("A layer of gpt-oss is saved under its published names", "[io][pretrained]") {
  const test::SavedModel saved(presets::scaled(presets::gpt_oss_20b()));
  CHECK(saved.tensors("model.layers.0.") ==
        std::vector<std::string>{
            "model.layers.0.input_layernorm.weight [32]",
            "model.layers.0.mlp.experts.down_proj [8, 32, 32]",
            "model.layers.0.mlp.experts.down_proj_bias [8, 32]",
            "model.layers.0.mlp.experts.gate_up_proj [8, 32, 64]",
            "model.layers.0.mlp.experts.gate_up_proj_bias [8, 64]",
            "model.layers.0.mlp.router.bias [8]", "model.layers.0.mlp.router.weight [8, 32]",
            "model.layers.0.post_attention_layernorm.weight [32]",
            "model.layers.0.self_attn.k_proj.bias [8]",
            "model.layers.0.self_attn.k_proj.weight [8, 32]",
            "model.layers.0.self_attn.o_proj.bias [32]",
            "model.layers.0.self_attn.o_proj.weight [32, 64]",
            "model.layers.0.self_attn.q_proj.bias [64]",
            "model.layers.0.self_attn.q_proj.weight [64, 32]",
            "model.layers.0.self_attn.sinks [16]", "model.layers.0.self_attn.v_proj.bias [8]",
            "model.layers.0.self_attn.v_proj.weight [8, 32]"});
}

TEST_CASE("gpt-oss keeps gate and up in turns", "[io][pretrained]") {
  test::SavedModel saved(presets::scaled(presets::gpt_oss_20b()));
  const io::CheckpointFolder folder(saved.folder.path());
  std::vector<float> both(8 * 32 * 64);
  folder.find("model.layers.0.mlp.experts.gate_up_proj")->read(0, 8 * 32 * 64, both.data());
  const auto at = [&](Index e, Index in, Index column) {
    return both[static_cast<std::size_t>((e * 32 + in) * 64 + column)];
  };
  for (const auto& [name, parameter] : parameters(saved.model)) {
    if (name == "layers.0.moe.experts.3.gate") CHECK(parameter->value(5, 7) == at(3, 7, 10));
    if (name == "layers.0.moe.experts.3.up") CHECK(parameter->value(5, 7) == at(3, 7, 11));
  }
}

// Experts in blocks of four-bit numbers; those of the model get the same values.
TEST_CASE("gpt-oss comes from blocks of four-bit numbers", "[io][pretrained]") {
  test::SavedModel saved(presets::scaled(presets::gpt_oss_20b()));
  const std::filesystem::path& folder = saved.folder.path();
  nlohmann::json places;
  test::change_tensors(folder, [&](test::Tensors& all) {
    for (Index l = 0; l < 2; ++l) {
      const std::string bank = "model.layers." + std::to_string(l) + ".mlp.experts.";
      all.erase(bank + "gate_up_proj");
      all.erase(bank + "down_proj");
    }
    for (const auto& [name, tensor] : all) places[name] = "plain.safetensors";
  });
  std::filesystem::rename(folder / "model.safetensors", folder / "plain.safetensors");

  const std::vector<float> values = {0.0F,  0.5F,  1.0F,  1.5F,  2.0F,  3.0F,  4.0F,  6.0F,
                                     -0.0F, -0.5F, -1.0F, -1.5F, -2.0F, -3.0F, -4.0F, -6.0F};
  Rng rng(3);
  std::string data;
  nlohmann::json header;
  const auto add = [&](const std::string& name, const std::string& bytes,
                       const std::vector<Index>& shape) {
    header[name] = {{"dtype", "U8"},
                    {"shape", shape},
                    {"data_offsets", {data.size(), data.size() + bytes.size()}}};
    places[name] = "blocks.safetensors";
    data += bytes;
  };
  for (Index l = 0; l < 2; ++l) {
    const auto blocks_of = [&](const std::string& published, Index rows,
                               const std::vector<std::string>& parts) {
      std::string blocks;
      std::string scales;
      for (Index e = 0; e < 8; ++e) {
        for (Index row = 0; row < rows; ++row) {
          const auto exponent = static_cast<int>(120 + rng.below(5));
          scales += static_cast<char>(exponent);
          Matrix<float> numbers(1, 32);
          for (Index j = 0; j < 16; ++j) {
            const Index first = rng.below(16);
            const Index second = rng.below(16);
            blocks += static_cast<char>(first + 16 * second);
            numbers(0, 2 * j) = std::ldexp(values[static_cast<std::size_t>(first)], exponent - 127);
            numbers(0, 2 * j + 1) =
                std::ldexp(values[static_cast<std::size_t>(second)], exponent - 127);
          }
          const auto count = static_cast<Index>(parts.size());
          const std::string name = "layers." + std::to_string(l) + ".moe.experts." +
                                   std::to_string(e) + "." +
                                   parts[static_cast<std::size_t>(row % count)];
          for (auto& [own, parameter] : parameters(saved.model)) {
            if (own == name) parameter->value.row(row / count) = numbers;
          }
        }
      }
      const std::string name = "model.layers." + std::to_string(l) + ".mlp.experts." + published;
      add(name + "_blocks", blocks, {8, rows, 1, 16});
      add(name + "_scales", scales, {8, rows, 1});
    };
    blocks_of("gate_up_proj", 64, {"gate", "up"});
    blocks_of("down_proj", 32, {"down"});
  }
  test::write_text(folder / "blocks.safetensors", test::file_of(header.dump(), data));
  test::write_text(folder / "model.safetensors.index.json",
                   nlohmann::json{{"weight_map", places}}.dump());
  CHECK(saved.comes_back());
}

TEST_CASE("Blocks of four-bit numbers are read from any place", "[io]") {
  const test::Folder folder;
  std::string blocks;
  for (int i = 0; i < 32; ++i) blocks += static_cast<char>(i * 7 + 16 * (i % 9));
  const std::string file =
      test::file_of(R"({"x_blocks":{"dtype":"U8","shape":[2,1,16],"data_offsets":[0,32]},)"
                    R"("x_scales":{"dtype":"U8","shape":[2,1],"data_offsets":[32,34]}})",
                    blocks + std::string({'\x7F', '\x80'}));
  test::write_text(folder.path() / "model.safetensors", file);
  const io::CheckpointFolder source(folder.path());
  CHECK(source.names() == std::vector<std::string>{"x_blocks"});
  const io::StoredTensor& tensor = *source.find("x_blocks");
  CHECK(tensor.shape() == std::vector<Index>{2, 32});
  std::vector<float> whole(64);
  tensor.read(0, 64, whole.data());
  CHECK(whole[0] == 0.0F);  // 0x00
  CHECK(whole[2] == 6.0F);  // 0x17: 7 and then 1.
  CHECK(whole[3] == 0.5F);
  CHECK(whole[32] == 0.0F);  // 112 + 16 * 7 = 0xE0, in a block twice as large: 0 and then -4 * 2.
  CHECK(whole[33] == -8.0F);
  for (Index begin = 0; begin < 64; ++begin) {
    for (const Index count : {Index{1}, (64 - begin) / 2, 64 - begin}) {
      std::vector<double> part(static_cast<std::size_t>(count));
      tensor.read(begin, count, part.data());
      for (Index i = 0; i < count; ++i) {
        CHECK(part[static_cast<std::size_t>(i)] ==
              static_cast<double>(whole[static_cast<std::size_t>(begin + i)]));
      }
    }
  }
}

TEST_CASE("Blocks of four-bit numbers that do not fit are refused", "[io]") {
  const auto fault = [](const std::string& header, std::size_t bytes) {
    const test::Folder folder;
    test::write_text(folder.path() / "model.safetensors",
                     test::file_of(header, std::string(bytes, '\0')));
    const std::string message =
        test::message_of<io::FileError>([&] { io::CheckpointFolder(folder.path()); });
    return message.substr(message.find(": ") + 2);
  };
  CHECK(fault(R"({"x_blocks":{"dtype":"U8","shape":[2,1,8],"data_offsets":[0,16]},)"
              R"("x_scales":{"dtype":"U8","shape":[2,1],"data_offsets":[16,18]}})",
              18) == "tensor 'x_blocks' is U8 [2, 1, 8], which its scales U8 [2, 1] do not fit");
  CHECK(fault(R"({"x_blocks":{"dtype":"I8","shape":[1,16],"data_offsets":[0,16]},)"
              R"("x_scales":{"dtype":"U8","shape":[1],"data_offsets":[16,17]}})",
              17) == "tensor 'x_blocks' is I8 [1, 16], which its scales U8 [1] do not fit");
}

}  // namespace
}  // namespace weir::families_gpt_oss_test
