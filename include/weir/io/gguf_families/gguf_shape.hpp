// SPDX-License-Identifier: MIT
/// \file
/// The settings that the architectures of GGUF files have in common.
#pragma once

#include <span>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/gguf.hpp>
#include <weir/io/gguf_families/gguf_rope.hpp>
#include <weir/io/gguf_settings.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

inline constexpr auto kGgufRmsEpsilon = "attention.layer_norm_rms_epsilon";

/// Reads the sizes of a decoder with grouped-query attention. Mixture, norms and biases are left to
/// the family.
/// \throws FileError  if a setting is missing or of another kind, or says what weir does not do.
inline presets::ModelShape read_gguf_shape(GgufSettings& settings) {
  const Index d_model = settings.count("embedding_length");
  const Index heads = settings.count("attention.head_count");
  if (heads < 1) settings.bad("attention.head_count", "at least 1");
  GroupedQueryConfig attention{.heads = heads,
                               .kv_heads = settings.count("attention.head_count_kv", heads),
                               .head_dim = settings.count("attention.key_length", d_model / heads),
                               .rope_theta = settings.number("rope.freq_base", 1e4),
                               .rope_scaling = read_gguf_scaling(settings)};
  settings.expect_count("attention.value_length", attention.head_dim);
  settings.expect_count("rope.dimension_count", attention.head_dim);
  settings.expect_flag("attention.causal", true);
  return {.layers = settings.count("block_count"), .d_model = d_model, .attention = attention};
}

/// The grouped-query attention of `shape`.
/// \throws ConfigError  if it is another one.
inline const GroupedQueryConfig& gguf_grouped_query(const presets::ModelShape& shape) {
  const auto* const attention = std::get_if<GroupedQueryConfig>(&shape.attention);
  if (attention == nullptr) {
    throw_error<ConfigError>(
        "save_gguf: attention is a LatentConfig, expected a GroupedQueryConfig in this family");
  }
  return *attention;
}

/// What files of all architectures say.
inline void write_gguf_sizes(const presets::ModelShape& shape, GgufSettingsWriter& to) {
  to.count("block_count", shape.layers);
  to.count("embedding_length", shape.d_model);
  to.count("vocab_size", shape.vocab);
}

/// The opposite of `read_gguf_shape`.
/// \throws ConfigError  if the attention is another one, or llama.cpp stretches frequencies
///                      otherwise.
inline void write_gguf_shape(const presets::ModelShape& shape, GgufSettingsWriter& to) {
  const GroupedQueryConfig& attention = gguf_grouped_query(shape);
  const Index head_dim =
      attention.head_dim > 0 ? attention.head_dim : shape.d_model / attention.heads;
  write_gguf_sizes(shape, to);
  to.count("attention.head_count", attention.heads);
  to.count("attention.head_count_kv", attention.kv_heads);
  to.count("attention.key_length", head_dim);
  to.count("attention.value_length", head_dim);
  to.count("rope.dimension_count", head_dim);
  to.number("rope.freq_base", attention.rope_theta);
  write_gguf_scaling(attention.rope_scaling, to);
  const auto* const yarn = std::get_if<Yarn>(&attention.rope_scaling);
  if (yarn != nullptr && yarn->rotation_scale() != yarn->sharpness(1.0)) {
    to.number("rope.scaling.attn_factor", yarn->rotation_scale() / yarn->sharpness(1.0));
  }
}

/// Reads how many experts there are, and how many a token visits.
inline void read_gguf_experts(GgufSettings& settings, presets::ModelShape& shape) {
  shape.experts = settings.count("expert_count");
  shape.k = settings.count("expert_used_count");
  if (settings.count("expert_group_count", 0) > 1) settings.bad("expert_group_count", "at most 1");
  settings.ignore("expert_group_used_count");
}

inline void write_gguf_experts(const presets::ModelShape& shape, GgufSettingsWriter& to) {
  to.count("expert_count", shape.experts);
  to.count("expert_used_count", shape.k);
}

/// `special` and the names that all architectures have in common, for `file` if there is one.
inline std::vector<presets::TensorName> gguf_names(const Gguf* file,
                                                   std::span<const presets::TensorName> special) {
  using presets::kGgufNames;
  if (file != nullptr && file->has_tensor("blk.0.attn_qkv.weight")) {
    return presets::join_names({special, presets::kGgufJoinedQkvNames, kGgufNames});
  }
  return presets::join_names({special, kGgufNames});
}

/// The architecture's queries are as wide as the model.
/// \throws ConfigError  unless they are.
inline void expect_square_queries(const presets::ModelShape& shape) {
  const GroupedQueryConfig& attention = gguf_grouped_query(shape);
  if (attention.head_dim > 0 && attention.query_width() != shape.d_model) {
    throw_error<ConfigError>("save_gguf: heads * head_dim = ", attention.query_width(),
                             ", expected d_model = ", shape.d_model,
                             ", as llama.cpp has it in this family");
  }
}

/// Whether every layer is a mixture.
/// \throws ConfigError  if one is not.
inline void expect_all_sparse(const presets::ModelShape& shape) {
  if (shape.count_sparse(shape.layers) != shape.layers) {
    throw_error<ConfigError>("save_gguf: ", shape.layers - shape.count_sparse(shape.layers),
                             " layers are dense, expected none in this family");
  }
}

/// The architecture's way with weights has to be the model's.
/// \throws ConfigError  unless it is.
inline void expect_renormalise(bool own, bool expected) {
  if (own != expected) {
    throw_error<ConfigError>("save_gguf: renormalise = ", own ? "true" : "false", ", expected ",
                             expected ? "true" : "false", ", as llama.cpp has it in this family");
  }
}

}  // namespace weir::io
