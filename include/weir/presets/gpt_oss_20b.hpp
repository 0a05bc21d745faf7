// SPDX-License-Identifier: MIT
/// \file
/// gpt-oss-20b (OpenAI 2025, arXiv:2508.10925).
#pragma once

#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// A decoder with biases, a learned sink in each head's softmax, a window in every other layer, and
/// the four best of 32 clamped experts, weighted by the softmax over their logits.
struct GptOssConfig {
  ModelShape shape;
  double norm_epsilon = 1e-5;
  double balance = 0.0;  ///< Not published.
};

/// 20.9 billion parameters; 3.6 of them active without the embedding, as OpenAI counts.
/// (OpenAI 2025, arXiv:2508.10925, table 1.)
inline GptOssConfig gpt_oss_20b() {
  return {.shape = {
              .layers = 24,
              .d_model = 2880,
              .vocab = 201088,
              .attention = GroupedQueryShape{.heads = 64,
                                             .kv_heads = 8,
                                             .head_dim = 64,
                                             .rope_theta = 150000.0,
                                             .qkv_bias = true,
                                             .output_bias = true,
                                             .sinks = true},
              .experts = 32,
              .k = 4,
              .d_hidden = 2880,
              .expert_bias = true,
              .router_bias = true,
          }};
}

}  // namespace weir::presets
