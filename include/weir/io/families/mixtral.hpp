// SPDX-License-Identifier: MIT
/// \file
/// Mixtral's checkpoints.
#pragma once

#include <array>
#include <nlohmann/json.hpp>
#include <string_view>
#include <variant>
#include <vector>

#include <weir/io/config_file.hpp>
#include <weir/io/families/family.hpp>
#include <weir/io/families/grouped_query_family.hpp>
#include <weir/io/families/layer_lists.hpp>
#include <weir/io/tensor_source.hpp>
#include <weir/presets/mixtral.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

template <>
struct Family<presets::MixtralConfig> {
  static constexpr std::array<std::string_view, 1> kModelTypes = {"mixtral"};
  static constexpr std::string_view kArchitecture = "MixtralForCausalLM";

  static presets::MixtralConfig read(ConfigFile& json) {
    presets::MixtralConfig config{.shape = read_grouped_query_shape(json, {.rope_theta = 1e6}),
                                  .norm_epsilon = json.number("rms_norm_eps", 1e-5),
                                  .balance = json.number("router_aux_loss_coef", 0.001)};
    config.shape.experts = json.count("num_local_experts");
    config.shape.k = json.count("num_experts_per_tok");
    config.shape.d_hidden = json.count("intermediate_size");
    std::get<GroupedQueryConfig>(config.shape.attention).window = json.count("sliding_window", 0);
    json.expect("router_jitter_noise", 0.0);
    return config;
  }

  static void write(const presets::MixtralConfig& config, nlohmann::json& json) {
    write_grouped_query_shape(config.shape, json);
    const Index window = grouped_query_of(config.shape).window;
    json["sliding_window"] = window > 0 ? nlohmann::json(window) : nlohmann::json();
    json["rms_norm_eps"] = config.norm_epsilon;
    json["router_aux_loss_coef"] = config.balance;
    json["num_local_experts"] = config.shape.experts;
    json["num_experts_per_tok"] = config.shape.k;
    json["intermediate_size"] = config.shape.d_hidden;
  }

  /// Newer checkpoints hold all experts in one tensor; writing is in the older layout, which all
  /// versions of Hugging Face's code read.
  static std::vector<presets::TensorName> names(const presets::MixtralConfig& config,
                                                const TensorSource* source) {
    using presets::kHuggingFaceNames;
    if (has_fused_experts(source, config.shape)) {
      return presets::join_names({kHuggingFaceNames, presets::kFusedHuggingFaceMoeNames});
    }
    return presets::join_names({kHuggingFaceNames, presets::kMixtralNames});
  }
};

}  // namespace weir::io
