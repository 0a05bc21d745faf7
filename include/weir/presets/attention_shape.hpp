// SPDX-License-Identifier: MIT
/// \file
/// The numbers of an attention layer.
#pragma once

#include <variant>

#include <weir/attention/latent.hpp>
#include <weir/core/types.hpp>

namespace weir::presets {

/// What normalizes queries and keys before they meet.
enum class QkNormShape {
  kNone,
  kFull,     ///< A weight for each column of q and of k: OLMoE.
  kPerHead,  ///< A weight for each of head_dim, shared by the heads: Qwen3.
  kL2,       ///< No weights: Llama 4.
};

/// Groups of query heads that share keys and values.
struct GroupedQueryShape {
  Index heads = 0, kv_heads = 0, head_dim = 0;
  double rope_theta = 1e4;
  bool qkv_bias = false, output_bias = false;
  QkNormShape qk_norm = QkNormShape::kNone;
  bool sinks = false;
};

using AttentionShape = std::variant<GroupedQueryShape, LatentConfig>;

}  // namespace weir::presets
