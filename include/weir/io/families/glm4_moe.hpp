// SPDX-License-Identifier: MIT
/// \file
/// Checkpoints of GLM-4.5.
#pragma once

#include <array>
#include <nlohmann/json.hpp>
#include <string_view>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/error.hpp>
#include <weir/io/config_file.hpp>
#include <weir/io/families/deepseek_family.hpp>
#include <weir/io/families/family.hpp>
#include <weir/io/families/grouped_query_family.hpp>
#include <weir/io/families/layer_lists.hpp>
#include <weir/io/tensor_source.hpp>
#include <weir/presets/glm_4_5.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

template <>
struct Family<presets::Glm4MoeConfig> {
  static constexpr std::array<std::string_view, 1> kModelTypes = {"glm4_moe"};
  static constexpr std::string_view kArchitecture = "Glm4MoeForCausalLM";

  static presets::Glm4MoeConfig read(ConfigFile& json) {
    presets::Glm4MoeConfig config{.shape = read_grouped_query_shape(json, {.partial = 0.5}),
                                  .norm_epsilon = json.number("rms_norm_eps", 1e-5),
                                  .renormalise = json.flag("norm_topk_prob", true),
                                  .scale = json.number("routed_scaling_factor", 1.0),
                                  .groups = read_groups(json, 2)};
    read_deepseek_mixture(json, config.shape);
    config.shape.selection_bias = true;
    config.shape.prediction_modules = json.count("num_nextn_predict_layers", 0);
    auto& attention = std::get<GroupedQueryConfig>(config.shape.attention);
    if (json.flag("use_qk_norm", false)) {
      attention.qk_norm = QkNorm::kPerHead;
      attention.qk_norm_epsilon = config.norm_epsilon;
    }
    json.expect("scoring_func", "sigmoid");
    json.expect("topk_method", "noaux_tc");
    return config;
  }

  static void write(const presets::Glm4MoeConfig& config, nlohmann::json& json) {
    if (config.groups.summed != 2) {
      throw_error<ConfigError>("save_pretrained: groups.summed = ", config.groups.summed,
                               ", expected 2 in this family");
    }
    write_grouped_query_shape(config.shape, json);
    if (!json.contains("partial_rotary_factor")) json["partial_rotary_factor"] = 1.0;
    write_deepseek_mixture(config.shape, json);
    json["use_qk_norm"] = grouped_query_of(config.shape).qk_norm == QkNorm::kPerHead;
    json["rms_norm_eps"] = config.norm_epsilon;
    json["norm_topk_prob"] = config.renormalise;
    json["routed_scaling_factor"] = config.scale;
    json["n_group"] = config.groups.count;
    json["topk_group"] = config.groups.allowed;
    json["num_nextn_predict_layers"] = config.shape.prediction_modules;
  }

  static std::vector<presets::TensorName> names(const presets::Glm4MoeConfig& config,
                                                const TensorSource* source) {
    return presets::join_names({presets::kSharedExpertsNames, presets::kSelectionBiasNames,
                                presets::kPredictionNames, moe_names(source, config.shape),
                                presets::kHuggingFaceNames});
  }
};

}  // namespace weir::io
