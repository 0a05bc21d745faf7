// SPDX-License-Identifier: MIT
/// \file
/// ST-MoE-32B (Zoph et al. 2022, arXiv:2202.08906).
#pragma once

#include <weir/presets/switch_transformer.hpp>

namespace weir::presets {

/// The two best experts by their raw probabilities in every fourth layer, with a dense network
/// behind them, and GELU-gated networks throughout.
///
/// An encoder-decoder: `count` counts the published model, and `make` builds its decoder half,
/// without attention to an encoder and with rotary positions instead of T5's table of relative
/// ones.
struct StMoEConfig {
  ModelShape shape;
  double norm_epsilon = 1e-6;
  double capacity_train = 1.25;  ///< Times tokens / experts.
  double capacity_evaluate = 2.0;
  Index group_size = 4096;  ///< Tokens that share a capacity.
  double balance = 0.01;
  double z_loss = 0.001;
};

/// 269 billion parameters, as expensive as 32 dense ones. (Zoph et al. 2022, arXiv:2202.08906;
/// the total is reached with the dense network behind each mixture.)
inline StMoEConfig st_moe_32b() {
  ModelShape shape = detail::t5_shape(24, 5120, 64, 128, 20480, 4, 64, 2);
  shape.extra_hidden = 20480;
  return {.shape = shape};
}

}  // namespace weir::presets
