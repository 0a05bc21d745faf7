// SPDX-License-Identifier: MIT
/// \file
/// Checkpoints of gpt-oss.
#pragma once

#include <array>
#include <nlohmann/json.hpp>
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
#include <weir/moe/experts/clamped_glu_bank.hpp>
#include <weir/ops/yarn.hpp>
#include <weir/presets/gpt_oss_20b.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

template <>
struct Family<presets::GptOssConfig> {
  static constexpr std::array<std::string_view, 1> kModelTypes = {"gpt_oss"};
  static constexpr std::string_view kArchitecture = "GptOssForCausalLM";

  static presets::GptOssConfig read(ConfigFile& json) {
    const bool has_bias = json.flag("attention_bias", true);
    presets::GptOssConfig config{
        .shape = read_grouped_query_shape(
            json, {.rope_theta = 150000.0, .qkv_bias = has_bias, .output_bias = true}),
        .norm_epsilon = json.number("rms_norm_eps", 1e-5)};
    presets::ModelShape& shape = config.shape;
    auto& local = std::get<GroupedQueryConfig>(shape.attention);
    local.output_bias = has_bias;
    local.sinks = true;
    local.window = json.count("sliding_window", json.mentions("sliding_window") ? 0 : 128);
    if (!json.has("head_dim")) local.head_dim = 64;
    if (!json.mentions("rope_scaling") && !json.mentions("rope_parameters")) {
      local.rope_scaling = Yarn{.factor = 32.0, .original_context = 4096, .truncate = false};
    }
    GroupedQueryConfig full = local;
    full.window = 0;
    shape.other_attention = full;
    shape.others = {.stride = 2};
    shape.experts = json.count("num_local_experts");
    shape.k = json.count("num_experts_per_tok");
    shape.d_hidden = json.count("intermediate_size");
    shape.expert_bias = shape.router_bias = true;
    expect_layer_types(json, shape);
    json.expect("experts_per_token", shape.k);  // Another name, from OpenAI's own code.
    json.expect("swiglu_alpha", ClampedGluBankConfig{}.alpha);
    json.expect("swiglu_limit", ClampedGluBankConfig{}.limit);
    // Without router logits there is no loss, see GptOssConfig.
    const double balance = json.number("router_aux_loss_coef", 0.001);
    if (json.flag("output_router_logits", false)) config.balance = balance;
    return config;
  }

  static void write(const presets::GptOssConfig& config, nlohmann::json& json) {
    const presets::ModelShape& shape = config.shape;
    write_grouped_query_shape(shape, json);
    json["sliding_window"] = grouped_query_of(shape).window;
    json["layer_types"] = layer_types(shape);
    json["num_local_experts"] = shape.experts;
    json["num_experts_per_tok"] = shape.k;
    json["intermediate_size"] = shape.d_hidden;
    json["rms_norm_eps"] = config.norm_epsilon;
    json["swiglu_limit"] = ClampedGluBankConfig{}.limit;
    json["router_aux_loss_coef"] = config.balance;
    json["output_router_logits"] = config.balance != 0.0;
  }

  /// Published checkpoints hold blocks of four-bit numbers, which are read; writing is in the other
  /// layout.
  static std::vector<presets::TensorName> names(const presets::GptOssConfig& /*config*/,
                                                const TensorSource* source) {
    using presets::kGptOssNames;
    using presets::kHuggingFaceNames;
    const bool blocks = source != nullptr && source->find(
                                                 "model.layers.0.mlp.experts.gate_up_proj_"
                                                 "blocks") != nullptr;
    if (blocks) {
      return presets::join_names({kGptOssNames, presets::kGptOssBlockNames, kHuggingFaceNames});
    }
    return presets::join_names({kGptOssNames, presets::kGptOssExpertNames, kHuggingFaceNames});
  }
};

}  // namespace weir::io
