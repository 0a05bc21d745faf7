// SPDX-License-Identifier: MIT
/// \file
/// Checkpoints of Granite's mixtures.
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
#include <weir/presets/granite_moe.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

template <>
struct Family<presets::GraniteMoeConfig> {
  static constexpr std::array<std::string_view, 1> kModelTypes = {"granitemoe"};
  static constexpr std::string_view kArchitecture = "GraniteMoeForCausalLM";

  static presets::GraniteMoeConfig read(ConfigFile& json) {
    presets::GraniteMoeConfig config{
        .shape = read_grouped_query_shape(json, {.output_bias = true}),
        .norm_epsilon = json.number("rms_norm_eps", 1e-6),
        .embedding_multiplier = json.number("embedding_multiplier", 1.0),
        .residual_multiplier = json.number("residual_multiplier", 1.0),
        .logits_scaling = json.number("logits_scaling", 1.0),
        .balance = json.number("router_aux_loss_coef", 0.001)};
    presets::ModelShape& shape = config.shape;
    std::get<GroupedQueryConfig>(shape.attention).scale = json.number("attention_multiplier", 1.0);
    shape.experts = json.count("num_local_experts", 8);
    shape.k = json.count("num_experts_per_tok", 2);
    shape.d_hidden = json.count("intermediate_size");
    return config;
  }

  static void write(const presets::GraniteMoeConfig& config, nlohmann::json& json) {
    write_grouped_query_shape(config.shape, json);
    const presets::ModelShape settled = presets::settled(config.shape);
    json["attention_multiplier"] = grouped_query_of(settled).scale;
    json["embedding_multiplier"] = config.embedding_multiplier;
    json["residual_multiplier"] = config.residual_multiplier;
    json["logits_scaling"] = config.logits_scaling;
    json["num_local_experts"] = config.shape.experts;
    json["num_experts_per_tok"] = config.shape.k;
    json["intermediate_size"] = config.shape.d_hidden;
    json["rms_norm_eps"] = config.norm_epsilon;
    json["router_aux_loss_coef"] = config.balance;
  }

  static std::vector<presets::TensorName> names(const presets::GraniteMoeConfig& /*config*/,
                                                const TensorSource* /*source*/) {
    return presets::join_names({presets::kGraniteMoeNames, presets::kHuggingFaceNames});
  }
};

}  // namespace weir::io
