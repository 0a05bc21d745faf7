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

/// How an architecture rotates heads: as a whole, a part of each, or as a whole with what factors
/// of LongRoPE do.
enum class GgufRotation { kWhole, kPart, kFactors };

/// Reads the sizes of a decoder with grouped-query attention. Mixture, norms and biases are left to
/// the family.
/// \throws FileError  if a setting is missing or of another kind, or says what weir does not do.
inline presets::ModelShape read_gguf_shape(GgufSettings& settings,
                                           GgufRotation rotation = GgufRotation::kWhole) {
  const Index d_model = settings.count("embedding_length");
  const Index heads = settings.count("attention.head_count");
  if (heads < 1) settings.bad("attention.head_count", "at least 1");
  GroupedQueryConfig attention{.heads = heads,
                               .kv_heads = settings.count("attention.head_count_kv", heads),
                               .head_dim = settings.count("attention.key_length", d_model / heads),
                               .rope_theta = settings.number("rope.freq_base", 1e4),
                               .rope_scaling = rotation == GgufRotation::kFactors
                                                   ? read_gguf_long_rope(settings)
                                                   : read_gguf_scaling(settings)};
  settings.expect_count("attention.value_length", attention.head_dim);
  constexpr auto kRotated = "rope.dimension_count";
  if (rotation != GgufRotation::kPart) {
    settings.expect_count(kRotated, attention.head_dim);
  } else {
    attention.rotary_dim = settings.count(kRotated, attention.head_dim);
    if (attention.rotary_dim < 2) settings.bad(kRotated, "at least 2");
  }
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
inline void write_gguf_shape(const presets::ModelShape& shape, GgufSettingsWriter& to,
                             GgufRotation rotation = GgufRotation::kWhole) {
  const GroupedQueryConfig& attention = gguf_grouped_query(shape);
  const Index head_dim =
      attention.head_dim > 0 ? attention.head_dim : shape.d_model / attention.heads;
  write_gguf_sizes(shape, to);
  to.count("attention.head_count", attention.heads);
  to.count("attention.head_count_kv", attention.kv_heads);
  to.count("attention.key_length", head_dim);
  to.count("attention.value_length", head_dim);
  const bool is_part = rotation == GgufRotation::kPart && attention.rotary_dim > 0;
  to.count("rope.dimension_count", is_part ? attention.rotary_dim : head_dim);
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

/// Values of "expert_gating_func".
enum class GgufGate { kSoftmax = 1, kSigmoid = 2 };

inline constexpr auto kGgufGate = "expert_gating_func";

/// The factor of the weights of the experts, of which 0 stands for none.
inline double read_weights_scale(GgufSettings& settings) {
  const double scale = settings.number("expert_weights_scale", 0.0);
  return scale == 0.0 ? 1.0 : scale;
}

/// How many experts of the width d_hidden the shared one is as wide as.
/// \throws ConfigError  unless it is as wide as some.
inline Index gguf_shared_count(const presets::ModelShape& shape) {
  if (shape.shared_hidden < 1 || shape.shared_hidden % shape.d_hidden != 0) {
    throw_error<ConfigError>("save_gguf: shared_hidden = ", shape.shared_hidden,
                             ", expected a multiple of d_hidden = ", shape.d_hidden);
  }
  return shape.shared_hidden / shape.d_hidden;
}

/// Whether queries, keys and values have biases in `file`.
inline bool has_gguf_qkv_bias(const Gguf& file) {
  return file.has_tensor("blk.0.attn_q.bias") || file.has_tensor("blk.0.attn_qkv.bias");
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
