// SPDX-License-Identifier: MIT
/// \file
/// DBRX (Databricks 2024).
#pragma once

#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// A decoder with layer norms without bias, clipped queries, keys and values, and the four best of
/// sixteen SwiGLU experts, whose probabilities are divided by their sum.
struct DbrxConfig {
  ModelShape shape;
  double norm_epsilon = 1e-5;
  double weight_norm = 1.0;  ///< p: weights are divided by their p-norm.
  double balance = 0.05;     ///< A mean over the layers.
};

/// 132 billion parameters, 36 of which a token meets. (Databricks 2024, "Introducing DBRX";
/// huggingface.co/databricks/dbrx-base.)
inline DbrxConfig dbrx() {
  return {.shape = {
              .layers = 40,
              .d_model = 6144,
              .vocab = 100352,
              .attention =
                  GroupedQueryShape{.heads = 48, .kv_heads = 8, .head_dim = 128, .rope_theta = 5e5},
              .experts = 16,
              .k = 4,
              .d_hidden = 10752,
          }};
}

}  // namespace weir::presets
