// SPDX-License-Identifier: MIT
/// \file
/// Mixtral 8x7B.
#pragma once

#include <weir/presets/mixtral.hpp>

namespace weir::presets {

/// 46.7 billion parameters, of which 12.9 are active. (Jiang et al. 2024, arXiv:2401.04088,
/// table 1.)
inline MixtralConfig mixtral_8x7b() {
  return {
      .shape = {
          .layers = 32,
          .d_model = 4096,
          .vocab = 32000,
          .attention =
              GroupedQueryConfig{.heads = 32, .kv_heads = 8, .head_dim = 128, .rope_theta = 1e6},
          .experts = 8,
          .k = 2,
          .d_hidden = 14336,
      }};
}

}  // namespace weir::presets
