// SPDX-License-Identifier: MIT
/// \file
/// Llama 4 Scout, the text model (Meta 2025).
#pragma once

#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// A decoder whose layers look at chunks with rotary positions, every fourth at everything without
/// positions, and whose experts take the token multiplied by the sigmoid of its logit, beside one
/// that every token visits.
struct Llama4Config {
  ModelShape shape;
  double norm_epsilon = 1e-5;
  double balance = 0.0;  ///< Not published.
};

/// 107.8 billion parameters, 17.2 of which a token meets; the 109 that are published have the
/// vision model in them. (Meta 2025; huggingface.co/meta-llama/Llama-4-Scout-17B-16E.)
inline Llama4Config llama_4_scout() {
  return {.shape = {
              .layers = 48,
              .d_model = 5120,
              .vocab = 202048,
              .attention = GroupedQueryShape{.heads = 40,
                                             .kv_heads = 8,
                                             .head_dim = 128,
                                             .rope_theta = 5e5,
                                             .qk_norm = QkNormShape::kL2},
              .experts = 16,
              .k = 1,
              .d_hidden = 8192,
              .shared_hidden = 8192,
          }};
}

}  // namespace weir::presets
