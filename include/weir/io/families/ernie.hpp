// SPDX-License-Identifier: MIT
/// \file
/// Checkpoints of ERNIE 4.5's text mixtures.
#pragma once

#include <array>
#include <nlohmann/json.hpp>
#include <string_view>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/config_file.hpp>
#include <weir/io/families/family.hpp>
#include <weir/io/families/grouped_query_family.hpp>
#include <weir/io/families/layer_lists.hpp>
#include <weir/io/tensor_source.hpp>
#include <weir/ops/rope.hpp>
#include <weir/presets/ernie_4_5.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

template <>
struct Family<presets::ErnieMoeConfig> {
  static constexpr std::array<std::string_view, 1> kModelTypes = {"ernie4_5_moe"};
  static constexpr std::string_view kArchitecture = "Ernie4_5_MoeForCausalLM";

  /// The modules of multi-token prediction, which Hugging Face's code does not load either. They
  /// have no part in the logits.
  static constexpr std::array<std::string_view, 1> kIgnored = {"model.mtp_*"};

  static presets::ErnieMoeConfig read(ConfigFile& json) {
    presets::ErnieMoeConfig config{
        .shape = read_grouped_query_shape(json, {.rope_theta = 5e5, .tied = true}),
        .norm_epsilon = json.number("rms_norm_eps", 1e-5),
        .balance = json.number("router_aux_loss_coef", 0.001)};
    presets::ModelShape& shape = config.shape;
    expect_few_layers(json, shape.layers);
    std::get<GroupedQueryConfig>(shape.attention).rope_layout = RopeLayout::kInterleaved;
    shape.interleave = {.stride = json.count("moe_layer_interval", 1),
                        .first_dense = json.count("moe_layer_start_index", 1)};
    if (shape.interleave.stride < 1) json.bad("moe_layer_interval", "at least 1");
    shape.experts = json.count("moe_num_experts", 64);
    shape.k = json.count("moe_k", 6);
    shape.d_hidden = json.count("moe_intermediate_size", 1536);
    shape.selection_bias = true;
    shape.shared_hidden = read_multiple(json, "moe_num_shared_experts", 2, shape.d_hidden);
    if (shape.count_sparse(shape.layers) < shape.layers) {
      shape.dense_hidden = json.count("intermediate_size");
    }
    json.ignore("intermediate_size");  // Of dense layers alone.
    constexpr auto kEnd = "moe_layer_end_index";
    if (json.has(kEnd) && json.at(kEnd) != -1) json.expect(kEnd, shape.layers - 1);
    json.expect("use_bias", false);
    json.expect("use_rmsnorm", true);
    json.expect("moe_gate", "topk");
    json.expect("moe_use_aux_free", true);
    json.expect("moe_norm_min", 1e-12);
    json.ignore("moe_capacity", "num_nextn_predict_layers");  // Of training, and see kIgnored.
    return config;
  }

  static void write(const presets::ErnieMoeConfig& config, nlohmann::json& json) {
    const presets::ModelShape& shape = config.shape;
    if (shape.d_hidden == 0 || shape.shared_hidden % shape.d_hidden != 0) {
      throw_error<ConfigError>("save_pretrained: shared_hidden = ", shape.shared_hidden,
                               ", expected a multiple of d_hidden = ", shape.d_hidden);
    }
    write_grouped_query_shape(shape, json);
    json.erase("attention_bias");  // The family has a name of its own for it.
    json["use_bias"] = grouped_query_of(shape).qkv_bias;
    json["moe_layer_interval"] = shape.interleave.stride;
    json["moe_layer_start_index"] = shape.interleave.first_dense;
    json["moe_layer_end_index"] = shape.layers - 1;
    json["moe_num_experts"] = shape.experts;
    json["moe_k"] = shape.k;
    json["moe_intermediate_size"] = shape.d_hidden;
    json["moe_num_shared_experts"] = shape.shared_hidden / shape.d_hidden;
    json["intermediate_size"] = shape.dense_hidden > 0 ? shape.dense_hidden : shape.d_hidden;
    json["rms_norm_eps"] = config.norm_epsilon;
    json["router_aux_loss_coef"] = config.balance;
  }

  static std::vector<presets::TensorName> names(const presets::ErnieMoeConfig& config,
                                                const TensorSource* source) {
    return presets::join_names({presets::kSharedExpertsNames, presets::kErnieBiasNames,
                                moe_names(source, config.shape), presets::kHuggingFaceNames});
  }
};

}  // namespace weir::io
