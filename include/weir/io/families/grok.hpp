// SPDX-License-Identifier: MIT
/// \file
/// Grok-1 as hpcai-tech/grok-1 has ported it to PyTorch.
#pragma once

#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string_view>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/config_file.hpp>
#include <weir/io/families/family.hpp>
#include <weir/io/families/grouped_query_family.hpp>
#include <weir/io/tensor_source.hpp>
#include <weir/presets/grok_1.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

template <>
struct Family<presets::GrokConfig> {
  static constexpr std::array<std::string_view, 1> kModelTypes = {"grok-1"};
  static constexpr std::string_view kArchitecture = "Grok1ModelForCausalLM";

  static presets::GrokConfig read(ConfigFile& json) {
    presets::GrokConfig config{
        .shape = {},
        .norm_epsilon = json.number("rms_norm_eps", 1e-5),
        .embedding_multiplier = json.number("embedding_multiplier_scale", 1.0),
        .logit_multiplier = json.number("output_multiplier_scale", 1.0)};
    presets::ModelShape& shape = config.shape;
    shape.layers = json.count("num_hidden_layers");
    shape.d_model = json.count("hidden_size");
    shape.vocab = json.count("vocab_size");
    shape.tied = json.flag("tie_word_embeddings", true);
    const Index heads = json.count("num_attention_heads");
    if (heads < 1) json.bad("num_attention_heads", "at least 1");
    GroupedQueryConfig attention{.heads = heads,
                                 .kv_heads = json.count("num_key_value_heads", heads),
                                 .head_dim = shape.d_model / heads,
                                 .softcap = json.number("max_attn_value", 1.0)};
    const double usual = attention.shape().scale;
    const double scale = json.number("attn_output_multiplier", 1.0);
    if (std::abs(scale - usual) > 1e-15 * usual) attention.scale = scale;
    shape.attention = attention;
    shape.post_norms = true;
    shape.experts = json.count("num_experts", 8);
    shape.k = json.count("num_experts_per_tok", 2);
    shape.d_hidden = json.count("intermediate_size");
    const double balance = json.number("router_aux_loss_coef", 0.001);
    if (json.flag("output_router_logits", false)) config.balance = balance;
    return config;
  }

  static void write(const presets::GrokConfig& config, nlohmann::json& json) {
    if (config.renormalise) {
      throw_error<ConfigError>(
          "save_pretrained: renormalise = true, expected false in this family");
    }
    const presets::ModelShape shape = presets::settled(config.shape);
    const GroupedQueryConfig& attention = grouped_query_of(shape);
    json["num_hidden_layers"] = shape.layers;
    json["hidden_size"] = shape.d_model;
    json["vocab_size"] = shape.vocab;
    json["tie_word_embeddings"] = shape.tied;
    json["num_attention_heads"] = attention.heads;
    json["num_key_value_heads"] = attention.kv_heads;
    json["max_attn_value"] = attention.softcap;
    json["attn_output_multiplier"] = attention.scale;
    json["embedding_multiplier_scale"] = config.embedding_multiplier;
    json["output_multiplier_scale"] = config.logit_multiplier;
    json["num_experts"] = shape.experts;
    json["num_experts_per_tok"] = shape.k;
    json["intermediate_size"] = shape.d_hidden;
    json["rms_norm_eps"] = config.norm_epsilon;
    json["router_aux_loss_coef"] = config.balance;
    json["output_router_logits"] = config.balance != 0.0;
  }

  static std::vector<presets::TensorName> names(const presets::GrokConfig& /*config*/,
                                                const TensorSource* /*source*/) {
    return presets::join_names({presets::kGrokNames});
  }
};

}  // namespace weir::io
