// SPDX-License-Identifier: MIT
// Whole decoders that other people's code computed go through folders as Hugging Face publishes
// them, and have the logits that this code had.
#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/sequences.hpp>
#include <weir/io/families/dbrx.hpp>
#include <weir/io/families/deepseek.hpp>
#include <weir/io/families/mixtral.hpp>
#include <weir/io/pretrained.hpp>
#include <weir/io/safetensors.hpp>
#include <weir/io/safetensors_writer.hpp>

#include "io/folder.hpp"
#include "support/catch.hpp"

namespace weir::families_golden_test {
namespace {

/// A file of tests/golden, of whose decoder only the weights are used.
class Golden {
 public:
  explicit Golden(const std::string& name)
      : file_(io::Safetensors::read(std::string(WEIR_SOURCE_DIR "/tests/golden/") + name +
                                    ".safetensors")) {}

  /// A number of its metadata.
  nlohmann::json number(const std::string& key) const {
    return nlohmann::json::parse(file_.metadata().at("cfg." + key));
  }

  /// Writes its weights to a folder.
  /// \param name     Gives each of them its published name.
  template <class Name>
  void write(const std::filesystem::path& folder, const nlohmann::json& config, Name&& name) const {
    std::vector<std::pair<std::string, std::string>> names;  // Published and here.
    for (const auto& [own, tensor] : file_.tensors()) {
      if (own.starts_with("w.")) names.emplace_back(name(own.substr(2)), own);
    }
    std::vector<io::TensorShape> shapes;
    for (const auto& [published, own] : names) {
      shapes.push_back({published, file_.tensor(own).shape});
    }
    io::SafetensorsWriter writer(folder / "model.safetensors", shapes, io::Dtype::kF64, {});
    for (const auto& [published, own] : names) {
      const std::vector<double> values = file_.reals(own);
      writer.append(values.data(), static_cast<Index>(values.size()));
    }
    writer.commit();
    io::write_file(folder / "config.json", config.dump());
  }

  /// The largest difference of logits, relative to the largest logit.
  double difference(const Decoder<double>& model) const {
    const std::vector<std::int64_t> tokens = file_.integers("in.tokens");
    const std::vector<Index> ids(tokens.begin(), tokens.end());
    const std::vector<Index>& shape = file_.tensor("in.tokens").shape;
    const Sequences sequences = Sequences::uniform(shape[0], shape[1]);
    Decoder<double>::Cache cache;
    const Matrix<double>& logits = model.forward(ids, {.sequences = &sequences}, cache);
    const std::vector<double> expected = file_.reals("out.logits");
    REQUIRE(logits.size() == static_cast<Index>(expected.size()));
    const Eigen::Map<const Matrix<double>> truth(expected.data(), logits.rows(), logits.cols());
    return (logits - truth).cwiseAbs().maxCoeff() / truth.cwiseAbs().maxCoeff();
  }

 private:
  io::Safetensors file_;
};

/// Loads the folder and saves it again; both have the file's logits, and the same as each other.
template <class Config>
void check_both_ways(const Golden& golden, const std::filesystem::path& folder) {
  auto loaded = io::load_family<Config, double>(folder);
  CHECK(golden.difference(loaded.model) < 1e-13);
  const test::Folder again;
  io::save_pretrained(again.path(), loaded.model, std::get<Config>(loaded.config),
                      {.dtype = io::Dtype::kF64});
  const auto twice = io::load_family<Config, double>(again.path());
  const std::vector<Index> ids = {3, 1, 4, 1, 5};
  CHECK(infer(twice.model, ids) == infer(loaded.model, ids));
  CHECK(std::get<Config>(twice.config) == std::get<Config>(loaded.config));
}

TEST_CASE("Mixtral's golden decoder goes through a folder", "[io][pretrained][golden]") {
  const Golden golden("11_mixtral_decoder");
  const test::Folder folder;
  golden.write(folder.path(),
               {{"model_type", "mixtral"},
                {"hidden_size", golden.number("d_model")},
                {"intermediate_size", golden.number("d_ff")},
                {"num_attention_heads", golden.number("n_heads")},
                {"num_hidden_layers", golden.number("n_layers")},
                {"num_key_value_heads", golden.number("n_kv_heads")},
                {"num_local_experts", golden.number("n_experts")},
                {"num_experts_per_tok", golden.number("top_k")},
                {"rms_norm_eps", golden.number("rms_eps")},
                {"rope_theta", golden.number("rope_theta")},
                {"sliding_window", nullptr},
                {"vocab_size", golden.number("vocab")}},
               [](const std::string& name) { return name; });
  check_both_ways<presets::MixtralConfig>(golden, folder.path());
}

TEST_CASE("DBRX's golden decoder goes through a folder", "[io][pretrained][golden]") {
  const Golden golden("13_dbrx_decoder");
  const test::Folder folder;
  golden.write(folder.path(),
               {{"model_type", "dbrx"},
                {"d_model", golden.number("d_model")},
                {"n_heads", golden.number("n_heads")},
                {"n_layers", golden.number("n_layers")},
                {"vocab_size", golden.number("vocab")},
                {"attn_config",
                 {{"clip_qkv", golden.number("clip_qkv")},
                  {"kv_n_heads", golden.number("n_kv_heads")},
                  {"rope_theta", golden.number("rope_theta")}}},
                {"ffn_config",
                 {{"ffn_hidden_size", golden.number("d_ff")},
                  {"moe_num_experts", golden.number("n_experts")},
                  {"moe_top_k", golden.number("top_k")},
                  {"moe_normalize_expert_weights", 1.0}}}},
               [](const std::string& name) { return name; });
  check_both_ways<presets::DbrxConfig>(golden, folder.path());
}

/// Hugging Face's name for what DeepSeek's own code calls `name`.
std::string published_deepseek(std::string name) {
  if (name == "head.weight") return "lm_head.weight";
  const std::vector<std::pair<std::string, std::string>> parts = {
      {"embed.", "embed_tokens."},
      {"attn_norm.", "input_layernorm."},
      {"ffn_norm.", "post_attention_layernorm."},
      {"attn.", "self_attn."},
      {"ffn.", "mlp."},
      {"wq_a.", "q_a_proj."},
      {"self_attn.q_norm.", "self_attn.q_a_layernorm."},
      {"wq_b.", "q_b_proj."},
      {"wkv_a.", "kv_a_proj_with_mqa."},
      {"self_attn.kv_norm.", "self_attn.kv_a_layernorm."},
      {"wkv_b.", "kv_b_proj."},
      {"wo.", "o_proj."},
      {"gate.bias", "gate.e_score_correction_bias"},
      {"w1.", "gate_proj."},
      {"w2.", "down_proj."},
      {"w3.", "up_proj."},
  };
  for (const auto& [from, to] : parts) {
    const std::size_t at = name.find(from);
    if (at != std::string::npos) name.replace(at, from.size(), to);
  }
  return "model." + name;
}

TEST_CASE("DeepSeek-V3's golden decoder goes through a folder", "[io][pretrained][golden]") {
  const Golden golden("12_deepseek_v3_decoder");
  const test::Folder folder;
  golden.write(folder.path(),
               {{"model_type", "deepseek_v3"},
                {"first_k_dense_replace", golden.number("n_dense_layers")},
                {"hidden_size", golden.number("d_model")},
                {"intermediate_size", golden.number("dense_d_ff")},
                {"kv_lora_rank", golden.number("kv_lora_rank")},
                {"moe_intermediate_size", golden.number("moe_d_ff")},
                {"n_group", golden.number("n_group")},
                {"n_routed_experts", golden.number("n_experts")},
                {"n_shared_experts", golden.number("n_shared_experts")},
                {"num_attention_heads", golden.number("n_heads")},
                {"num_experts_per_tok", golden.number("top_k")},
                {"num_hidden_layers", golden.number("n_layers")},
                {"q_lora_rank", golden.number("q_lora_rank")},
                {"qk_nope_head_dim", golden.number("qk_nope_head_dim")},
                {"qk_rope_head_dim", golden.number("qk_rope_head_dim")},
                {"rms_norm_eps", golden.number("rms_eps")},
                {"rope_theta", golden.number("rope_theta")},
                {"routed_scaling_factor", golden.number("route_scale")},
                {"topk_group", golden.number("topk_group")},
                {"v_head_dim", golden.number("v_head_dim")},
                {"vocab_size", golden.number("vocab")}},
               published_deepseek);
  check_both_ways<presets::DeepSeekV3Config>(golden, folder.path());
}

}  // namespace
}  // namespace weir::families_golden_test
