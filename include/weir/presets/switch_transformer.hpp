// SPDX-License-Identifier: MIT
/// \file
/// The Switch Transformer (Fedus et al. 2021, arXiv:2101.03961).
#pragma once

#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// T5 with the one best expert, weighted by its raw probability, in every other layer.
///
/// An encoder-decoder: `count` counts the published model, and `make` builds its decoder half,
/// without attention to an encoder and with rotary positions instead of T5's table of relative
/// ones.
struct SwitchConfig {
  ModelShape shape;
  double norm_epsilon = 1e-6;
  double capacity_train = 1.25;  ///< Times tokens / experts; 1.0 in part of the paper.
  double capacity_evaluate = 2.0;
  double jitter = 0.01;
  double balance = 0.01;
};

namespace detail {

/// A T5 of as many layers in the encoder as in the decoder, with 32 buckets of positions.
inline ModelShape t5_shape(Index layers, Index d_model, Index heads, Index head_dim, Index d_hidden,
                           Index stride, Index experts, Index k) {
  return {
      .layers = layers,
      .d_model = d_model,
      .vocab = 32128,
      .attention = GroupedQueryShape{.heads = heads, .kv_heads = heads, .head_dim = head_dim},
      .interleave = {.stride = stride},
      .experts = experts,
      .k = k,
      .d_hidden = d_hidden,
      .dense_hidden = d_hidden,
      .encoder_layers = layers,
      .position_buckets = 32,
  };
}

}  // namespace detail

}  // namespace weir::presets
