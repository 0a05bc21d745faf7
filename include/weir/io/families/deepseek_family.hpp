// SPDX-License-Identifier: MIT
/// \file
/// What the configurations of DeepSeek's models, and of those that took over their names, have in
/// common.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <variant>

#include <weir/attention/latent.hpp>
#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/config_file.hpp>
#include <weir/io/families/layer_lists.hpp>
#include <weir/io/families/rope_config.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/presets/model_shape.hpp>

namespace weir::io {

/// Reads which layers are sparse, and the sizes of the networks.
/// \throws FileError  if a setting is missing or of another kind.
inline void read_deepseek_mixture(ConfigFile& json, presets::ModelShape& shape) {
  expect_few_layers(json, shape.layers);
  shape.interleave = {.stride = json.count("moe_layer_freq", 1),
                      .first_dense = json.count("first_k_dense_replace", 0)};
  if (shape.interleave.stride < 1) json.bad("moe_layer_freq", "at least 1");
  if (shape.interleave.stride > 1) shape.interleave.phase = 0;
  shape.experts = json.count("n_routed_experts");
  shape.k = json.count("num_experts_per_tok");
  shape.d_hidden = json.count("moe_intermediate_size");
  shape.shared_hidden = read_multiple(json, "n_shared_experts", 0, shape.d_hidden);
  if (shape.count_sparse(shape.layers) < shape.layers) {
    shape.dense_hidden = json.count("intermediate_size");
  }
  json.ignore("intermediate_size");  // Of dense layers alone.
}

/// The opposite of `read_deepseek_mixture`.
/// \throws ConfigError  unless the shared expert is as wide as several others.
inline void write_deepseek_mixture(const presets::ModelShape& shape, nlohmann::json& json) {
  if (shape.d_hidden == 0 || shape.shared_hidden % shape.d_hidden != 0) {
    throw_error<ConfigError>("save_pretrained: shared_hidden = ", shape.shared_hidden,
                             ", expected a multiple of d_hidden = ", shape.d_hidden);
  }
  json["moe_layer_freq"] = shape.interleave.stride;
  json["first_k_dense_replace"] = shape.interleave.first_dense;
  json["n_routed_experts"] = shape.experts;
  json["num_experts_per_tok"] = shape.k;
  json["moe_intermediate_size"] = shape.d_hidden;
  json["n_shared_experts"] = shape.shared_hidden / shape.d_hidden;
  json["intermediate_size"] = shape.dense_hidden > 0 ? shape.dense_hidden : shape.d_hidden;
}

/// Reads a decoder with latent attention, without its mixture.
/// \throws FileError  if a setting is missing, of another kind, or not known.
inline presets::ModelShape read_latent_shape(ConfigFile& json) {
  const RopeSettings rope = read_rope(json, 1e4, true);
  LatentConfig attention{.heads = json.count("num_attention_heads"),
                         .q_rank = json.count("q_lora_rank", 0),
                         .kv_rank = json.count("kv_lora_rank"),
                         .nope_dim = json.count("qk_nope_head_dim"),
                         .rope_dim = json.count("qk_rope_head_dim"),
                         .value_dim = json.count("v_head_dim"),
                         .rope_theta = rope.theta,
                         .rope_scaling = rope.scaling};
  for (const auto* const key : {"qk_nope_head_dim", "qk_rope_head_dim"}) {
    if (json.count(key) > 1'000'000) json.bad(key, "at most 1000000");
  }
  json.expect("num_key_value_heads", attention.heads);
  json.expect("qk_head_dim", attention.query_dim());
  json.expect("head_dim", attention.rope_dim);
  json.expect("rope_interleave", true);
  json.expect("attention_bias", false);
  json.expect("hidden_act", "silu");
  json.ignore("pretraining_tp");
  return {.layers = json.count("num_hidden_layers"),
          .d_model = json.count("hidden_size"),
          .vocab = json.count("vocab_size"),
          .tied = json.flag("tie_word_embeddings", false),
          .attention = attention};
}

/// The opposite of `read_latent_shape`.
/// \throws ConfigError  if the attention is another one.
inline void write_latent_shape(const presets::ModelShape& shape, nlohmann::json& json) {
  const auto* const attention = std::get_if<LatentConfig>(&shape.attention);
  if (attention == nullptr) {
    throw_error<ConfigError>(
        "save_pretrained: attention is a GroupedQueryConfig, expected a LatentConfig in this "
        "family");
  }
  json["num_hidden_layers"] = shape.layers;
  json["hidden_size"] = shape.d_model;
  json["vocab_size"] = shape.vocab;
  json["tie_word_embeddings"] = shape.tied;
  json["num_attention_heads"] = attention->heads;
  json["num_key_value_heads"] = attention->heads;
  json["q_lora_rank"] =
      attention->q_rank > 0 ? nlohmann::json(attention->q_rank) : nlohmann::json();
  json["kv_lora_rank"] = attention->kv_rank;
  json["qk_nope_head_dim"] = attention->nope_dim;
  json["qk_rope_head_dim"] = attention->rope_dim;
  json["v_head_dim"] = attention->value_dim;
  json["attention_bias"] = false;
  json["hidden_act"] = "silu";
  write_rope({.theta = attention->rope_theta, .scaling = attention->rope_scaling}, true, json);
}

/// Reads the groups of experts.
/// \param summed   How many scores of a group are summed where there are groups.
inline GroupLimit read_groups(ConfigFile& json, Index summed) {
  return {
      .count = json.count("n_group", 1), .allowed = json.count("topk_group", 1), .summed = summed};
}

}  // namespace weir::io
