// SPDX-License-Identifier: MIT
/// \file
/// DeepSeek-V2-Lite.
#pragma once

#include <weir/presets/deepseek_v2.hpp>

namespace weir::presets {

/// 15.7 billion parameters, 2.4 of them active without the embedding. (DeepSeek-AI 2024,
/// arXiv:2405.04434, appendix B.)
inline DeepSeekV2Config deepseek_v2_lite() {
  return {.shape = {
              .layers = 27,
              .d_model = 2048,
              .vocab = 102400,
              .attention = LatentConfig{.heads = 16,
                                        .kv_rank = 512,
                                        .nope_dim = 128,
                                        .rope_dim = 64,
                                        .value_dim = 128,
                                        .yarn = Yarn{.factor = 40.0,
                                                     .original_context = 4096,
                                                     .mscale = 0.707,
                                                     .mscale_all_dim = 0.707}},
              .interleave = {.first_dense = 1},
              .experts = 64,
              .k = 6,
              .d_hidden = 1408,
              .shared_hidden = 2 * 1408,
              .dense_hidden = 10944,
          }};
}

}  // namespace weir::presets
