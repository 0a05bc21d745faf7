// SPDX-License-Identifier: MIT
/// \file
/// DBRX's checkpoints.
#pragma once

#include <array>
#include <nlohmann/json.hpp>
#include <string_view>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/types.hpp>
#include <weir/io/config_file.hpp>
#include <weir/io/families/family.hpp>
#include <weir/io/families/grouped_query_family.hpp>
#include <weir/io/tensor_source.hpp>
#include <weir/presets/dbrx.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

template <>
struct Family<presets::DbrxConfig> {
  static constexpr std::array<std::string_view, 1> kModelTypes = {"dbrx"};
  static constexpr std::string_view kArchitecture = "DbrxForCausalLM";

  /// The epsilon of the norms is always 1e-5. The noise of the router in training
  /// (`moe_jitter_eps`) is left out, like dropout.
  static presets::DbrxConfig read(ConfigFile& json) {
    ConfigFile attention = json.object("attn_config");
    ConfigFile experts = json.object("ffn_config");
    const Index d_model = json.count("d_model");
    const Index heads = json.count("n_heads");
    if (heads < 1) json.bad("n_heads", "at least 1");
    presets::DbrxConfig config{
        .shape = {.layers = json.count("n_layers"),
                  .d_model = d_model,
                  .vocab = json.count("vocab_size"),
                  .attention = GroupedQueryConfig{.heads = heads,
                                                  .kv_heads = attention.count("kv_n_heads", 1),
                                                  .head_dim = d_model / heads,
                                                  .rope_theta = attention.number("rope_theta", 1e4),
                                                  .clip_qkv = attention.number("clip_qkv", 0.0)},
                  .experts = experts.count("moe_num_experts", 4),
                  .k = experts.count("moe_top_k", 1),
                  .d_hidden = experts.count("ffn_hidden_size", 3584)},
        .balance = experts.number("moe_loss_weight", 0.01)};
    constexpr auto kNorm = "moe_normalize_expert_weights";
    config.weight_norm = experts.mentions(kNorm) ? experts.number(kNorm, 0.0) : 1.0;
    experts.expect("ffn_act_fn", {{"name", "silu"}});
    experts.ignore("moe_jitter_eps");
    experts.expect("uniform_expert_assignment", false);
    attention.finish();
    experts.finish();
    json.expect("tie_word_embeddings", false);
    json.ignore("max_seq_len", "router_aux_loss_coef", "num_key_value_heads");  // Read by nobody.
    return config;
  }

  static void write(const presets::DbrxConfig& config, nlohmann::json& json) {
    const GroupedQueryConfig& attention = grouped_query_of(config.shape);
    json["n_layers"] = config.shape.layers;
    json["d_model"] = config.shape.d_model;
    json["vocab_size"] = config.shape.vocab;
    json["n_heads"] = attention.heads;
    nlohmann::json& attn = json["attn_config"];
    attn = {{"kv_n_heads", attention.kv_heads}, {"rope_theta", attention.rope_theta}};
    if (attention.clip_qkv > 0.0) attn["clip_qkv"] = attention.clip_qkv;
    nlohmann::json& ffn = json["ffn_config"];
    ffn = {{"ffn_act_fn", {{"name", "silu"}}},        {"ffn_hidden_size", config.shape.d_hidden},
           {"moe_num_experts", config.shape.experts}, {"moe_top_k", config.shape.k},
           {"moe_loss_weight", config.balance},       {"moe_normalize_expert_weights", nullptr}};
    if (config.weight_norm != 0.0) ffn["moe_normalize_expert_weights"] = config.weight_norm;
    json["tie_word_embeddings"] = false;
  }

  static std::vector<presets::TensorName> names(const presets::DbrxConfig& /*config*/,
                                                const TensorSource* /*source*/) {
    return presets::join_names({presets::kDbrxNames});
  }
};

}  // namespace weir::io
