// SPDX-License-Identifier: MIT
/// \file
/// Mixtral 8x22B.
#pragma once

#include <weir/presets/mixtral.hpp>

namespace weir::presets {

/// 140.6 billion parameters, of which 39.2 are active. (Mistral AI 2024.)
/// \param vocab    32000 as first released; 32768 in version 0.3.
inline MixtralConfig mixtral_8x22b(Index vocab = 32000) {
  return {
      .shape = {
          .layers = 56,
          .d_model = 6144,
          .vocab = vocab,
          .attention =
              GroupedQueryConfig{.heads = 48, .kv_heads = 8, .head_dim = 128, .rope_theta = 1e6},
          .experts = 8,
          .k = 2,
          .d_hidden = 16384,
      }};
}

}  // namespace weir::presets
