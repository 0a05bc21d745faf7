// SPDX-License-Identifier: MIT
/// \file
/// Checkpoints of Qwen2-MoE and Qwen3-MoE.
#pragma once

#include <array>
#include <nlohmann/json.hpp>
#include <span>
#include <string_view>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/io/config_file.hpp>
#include <weir/io/families/family.hpp>
#include <weir/io/families/grouped_query_family.hpp>
#include <weir/io/families/layer_lists.hpp>
#include <weir/io/tensor_source.hpp>
#include <weir/presets/qwen2_moe.hpp>
#include <weir/presets/qwen3_30b_a3b.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

namespace detail {

/// What both families' configurations say of layers and experts.
inline void read_qwen_mixture(ConfigFile& json, presets::ModelShape& shape) {
  expect_few_layers(json, shape.layers);
  shape.interleave = read_sparse_step(json);
  shape.experts = read_experts(json);
  shape.k = json.count("num_experts_per_tok");
  shape.d_hidden = json.count("moe_intermediate_size");
  if (shape.count_sparse(shape.layers) < shape.layers) {
    shape.dense_hidden = json.count("intermediate_size");
  }
  json.ignore("intermediate_size");  // Of dense layers alone.
  json.expect("router_jitter_noise", 0.0);
  expect_no_window(json);
  expect_layer_types(json, shape);
}

inline void write_qwen_mixture(const presets::ModelShape& shape, nlohmann::json& json) {
  write_sparse_step(shape.interleave, json);
  json["num_experts"] = shape.experts;
  json["num_experts_per_tok"] = shape.k;
  json["moe_intermediate_size"] = shape.d_hidden;
  json["intermediate_size"] = shape.dense_hidden > 0 ? shape.dense_hidden : shape.d_hidden;
}

}  // namespace detail

template <>
struct Family<presets::Qwen3Config> {
  static constexpr std::array<std::string_view, 1> kModelTypes = {"qwen3_moe"};
  static constexpr std::string_view kArchitecture = "Qwen3MoeForCausalLM";

  static presets::Qwen3Config read(ConfigFile& json) {
    presets::Qwen3Config config{.shape = read_grouped_query_shape(json, {.output_bias = true}),
                                .norm_epsilon = json.number("rms_norm_eps", 1e-6),
                                .renormalise = json.flag("norm_topk_prob", false),
                                .balance = json.number("router_aux_loss_coef", 0.001)};
    auto& attention = std::get<GroupedQueryConfig>(config.shape.attention);
    attention.qk_norm = QkNorm::kPerHead;
    attention.qk_norm_epsilon = config.norm_epsilon;
    detail::read_qwen_mixture(json, config.shape);
    return config;
  }

  static void write(const presets::Qwen3Config& config, nlohmann::json& json) {
    write_grouped_query_shape(config.shape, json);
    detail::write_qwen_mixture(config.shape, json);
    json["rms_norm_eps"] = config.norm_epsilon;
    json["norm_topk_prob"] = config.renormalise;
    json["router_aux_loss_coef"] = config.balance;
  }

  static std::vector<presets::TensorName> names(const presets::Qwen3Config& config,
                                                const TensorSource* source) {
    return presets::join_names({presets::kHuggingFaceNames, moe_names(source, config.shape)});
  }
};

template <>
struct Family<presets::Qwen2MoeConfig> {
  static constexpr std::array<std::string_view, 1> kModelTypes = {"qwen2_moe"};
  static constexpr std::string_view kArchitecture = "Qwen2MoeForCausalLM";

  static presets::Qwen2MoeConfig read(ConfigFile& json) {
    presets::Qwen2MoeConfig config{
        .shape = read_grouped_query_shape(json, {.qkv_bias = json.flag("qkv_bias", true)}),
        .norm_epsilon = json.number("rms_norm_eps", 1e-6),
        .renormalise = json.flag("norm_topk_prob", false),
        .balance = json.number("router_aux_loss_coef", 0.001)};
    detail::read_qwen_mixture(json, config.shape);
    config.shape.shared_hidden = json.count("shared_expert_intermediate_size");
    config.shape.shared_gate = true;
    return config;
  }

  static void write(const presets::Qwen2MoeConfig& config, nlohmann::json& json) {
    write_grouped_query_shape(config.shape, json);
    json.erase("attention_bias");  // The family has a name of its own for it.
    json["qkv_bias"] = grouped_query_of(config.shape).qkv_bias;
    detail::write_qwen_mixture(config.shape, json);
    json["shared_expert_intermediate_size"] = config.shape.shared_hidden;
    json["rms_norm_eps"] = config.norm_epsilon;
    json["norm_topk_prob"] = config.renormalise;
    json["router_aux_loss_coef"] = config.balance;
  }

  static std::vector<presets::TensorName> names(const presets::Qwen2MoeConfig& config,
                                                const TensorSource* source) {
    return presets::join_names({presets::kHuggingFaceNames, presets::kQwen2SharedExpertNames,
                                moe_names(source, config.shape)});
  }
};

}  // namespace weir::io
