// SPDX-License-Identifier: MIT
/// \file
/// Checkpoints of DeepSeekMoE, DeepSeek-V2, DeepSeek-V3 and Kimi K2.
#pragma once

#include <array>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include <weir/attention/latent.hpp>
#include <weir/core/error.hpp>
#include <weir/io/config_file.hpp>
#include <weir/io/families/deepseek_family.hpp>
#include <weir/io/families/family.hpp>
#include <weir/io/families/grouped_query_family.hpp>
#include <weir/io/families/layer_lists.hpp>
#include <weir/io/tensor_source.hpp>
#include <weir/presets/deepseek_attention.hpp>
#include <weir/presets/deepseek_moe_16b.hpp>
#include <weir/presets/deepseek_v2.hpp>
#include <weir/presets/deepseek_v3.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

template <>
struct Family<presets::DeepSeekMoEConfig> {
  static constexpr std::array<std::string_view, 1> kModelTypes = {"deepseek"};
  static constexpr std::string_view kArchitecture = "DeepseekForCausalLM";

  static presets::DeepSeekMoEConfig read(ConfigFile& json) {
    presets::DeepSeekMoEConfig config{
        .shape = read_grouped_query_shape(json, {.output_bias = true}),
        .norm_epsilon = json.number("rms_norm_eps", 1e-6),
        .balance = json.number("aux_loss_alpha", 0.001)};
    read_deepseek_mixture(json, config.shape);
    config.renormalise = json.flag("norm_topk_prob", false) && config.shape.k > 1;
    json.expect("scoring_func", "softmax");
    json.expect("seq_aux", true);
    return config;
  }

  static void write(const presets::DeepSeekMoEConfig& config, nlohmann::json& json) {
    write_grouped_query_shape(config.shape, json);
    write_deepseek_mixture(config.shape, json);
    json["rms_norm_eps"] = config.norm_epsilon;
    json["norm_topk_prob"] = config.renormalise;
    json["aux_loss_alpha"] = config.balance;
    json["scoring_func"] = "softmax";
    json["seq_aux"] = true;
  }

  static std::vector<presets::TensorName> names(const presets::DeepSeekMoEConfig& config,
                                                const TensorSource* source) {
    return presets::join_names({presets::kHuggingFaceNames, presets::kSharedExpertsNames,
                                moe_names(source, config.shape)});
  }
};

namespace detail {

/// The names of a model with latent attention.
inline std::vector<presets::TensorName> latent_names(const presets::ModelShape& shape,
                                                     const TensorSource* source) {
  std::vector<presets::TensorName> names = presets::join_names(
      {presets::kLatentNames, presets::kSharedExpertsNames, presets::kSelectionBiasNames,
       presets::kPredictionNames, moe_names(source, shape)});
  const auto* const attention = std::get_if<LatentConfig>(&shape.attention);
  if (attention != nullptr && attention->q_rank > 0) {
    names = presets::join_names({presets::kLatentQueryNames, names});
  }
  return presets::join_names({names, presets::kHuggingFaceNames});
}

}  // namespace detail

template <>
struct Family<presets::DeepSeekV2Config> {
  static constexpr std::array<std::string_view, 1> kModelTypes = {"deepseek_v2"};
  static constexpr std::string_view kArchitecture = "DeepseekV2ForCausalLM";

  static presets::DeepSeekV2Config read(ConfigFile& json) {
    presets::DeepSeekV2Config config{.shape = read_latent_shape(json),
                                     .norm_epsilon = json.number("rms_norm_eps", 1e-6),
                                     .scale = json.number("routed_scaling_factor", 1.0),
                                     .balance = json.number("aux_loss_alpha", 0.001)};
    read_deepseek_mixture(json, config.shape);
    const std::string method = json.text("topk_method", "greedy");
    if (method == "group_limited_greedy") {
      config.groups = read_groups(json, 1);
    } else if (method != "greedy") {
      json.bad("topk_method", "greedy or group_limited_greedy");
    }
    json.ignore("n_group", "topk_group");  // Of the other method.
    json.expect("scoring_func", "softmax");
    json.expect("norm_topk_prob", false);
    json.expect("seq_aux", true);
    return config;
  }

  /// The losses of devices and communication have no place in config.json, nor has what is dropped
  /// in training.
  static void write(const presets::DeepSeekV2Config& config, nlohmann::json& json) {
    if (config.groups.summed != 1) {
      throw_error<ConfigError>("save_pretrained: groups.summed = ", config.groups.summed,
                               ", expected 1 in this family");
    }
    write_latent_shape(config.shape, json);
    write_deepseek_mixture(config.shape, json);
    json["rms_norm_eps"] = config.norm_epsilon;
    json["routed_scaling_factor"] = config.scale;
    json["aux_loss_alpha"] = config.balance;
    json["topk_method"] = config.groups.count > 1 ? "group_limited_greedy" : "greedy";
    json["n_group"] = config.groups.count;
    json["topk_group"] = config.groups.allowed;
    json["scoring_func"] = "softmax";
    json["norm_topk_prob"] = false;
    json["seq_aux"] = true;
  }

  static std::vector<presets::TensorName> names(const presets::DeepSeekV2Config& config,
                                                const TensorSource* source) {
    return detail::latent_names(config.shape, source);
  }
};

template <>
struct Family<presets::DeepSeekV3Config> {
  static constexpr std::array<std::string_view, 2> kModelTypes = {"deepseek_v3", "kimi_k2"};
  static constexpr std::string_view kArchitecture = "DeepseekV3ForCausalLM";

  static presets::DeepSeekV3Config read(ConfigFile& json) {
    presets::DeepSeekV3Config config{.shape = read_latent_shape(json),
                                     .norm_epsilon = json.number("rms_norm_eps", 1e-6),
                                     .renormalise = json.flag("norm_topk_prob", true),
                                     .scale = json.number("routed_scaling_factor", 2.5),
                                     .groups = read_groups(json, 2),
                                     .balance = json.number("aux_loss_alpha", 0.0001)};
    read_deepseek_mixture(json, config.shape);
    config.shape.selection_bias = true;
    config.shape.prediction_modules = json.count("num_nextn_predict_layers", 0);
    json.expect("scoring_func", "sigmoid");
    json.expect("topk_method", "noaux_tc");
    json.expect("seq_aux", true);
    return config;
  }

  static void write(const presets::DeepSeekV3Config& config, nlohmann::json& json) {
    if (config.groups.summed != 2) {
      throw_error<ConfigError>("save_pretrained: groups.summed = ", config.groups.summed,
                               ", expected 2 in this family");
    }
    write_latent_shape(config.shape, json);
    write_deepseek_mixture(config.shape, json);
    json["rms_norm_eps"] = config.norm_epsilon;
    json["norm_topk_prob"] = config.renormalise;
    json["routed_scaling_factor"] = config.scale;
    json["n_group"] = config.groups.count;
    json["topk_group"] = config.groups.allowed;
    json["aux_loss_alpha"] = config.balance;
    json["num_nextn_predict_layers"] = config.shape.prediction_modules;
    json["scoring_func"] = "sigmoid";
    json["topk_method"] = "noaux_tc";
    json["seq_aux"] = true;
  }

  static std::vector<presets::TensorName> names(const presets::DeepSeekV3Config& config,
                                                const TensorSource* source) {
    return detail::latent_names(config.shape, source);
  }
};

}  // namespace weir::io
