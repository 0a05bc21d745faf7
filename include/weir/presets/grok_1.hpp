// SPDX-License-Identifier: MIT
/// \file
/// Grok-1 (xAI 2024).
#pragma once

#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// A decoder whose branches have a norm before and one behind them, with soft-capped attention
/// scores, the two best of eight GELU-gated experts weighted by their raw probabilities, and
/// multipliers on the tied embedding and the logits.
struct GrokConfig {
  ModelShape shape;
  double norm_epsilon = 1e-5;
  double score_softcap = 30.0;
  double embedding_multiplier = 78.38367176906169;  ///< The root of d_model = 6144.
  double logit_multiplier = 0.5773502691896257;     ///< 1 / sqrt(3).
  double balance = 0.0;                             ///< Not published.
};

/// "314 billion parameters, 25 % of which are active": 314.9 without the embedding.
/// (github.com/xai-org/grok-1, run.py and model.py.)
inline GrokConfig grok_1() {
  return {.shape = {
              .layers = 64,
              .d_model = 6144,
              .vocab = 131072,
              .tied = true,
              .attention = GroupedQueryShape{.heads = 48, .kv_heads = 8, .head_dim = 128},
              .norms = 4,
              .experts = 8,
              .k = 2,
              .d_hidden = 32768,
          }};
}

}  // namespace weir::presets
