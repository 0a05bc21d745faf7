// SPDX-License-Identifier: MIT
/// \file
/// Qwen3-30B-A3B (Yang et al. 2025, arXiv:2505.09388).
#pragma once

#include <concepts>

#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// A decoder whose queries and keys are normalised head by head, with the eight best of 128 narrow
/// SwiGLU experts in each layer, whose probabilities are divided by their sum.
struct Qwen3Config {
  ModelShape shape;
  double norm_epsilon = 1e-6;
  bool renormalise = true;
  /// As in Hugging Face's config, for the mean over the layers, see per_layer.
  double balance = 0.001;

  bool operator==(const Qwen3Config&) const = default;
};

/// 30.5 billion parameters, of which 3.3 are active. (Yang et al. 2025, arXiv:2505.09388,
/// table 2.)
inline Qwen3Config qwen3_30b_a3b() {
  return {.shape = {
              .layers = 48,
              .d_model = 2048,
              .vocab = 151936,
              .attention = GroupedQueryConfig{.heads = 32,
                                              .kv_heads = 4,
                                              .head_dim = 128,
                                              .rope_theta = 1e6,
                                              .qk_norm = QkNorm::kPerHead},
              .experts = 128,
              .k = 8,
              .d_hidden = 768,
          }};
}

/// \throws ConfigError  if a size is out of range.
template <std::floating_point T>
Decoder<T> make(const Qwen3Config& config, Rng& rng) {
  const ModelShape& shape = config.shape;
  Parts<T> parts = usual_parts<T>(shape, config.norm_epsilon, rng);
  parts.mixture = [&] {
    return MoELayer{LinearRouter<T>(shape.d_model, shape.experts, rng),
                    SoftmaxTopK<T>({.k = shape.k, .renormalise = config.renormalise}), Dropless(),
                    gated_experts<T>(shape, rng),
                    SwitchLoss<T>({.coefficient = per_layer(config.balance, shape),
                                   .fraction = LoadFraction::kOfTokens})};
  };
  return compose<T>(shape, parts, rng);
}

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(const weir::presets::Qwen3Config&,
                                                                weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(const weir::presets::Qwen3Config&,
                                                                  weir::Rng&);
#endif
