// SPDX-License-Identifier: MIT
/// \file
/// OLMoE's checkpoints.
#pragma once

#include <array>
#include <nlohmann/json.hpp>
#include <string_view>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/io/config_file.hpp>
#include <weir/io/families/family.hpp>
#include <weir/io/families/grouped_query_family.hpp>
#include <weir/io/families/layer_lists.hpp>
#include <weir/io/tensor_source.hpp>
#include <weir/presets/olmoe_1b_7b.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

template <>
struct Family<presets::OlmoeConfig> {
  static constexpr std::array<std::string_view, 1> kModelTypes = {"olmoe"};
  static constexpr std::string_view kArchitecture = "OlmoeForCausalLM";

  static presets::OlmoeConfig read(ConfigFile& json) {
    presets::OlmoeConfig config{.shape = read_grouped_query_shape(json, {.output_bias = true}),
                                .norm_epsilon = json.number("rms_norm_eps", 1e-5),
                                .renormalise = json.flag("norm_topk_prob", false),
                                .balance = json.number("router_aux_loss_coef", 0.01)};
    presets::ModelShape& shape = config.shape;
    shape.experts = read_experts(json);
    shape.k = json.count("num_experts_per_tok");
    shape.d_hidden = json.count("intermediate_size");
    auto& attention = std::get<GroupedQueryConfig>(shape.attention);
    attention.qk_norm = QkNorm::kFull;
    attention.qk_norm_epsilon = config.norm_epsilon;
    attention.clip_qkv = json.number("clip_qkv", 0.0);
    return config;
  }

  /// The coefficient of the z-loss has no place in config.json.
  static void write(const presets::OlmoeConfig& config, nlohmann::json& json) {
    write_grouped_query_shape(config.shape, json);
    json["num_experts"] = config.shape.experts;
    json["num_experts_per_tok"] = config.shape.k;
    json["intermediate_size"] = config.shape.d_hidden;
    const double clip = grouped_query_of(config.shape).clip_qkv;
    json["clip_qkv"] = clip > 0.0 ? nlohmann::json(clip) : nlohmann::json();
    json["rms_norm_eps"] = config.norm_epsilon;
    json["norm_topk_prob"] = config.renormalise;
    json["router_aux_loss_coef"] = config.balance;
  }

  static std::vector<presets::TensorName> names(const presets::OlmoeConfig& config,
                                                const TensorSource* source) {
    return presets::join_names({presets::kHuggingFaceNames, moe_names(source, config.shape)});
  }
};

}  // namespace weir::io
