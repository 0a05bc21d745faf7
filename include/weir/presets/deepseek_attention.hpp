// SPDX-License-Identifier: MIT
/// \file
/// The attention that DeepSeek-V2, V2-Lite and V3 have in common.
#pragma once

#include <weir/attention/latent.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/yarn.hpp>

namespace weir::presets::detail {

/// Latent attention with the sizes of all DeepSeek models. The first training has contexts of 4096
/// tokens, which the yarn stretches 40 times.
///
/// \param q_rank   0: queries come from x directly.
/// \param mscale   Both factors of the yarn.
inline LatentConfig deepseek_attention(Index heads, Index q_rank, double mscale) {
  return {
      .heads = heads,
      .q_rank = q_rank,
      .kv_rank = 512,
      .nope_dim = 128,
      .rope_dim = 64,
      .value_dim = 128,
      .rope_scaling = Yarn{
          .factor = 40.0, .original_context = 4096, .mscale = mscale, .mscale_all_dim = mscale}};
}

}  // namespace weir::presets::detail
