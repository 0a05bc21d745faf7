// SPDX-License-Identifier: MIT
/// \file
/// Mixtral: the architecture of Mistral with a mixture of eight experts in every layer
/// (Jiang et al. 2024, arXiv:2401.04088).
#pragma once

#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// Root mean square norms, rotary positions, grouped queries, and in each layer the two best of
/// eight SwiGLU experts, weighted by the softmax over their two logits. Attention is full: the
/// released models have no window.
struct MixtralConfig {
  ModelShape shape;
  double norm_epsilon = 1e-5;
  double balance = 0.02;  ///< Of Hugging Face's config; a mean over the layers.
};

}  // namespace weir::presets
