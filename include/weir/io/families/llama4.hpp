// SPDX-License-Identifier: MIT
/// \file
/// Checkpoints of Llama 4's text model, alone or within those that also see.
#pragma once

#include <array>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/types.hpp>
#include <weir/io/config_file.hpp>
#include <weir/io/families/family.hpp>
#include <weir/io/families/grouped_query_family.hpp>
#include <weir/io/families/layer_lists.hpp>
#include <weir/io/tensor_source.hpp>
#include <weir/ops/rope.hpp>
#include <weir/presets/llama_4_scout.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

template <>
struct Family<presets::Llama4Config> {
  static constexpr std::array<std::string_view, 2> kModelTypes = {"llama4_text", "llama4"};
  static constexpr std::string_view kArchitecture = "Llama4ForCausalLM";

  /// The model of images and what ties it to the text model. They have no part in text.
  static constexpr std::array<std::string_view, 2> kIgnored = {"vision_model.*",
                                                               "multi_modal_projector.*"};

  static presets::Llama4Config read(ConfigFile& json) {
    if (json.text("model_type") == "llama4_text") return read_text(json);
    json.ignore("vision_config", "boi_token_index", "eoi_token_index", "image_token_index",
                "boi_token_id", "eoi_token_id", "image_token_id");  // Of images.
    json.expect("tie_word_embeddings", false);
    ConfigFile text = json.object("text_config");
    presets::Llama4Config config = read_text(text);
    text.finish();
    return config;
  }

  /// Writes the text model.
  static void write(const presets::Llama4Config& config, nlohmann::json& json);

  static std::vector<presets::TensorName> names(const presets::Llama4Config& /*config*/,
                                                const TensorSource* source) {
    std::vector<presets::TensorName> names =
        presets::join_names({presets::kLlama4Names, presets::kHuggingFaceNames});
    const bool within =
        source != nullptr && source->find("language_model.model.embed_tokens.weight") != nullptr;
    if (!within) return names;
    static const std::vector<std::string> longer = [&] {
      std::vector<std::string> all;
      all.reserve(names.size());
      for (const presets::TensorName& name : names) {
        all.push_back((name.theirs.empty() ? "" : "language_model.") + std::string(name.theirs));
      }
      return all;
    }();
    for (std::size_t i = 0; i < names.size(); ++i) names[i].theirs = longer[i];
    return names;
  }

 private:
  static presets::Llama4Config read_text(ConfigFile& json);

  /// The attention of the layers without rotation.
  static GroupedQueryConfig read_full(ConfigFile& json, const GroupedQueryConfig& local);

  /// 1 for each layer with rotation, 0 for the others.
  static std::vector<int> rotated_layers(const presets::ModelShape& shape) {
    std::vector<int> rotated;
    for (Index l = 0; l < shape.layers; ++l) rotated.push_back(shape.others.is_sparse(l) ? 0 : 1);
    return rotated;
  }

  static std::vector<Index> sparse_layers(const presets::ModelShape& shape) {
    std::vector<Index> sparse;
    for (Index l = 0; l < shape.layers; ++l) {
      if (shape.is_sparse(l)) sparse.push_back(l);
    }
    return sparse;
  }
};

inline GroupedQueryConfig Family<presets::Llama4Config>::read_full(
    ConfigFile& json, const GroupedQueryConfig& local) {
  GroupedQueryConfig full{.heads = local.heads,
                          .kv_heads = local.kv_heads,
                          .head_dim = local.head_dim,
                          .qkv_bias = local.qkv_bias,
                          .output_bias = local.output_bias,
                          .rope = false};
  constexpr auto kTuning = "attn_temperature_tuning";  // A flag, in older files a number.
  const bool tuned =
      !json.has(kTuning) ||
      (json.at(kTuning).is_number() ? json.count(kTuning) != 0 : json.flag(kTuning, true));
  const double scale = json.number("attn_scale", 0.1);
  const Index floor = json.count("floor_scale", 8192);
  if (tuned) {
    full.temperature_scale = scale;
    full.temperature_floor = floor;
  }
  return full;
}

inline presets::Llama4Config Family<presets::Llama4Config>::read_text(ConfigFile& json) {
  presets::Llama4Config config{
      .shape = read_grouped_query_shape(json, {.rope_theta = 5e5, .output_bias = true}),
      .norm_epsilon = json.number("rms_norm_eps", 1e-5)};
  presets::ModelShape& shape = config.shape;
  expect_few_layers(json, shape.layers);
  auto& local = std::get<GroupedQueryConfig>(shape.attention);
  if (!json.has("head_dim")) local.head_dim = 128;
  shape.others = {.stride = json.count("no_rope_layer_interval", 4)};
  if (shape.others.stride < 1) json.bad("no_rope_layer_interval", "at least 1");
  shape.other_attention = read_full(json, local);
  local.rope_layout = RopeLayout::kInterleaved;
  local.chunk =
      json.count("attention_chunk_size", json.mentions("attention_chunk_size") ? 0 : 8192);
  if (json.flag("use_qk_norm", true)) {
    local.qk_norm = QkNorm::kL2;
    local.qk_norm_epsilon = config.norm_epsilon;
  }
  constexpr auto kRotated = "no_rope_layers";
  if (json.has(kRotated) && !json.at(kRotated).empty()) {
    json.expect(kRotated, rotated_layers(shape));
  }
  expect_layer_types(json, shape);

  shape.interleave = {.stride = json.count("interleave_moe_layer_step", 1)};
  if (shape.interleave.stride < 1) json.bad("interleave_moe_layer_step", "at least 1");
  shape.experts = json.count("num_local_experts", 16);
  shape.k = json.count("num_experts_per_tok", 1);
  shape.d_hidden = shape.shared_hidden = json.count("intermediate_size");
  if (shape.count_sparse(shape.layers) < shape.layers) {
    shape.dense_hidden = json.count("intermediate_size_mlp", 16384);
  }
  json.ignore("intermediate_size_mlp");  // Of dense layers alone.
  json.expect("moe_layers", sparse_layers(shape));
  json.expect("router_jitter_noise", 0.0);
  json.expect("for_llm_compressor", false);
  // Without router logits there is no loss, see Llama4Config.
  const double balance = json.number("router_aux_loss_coef", 0.001);
  if (json.flag("output_router_logits", false)) config.balance = balance;
  return config;
}

inline void Family<presets::Llama4Config>::write(const presets::Llama4Config& config,
                                                 nlohmann::json& json) {
  const presets::ModelShape& shape = config.shape;
  write_grouped_query_shape(shape, json);
  const GroupedQueryConfig& local = grouped_query_of(shape);
  json["attention_chunk_size"] = local.chunk > 0 ? nlohmann::json(local.chunk) : nlohmann::json();
  json["use_qk_norm"] = local.qk_norm == QkNorm::kL2;
  json["no_rope_layer_interval"] = shape.others.stride;
  json["no_rope_layers"] = rotated_layers(shape);
  json["layer_types"] = layer_types(shape);
  const auto* const full =
      shape.other_attention ? std::get_if<GroupedQueryConfig>(&*shape.other_attention) : nullptr;
  if (full != nullptr) {
    json["attn_temperature_tuning"] = full->temperature_scale > 0.0;
    json["attn_scale"] = full->temperature_scale;
    json["floor_scale"] = full->temperature_floor;
  }
  json["interleave_moe_layer_step"] = shape.interleave.stride;
  json["moe_layers"] = sparse_layers(shape);
  json["num_local_experts"] = shape.experts;
  json["num_experts_per_tok"] = shape.k;
  json["intermediate_size"] = shape.d_hidden;
  json["intermediate_size_mlp"] = shape.dense_hidden > 0 ? shape.dense_hidden : shape.d_hidden;
  json["rms_norm_eps"] = config.norm_epsilon;
  json["router_aux_loss_coef"] = config.balance;
  json["output_router_logits"] = config.balance != 0.0;
}

}  // namespace weir::io
