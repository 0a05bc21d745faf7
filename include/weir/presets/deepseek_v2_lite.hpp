// SPDX-License-Identifier: MIT
/// \file
/// DeepSeek-V2-Lite.
#pragma once

#include <weir/presets/deepseek_attention.hpp>
#include <weir/presets/deepseek_moe_16b.hpp>
#include <weir/presets/deepseek_v2.hpp>

namespace weir::presets {

/// 15.7 billion parameters, of which 2.4 are active without the embedding. The model is
/// DeepSeekMoE-16B with one layer fewer and latent attention. (DeepSeek-AI 2024, arXiv:2405.04434,
/// appendix B.)
inline DeepSeekV2Config deepseek_v2_lite() {
  ModelShape shape = deepseek_moe_16b().shape;
  shape.layers = 27;
  shape.attention = detail::deepseek_attention(16, 0, 0.707);
  return {.shape = shape};
}

}  // namespace weir::presets
