// SPDX-License-Identifier: MIT
/// \file
/// What the configurations of families with grouped-query attention have in common.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <variant>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/config_file.hpp>
#include <weir/io/families/rope_config.hpp>
#include <weir/presets/model_shape.hpp>

namespace weir::io {

/// How a family's configurations differ from those of Llama.
struct GroupedQueryDefaults {
  double rope_theta = 1e4;  ///< Where config.json names none.
  bool tied = false;
  bool qkv_bias = false;               ///< Whether queries, keys and values always have a bias.
  bool output_bias = false;            ///< Whether `attention_bias` is one of the output too.
  std::optional<double> partial = {};  ///< See `read_rope`.
};

/// Reads the sizes, the attention and the positions of a decoder under the names that Hugging
/// Face's configurations since Llama's have for them. The mixture is left to the family.
/// \throws FileError  if a setting is missing, of another kind, or not known.
inline presets::ModelShape read_grouped_query_shape(ConfigFile& json,
                                                    const GroupedQueryDefaults& defaults = {}) {
  const RopeSettings rope = read_rope(json, defaults.rope_theta, false, defaults.partial);
  const Index d_model = json.count("hidden_size");
  GroupedQueryConfig attention{.heads = json.count("num_attention_heads"),
                               .rope_theta = rope.theta,
                               .rope_scaling = rope.scaling};
  if (attention.heads < 1) json.bad("num_attention_heads", "at least 1");
  attention.kv_heads = json.count("num_key_value_heads", attention.heads);
  attention.head_dim = json.count("head_dim", d_model / attention.heads);
  if (rope.partial != 1.0) {
    attention.rotary_dim =
        static_cast<Index>(static_cast<double>(attention.head_dim) * rope.partial);
  }
  const bool bias = json.flag("attention_bias", false);
  attention.qkv_bias = bias || defaults.qkv_bias;
  attention.output_bias = bias && defaults.output_bias;
  json.expect("hidden_act", "silu");
  json.ignore("pretraining_tp");
  return {.layers = json.count("num_hidden_layers"),
          .d_model = d_model,
          .vocab = json.count("vocab_size"),
          .tied = json.flag("tie_word_embeddings", defaults.tied),
          .attention = attention};
}

/// The grouped-query attention of `shape`.
/// \throws ConfigError  if it is another one.
inline const GroupedQueryConfig& grouped_query_of(const presets::ModelShape& shape) {
  const auto* const attention = std::get_if<GroupedQueryConfig>(&shape.attention);
  if (attention == nullptr) {
    throw_error<ConfigError>(
        "save_pretrained: attention is a LatentConfig, expected a "
        "GroupedQueryConfig in this family");
  }
  return *attention;
}

/// The opposite of `read_grouped_query_shape`.
inline void write_grouped_query_shape(const presets::ModelShape& shape, nlohmann::json& json) {
  const GroupedQueryConfig& attention = grouped_query_of(shape);
  json["num_hidden_layers"] = shape.layers;
  json["hidden_size"] = shape.d_model;
  json["vocab_size"] = shape.vocab;
  json["tie_word_embeddings"] = shape.tied;
  json["num_attention_heads"] = attention.heads;
  json["num_key_value_heads"] = attention.kv_heads;
  json["head_dim"] = attention.head_dim > 0 ? attention.head_dim : shape.d_model / attention.heads;
  json["attention_bias"] = attention.qkv_bias;
  json["hidden_act"] = "silu";
  const double share = attention.rotary_dim == 0 ? 1.0
                                                 : static_cast<double>(attention.rotary_dim) /
                                                       json.at("head_dim").get<double>();
  write_rope({.theta = attention.rope_theta, .scaling = attention.rope_scaling, .partial = share},
             false, json);
}

}  // namespace weir::io
