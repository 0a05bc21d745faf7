// SPDX-License-Identifier: MIT
/// \file
/// DeepSeek-V2 (DeepSeek-AI 2024, arXiv:2405.04434).
#pragma once

#include <algorithm>

#include <weir/moe/selector/group_limit.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/scaled.hpp>

namespace weir::presets {

/// Latent attention and, behind one dense layer, the six best of many narrow SwiGLU experts,
/// weighted by their scaled raw probabilities, beside two that every token visits.
struct DeepSeekV2Config {
  ModelShape shape;
  double norm_epsilon = 1e-6;
  double scale = 1.0;           ///< Of the weights.
  GroupLimit groups = {};       ///< A token's experts live in `groups.allowed` of them.
  double balance = 0.001;       ///< In each sequence and layer, like the two below.
  double device_balance = 0.0;  ///< A device is a group.
  double communication_balance = 0.0;
};

/// 236 billion parameters, 21 of which a token meets. (DeepSeek-AI 2024, arXiv:2405.04434, section
/// 3.1.2.)
inline DeepSeekV2Config deepseek_v2() {
  return {.shape =
              {
                  .layers = 60,
                  .d_model = 5120,
                  .vocab = 102400,
                  .attention = LatentShape{.heads = 128,
                                           .q_rank = 1536,
                                           .kv_rank = 512,
                                           .nope_dim = 128,
                                           .rope_dim = 64,
                                           .value_dim = 128},
                  .interleave = {.first_dense = 1},
                  .experts = 160,
                  .k = 6,
                  .d_hidden = 1536,
                  .shared_hidden = 2 * 1536,
                  .dense_hidden = 12288,
              },
          .scale = 16.0,
          .groups = {.count = 8, .allowed = 3, .summed = 1},
          .balance = 0.003,
          .device_balance = 0.05,
          .communication_balance = 0.02};
}

/// As `scaled` of all presets, with at least two experts in each group.
inline DeepSeekV2Config scaled(DeepSeekV2Config config, Scale to = {}) {
  if (to.experts == 0) to.experts = std::max(2 * config.groups.count, 2 * config.shape.k);
  config.shape = scaled(config.shape, to);
  return config;
}

}  // namespace weir::presets
