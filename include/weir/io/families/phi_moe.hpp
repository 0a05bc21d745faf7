// SPDX-License-Identifier: MIT
/// \file
/// Checkpoints of Phi-3.5-MoE.
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
#include <weir/io/tensor_source.hpp>
#include <weir/presets/mixtral.hpp>
#include <weir/presets/phi_3_5_moe.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

template <>
struct Family<presets::PhiMoeConfig> {
  static constexpr std::array<std::string_view, 1> kModelTypes = {"phimoe"};
  static constexpr std::string_view kArchitecture = "PhiMoEForCausalLM";

  /// The noise of the router's input in training (`input_jitter_noise`) is left out, like dropout.
  static presets::PhiMoeConfig read(ConfigFile& json) {
    presets::PhiMoeConfig config{
        .shape = read_grouped_query_shape(json, {.rope_theta = 1e6, .output_bias = true}),
        .norm_epsilon = json.number("rms_norm_eps", 1e-5),
        .router_epsilon = json.number("router_jitter_noise", 0.01),
        .balance = json.number("router_aux_loss_coef", 0.001)};
    presets::ModelShape& shape = config.shape;
    std::get<GroupedQueryConfig>(shape.attention).window = json.count("sliding_window", 0);
    shape.norm_bias = true;
    shape.head_bias = json.flag("lm_head_bias", false);
    shape.experts = json.count("num_local_experts", 16);
    shape.k = json.count("num_experts_per_tok", 2);
    shape.d_hidden = json.count("intermediate_size");
    json.ignore("input_jitter_noise");
    json.ignore("original_max_position_embeddings");  // Once more; that of rope_scaling counts.
    return config;
  }

  static void write(const presets::PhiMoeConfig& config, nlohmann::json& json) {
    write_grouped_query_shape(config.shape, json);
    const Index window = grouped_query_of(config.shape).window;
    json["sliding_window"] = window > 0 ? nlohmann::json(window) : nlohmann::json();
    json["lm_head_bias"] = config.shape.head_bias;
    json["num_local_experts"] = config.shape.experts;
    json["num_experts_per_tok"] = config.shape.k;
    json["intermediate_size"] = config.shape.d_hidden;
    json["rms_norm_eps"] = config.norm_epsilon;
    json["router_jitter_noise"] = config.router_epsilon;
    json["router_aux_loss_coef"] = config.balance;
  }

  static std::vector<presets::TensorName> names(const presets::PhiMoeConfig& /*config*/,
                                                const TensorSource* /*source*/) {
    return presets::join_names(
        {presets::kPhiMoeBiasNames, presets::kMixtralNames, presets::kHuggingFaceNames});
  }
};

}  // namespace weir::io
