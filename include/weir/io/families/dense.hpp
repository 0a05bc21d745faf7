// SPDX-License-Identifier: MIT
/// \file
/// Checkpoints of Llama, Mistral and Qwen3 without experts.
#pragma once

#include <array>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/error.hpp>
#include <weir/io/config_file.hpp>
#include <weir/io/families/family.hpp>
#include <weir/io/families/grouped_query_family.hpp>
#include <weir/io/families/layer_lists.hpp>
#include <weir/io/tensor_source.hpp>
#include <weir/presets/dense.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

template <>
struct Family<presets::DenseConfig> {
  static constexpr std::array<std::string_view, 3> kModelTypes = {"llama", "mistral", "qwen3"};
  static constexpr std::string_view kArchitecture = "LlamaForCausalLM";

  static presets::DenseConfig read(ConfigFile& json) {
    const std::string type = json.text("model_type");
    presets::DenseConfig config{.shape = read_grouped_query_shape(json, {.output_bias = true}),
                                .norm_epsilon = json.number("rms_norm_eps", 1e-6)};
    config.shape.dense_hidden = json.count("intermediate_size");
    auto& attention = std::get<GroupedQueryConfig>(config.shape.attention);
    if (type == "mistral") {
      attention.window = json.mentions("sliding_window") ? json.count("sliding_window", 0) : 4096;
      if (attention.qkv_bias) json.bad("attention_bias", "false in this family");
    } else if (type == "qwen3") {
      if (!json.has("head_dim")) attention.head_dim = 128;
      attention.qk_norm = QkNorm::kPerHead;
      attention.qk_norm_epsilon = config.norm_epsilon;
      expect_no_window(json);
    } else {
      json.expect("mlp_bias", false);
    }
    expect_layer_types(json, config.shape);
    return config;
  }

  /// The family is Qwen3 with norms of queries and keys, Mistral with a window, and else Llama.
  static void write(const presets::DenseConfig& config, nlohmann::json& json) {
    write_grouped_query_shape(config.shape, json);
    json["intermediate_size"] = config.shape.dense_hidden;
    json["rms_norm_eps"] = config.norm_epsilon;
    const GroupedQueryConfig& attention = grouped_query_of(config.shape);
    if (attention.qk_norm != QkNorm::kNone) {
      json["model_type"] = "qwen3";
      json["architectures"] = {"Qwen3ForCausalLM"};
    } else if (attention.window > 0) {
      json["model_type"] = "mistral";
      json["architectures"] = {"MistralForCausalLM"};
      json["sliding_window"] = attention.window;
    } else {
      json["mlp_bias"] = false;
    }
  }

  static std::vector<presets::TensorName> names(const presets::DenseConfig& /*config*/,
                                                const TensorSource* /*source*/) {
    return presets::join_names({presets::kHuggingFaceNames});
  }
};

}  // namespace weir::io
