// SPDX-License-Identifier: MIT
/// \file
/// Qwen3-30B-A3B (Yang et al. 2025, arXiv:2505.09388).
#pragma once

#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// A decoder whose queries and keys are normalized head by head, with the eight best of 128 narrow
/// SwiGLU experts in each layer, whose probabilities are divided by their sum.
struct Qwen3Config {
  ModelShape shape;
  double norm_epsilon = 1e-6;
  double balance = 0.001;  ///< Of Hugging Face's config; a mean over the layers.
};

/// 30.5 billion parameters, 3.3 of which a token meets. (Yang et al. 2025, arXiv:2505.09388,
/// table 2.)
inline Qwen3Config qwen3_30b_a3b() {
  return {.shape = {
              .layers = 48,
              .d_model = 2048,
              .vocab = 151936,
              .attention = GroupedQueryShape{.heads = 32,
                                             .kv_heads = 4,
                                             .head_dim = 128,
                                             .rope_theta = 1e6,
                                             .qk_norm = QkNormShape::kPerHead},
              .experts = 128,
              .k = 8,
              .d_hidden = 768,
          }};
}

}  // namespace weir::presets
