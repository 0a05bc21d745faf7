// SPDX-License-Identifier: MIT
/// \file
/// DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437).
#pragma once

#include <weir/moe/selector/group_limit.hpp>
#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// Latent attention and, behind three dense layers, the eight best of 256 narrow SwiGLU experts by
/// biased sigmoids, beside one that every token visits; the bias is what balances them.
struct DeepSeekV3Config {
  ModelShape shape;
  double norm_epsilon = 1e-6;
  double scale = 2.5;  ///< Of the weights, after their division by their sum.
  GroupLimit groups = {.count = 8, .allowed = 4, .summed = 2};
  double bias_rate = 0.001;
  double balance = 0.0001;  ///< In each sequence and layer.
};

/// 671 billion parameters, 37 of which a token meets. The module of multi-token prediction is
/// counted apart. (DeepSeek-AI 2024, arXiv:2412.19437, section 4.2.)
inline DeepSeekV3Config deepseek_v3() {
  return {.shape = {
              .layers = 61,
              .d_model = 7168,
              .vocab = 129280,
              .attention = LatentShape{.heads = 128,
                                       .q_rank = 1536,
                                       .kv_rank = 512,
                                       .nope_dim = 128,
                                       .rope_dim = 64,
                                       .value_dim = 128},
              .interleave = {.first_dense = 3},
              .experts = 256,
              .k = 8,
              .d_hidden = 2048,
              .selection_bias = true,
              .shared_hidden = 2048,
              .dense_hidden = 18432,
              .prediction_modules = 1,
          }};
}

}  // namespace weir::presets
