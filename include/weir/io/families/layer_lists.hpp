// SPDX-License-Identifier: MIT
/// \file
/// What configurations say of each layer.
#pragma once

#include <limits>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/types.hpp>
#include <weir/io/config_file.hpp>
#include <weir/io/tensor_source.hpp>
#include <weir/model/interleave.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

/// Makes sure that what follows may look at each layer.
/// \throws FileError  if there are more of them than any model has.
inline void expect_few_layers(ConfigFile& json, Index layers) {
  constexpr Index kMost = 100'000;
  if (layers > kMost) json.bad("num_hidden_layers", "at most 100000");
}

/// The setting `key`, a number of parts of the size `each`, times this size.
/// \throws FileError  if the product is beyond all sizes.
inline Index read_multiple(ConfigFile& json, const char* key, Index missing, Index each) {
  const Index count = json.count(key, missing);
  if (each > 0 && count > std::numeric_limits<Index>::max() / each) {
    json.bad(key, "a number of parts that exist");
  }
  return count * each;
}

/// What Hugging Face's configurations call the attention of each layer.
inline std::vector<std::string> layer_types(const presets::ModelShape& shape) {
  std::vector<std::string> types;
  for (Index l = 0; l < shape.layers; ++l) {
    const auto* const attention = std::get_if<GroupedQueryConfig>(&shape.attention_of(l));
    const bool window = attention != nullptr && attention->window > 0;
    const bool chunk = attention != nullptr && attention->chunk > 0;
    types.emplace_back(window  ? "sliding_attention"
                       : chunk ? "chunked_attention"
                               : "full_attention");
  }
  return types;
}

/// \throws FileError  if `layer_types` is there and is not that of `shape`.
inline void expect_layer_types(ConfigFile& json, const presets::ModelShape& shape) {
  if (!json.has("layer_types")) return;
  expect_few_layers(json, shape.layers);
  json.expect("layer_types", layer_types(shape));
}

/// Uses the settings of a window as Qwen's configurations have them, in which it is turned off.
/// \throws FileError  if it is turned on.
inline void expect_no_window(ConfigFile& json) {
  json.expect("use_sliding_window", false);
  json.ignore("sliding_window", "max_window_layers");  // Of the window.
}

/// Which layers are sparse by `decoder_sparse_step` and `mlp_only_layers`, in Qwen's
/// configurations: every so many, without those of the list.
/// \throws FileError  if the list is not of the first layers.
inline Interleave read_sparse_step(ConfigFile& json) {
  Interleave sparse{.stride = json.count("decoder_sparse_step", 1)};
  if (sparse.stride < 1) json.bad("decoder_sparse_step", "at least 1");
  constexpr auto kList = "mlp_only_layers";
  if (!json.has(kList)) return sparse;
  const nlohmann::json& list = json.at(kList);
  for (const nlohmann::json& layer : list) {
    if (layer != sparse.first_dense) json.bad(kList, "the first layers, such as [0, 1]");
    ++sparse.first_dense;
  }
  return sparse;
}

/// The opposite of `read_sparse_step`.
inline void write_sparse_step(const Interleave& sparse, nlohmann::json& json) {
  json["decoder_sparse_step"] = sparse.stride;
  json["mlp_only_layers"] = nlohmann::json::array();
  for (Index l = 0; l < sparse.first_dense; ++l) json["mlp_only_layers"].push_back(l);
}

/// The number of experts, under either of two names.
inline Index read_experts(ConfigFile& json) {
  constexpr auto kName = "num_experts";
  return json.has(kName) ? json.count(kName) : json.count("num_local_experts");
}

/// Whether a checkpoint holds the experts of a layer together, in
/// `model.layers.L.mlp.experts.gate_up_proj`, as newer versions of Hugging Face's code do.
inline bool has_fused_experts(const TensorSource* source, const presets::ModelShape& shape) {
  if (source == nullptr) return false;
  Index sparse = 0;
  while (sparse < shape.layers && !shape.is_sparse(sparse)) ++sparse;
  const std::string layer = "model.layers." + std::to_string(sparse);
  return source->find(layer + ".mlp.experts.gate_up_proj") != nullptr;
}

/// The names of the mixtures in most families since Qwen2-MoE, in whichever layout `source` has
/// them. Writing is with a tensor for each expert, which all versions of Hugging Face's code read.
inline std::span<const presets::TensorName> moe_names(const TensorSource* source,
                                                      const presets::ModelShape& shape) {
  if (has_fused_experts(source, shape)) return presets::kFusedHuggingFaceMoeNames;
  return presets::kHuggingFaceMoeNames;
}

}  // namespace weir::io
