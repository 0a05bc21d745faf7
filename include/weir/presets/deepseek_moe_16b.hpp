// SPDX-License-Identifier: MIT
/// \file
/// DeepSeekMoE-16B (Dai et al. 2024, arXiv:2401.06066).
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

/// Multi-head attention and, behind one dense layer, the six best of 64 narrow SwiGLU experts,
/// weighted by their raw probabilities, beside two that every token visits.
struct DeepSeekMoEConfig {
  ModelShape shape;
  double norm_epsilon = 1e-6;
  bool renormalise = false;  ///< Whether the probabilities are divided by their sum.
  double balance = 0.001;    ///< Coefficient of the loss in each sequence and layer.

  bool operator==(const DeepSeekMoEConfig&) const = default;
};

/// 16.4 billion parameters, of which 2.8 are active. (Dai et al. 2024, arXiv:2401.06066,
/// section 5.)
inline DeepSeekMoEConfig deepseek_moe_16b() {
  return {.shape = {
              .layers = 28,
              .d_model = 2048,
              .vocab = 102400,
              .attention = GroupedQueryConfig{.heads = 16, .kv_heads = 16, .head_dim = 128},
              .interleave = {.first_dense = 1},
              .experts = 64,
              .k = 6,
              .d_hidden = 1408,
              .shared_hidden = 2 * Index(1408),
              .dense_hidden = 10944,
          }};
}

/// \throws ConfigError  if a size is out of range.
template <std::floating_point T>
Decoder<T> make(const DeepSeekMoEConfig& config, Rng& rng) {
  const ModelShape& shape = config.shape;
  Parts<T> parts = usual_parts<T>(shape, config.norm_epsilon, rng);
  parts.mixture = [&] {
    return with_shared(
        shape,
        MoELayer{LinearRouter<T>(shape.d_model, shape.experts, rng),
                 SoftmaxTopK<T>({.k = shape.k, .renormalise = config.renormalise}), Dropless(),
                 gated_experts<T>(shape, rng),
                 SwitchLoss<T>({.coefficient = config.balance, .scope = Scope::kSequence})},
        rng);
  };
  return compose<T>(shape, parts, rng);
}

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(
    const weir::presets::DeepSeekMoEConfig&, weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(
    const weir::presets::DeepSeekMoEConfig&, weir::Rng&);
#endif
