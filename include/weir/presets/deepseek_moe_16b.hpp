// SPDX-License-Identifier: MIT
/// \file
/// DeepSeekMoE-16B (Dai et al. 2024, arXiv:2401.06066).
#pragma once

#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// Multi-head attention and, behind one dense layer, the six best of 64 narrow SwiGLU experts,
/// weighted by their raw probabilities, beside two that every token visits.
struct DeepSeekMoEConfig {
  ModelShape shape;
  double norm_epsilon = 1e-6;
  double balance = 0.001;  ///< In each sequence and layer.
};

/// 16.4 billion parameters, 2.8 of which a token meets. (Dai et al. 2024, arXiv:2401.06066,
/// section 5.)
inline DeepSeekMoEConfig deepseek_moe_16b() {
  return {.shape = {
              .layers = 28,
              .d_model = 2048,
              .vocab = 102400,
              .attention = GroupedQueryShape{.heads = 16, .kv_heads = 16, .head_dim = 128},
              .interleave = {.first_dense = 1},
              .experts = 64,
              .k = 6,
              .d_hidden = 1408,
              .shared_hidden = 2 * 1408,
              .dense_hidden = 10944,
          }};
}

}  // namespace weir::presets
