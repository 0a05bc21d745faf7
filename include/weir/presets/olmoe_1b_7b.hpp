// SPDX-License-Identifier: MIT
/// \file
/// OLMoE-1B-7B (Muennighoff et al. 2024, arXiv:2409.02060).
#pragma once

#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// A decoder whose queries and keys are normalized over their whole width, with the eight best of
/// 64 narrow SwiGLU experts in each layer, weighted by their raw probabilities.
struct OlmoeConfig {
  ModelShape shape;
  double norm_epsilon = 1e-5;
  double balance = 0.01;  ///< A mean over the layers, like z_loss.
  double z_loss = 0.001;
};

/// 6.9 billion parameters, 1.3 of which a token meets. (Muennighoff et al. 2024, arXiv:2409.02060;
/// the experts of the checkpoint are 1024 wide, not 2048 as the default of Hugging Face's
/// class says.)
inline OlmoeConfig olmoe_1b_7b() {
  return {.shape = {
              .layers = 16,
              .d_model = 2048,
              .vocab = 50304,
              .attention =
                  GroupedQueryShape{
                      .heads = 16, .kv_heads = 16, .head_dim = 128, .qk_norm = QkNormShape::kFull},
              .experts = 64,
              .k = 8,
              .d_hidden = 1024,
          }};
}

}  // namespace weir::presets
