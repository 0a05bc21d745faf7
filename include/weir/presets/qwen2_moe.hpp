// SPDX-License-Identifier: MIT
/// \file
/// Qwen2-MoE (Yang et al. 2024, arXiv:2407.10671), first published as Qwen1.5-MoE.
#pragma once

#include <array>
#include <concepts>

#include <weir/attention/grouped_query.hpp>
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
#include <weir/presets/tensor_names.hpp>

namespace weir::presets {

/// A decoder whose queries, keys and values have biases, with the best of many narrow SwiGLU
/// experts in each layer, weighted by their raw probabilities, beside one that every token visits,
/// multiplied by a sigmoid of its own.
struct Qwen2MoeConfig {
  ModelShape shape;
  double norm_epsilon = 1e-6;
  bool renormalise = false;  ///< Whether the probabilities are divided by their sum.
  /// As in Hugging Face's config, for the mean over the layers, see per_layer.
  double balance = 0.001;

  bool operator==(const Qwen2MoeConfig&) const = default;
};

/// Qwen1.5-MoE-A2.7B: 14.3 billion parameters, of which 2.7 are active. (Qwen Team 2024,
/// "Qwen1.5-MoE: Matching 7B Model Performance with 1/3 Activated Parameters".)
inline Qwen2MoeConfig qwen1_5_moe_a2_7b() {
  return {.shape = {
              .layers = 24,
              .d_model = 2048,
              .vocab = 151936,
              .attention = GroupedQueryConfig{.heads = 16,
                                              .kv_heads = 16,
                                              .head_dim = 128,
                                              .rope_theta = 1e6,
                                              .qkv_bias = true},
              .experts = 60,
              .k = 4,
              .d_hidden = 1408,
              .shared_hidden = 5632,
              .shared_gate = true,
          }};
}

/// \throws ConfigError  if a size is out of range.
template <std::floating_point T>
Decoder<T> make(const Qwen2MoeConfig& config, Rng& rng) {
  const ModelShape& shape = config.shape;
  Parts<T> parts = usual_parts<T>(shape, config.norm_epsilon, rng);
  parts.mixture = [&] {
    return with_shared(shape,
                       MoELayer{LinearRouter<T>(shape.d_model, shape.experts, rng),
                                SoftmaxTopK<T>({.k = shape.k, .renormalise = config.renormalise}),
                                Dropless(), gated_experts<T>(shape, rng),
                                SwitchLoss<T>({.coefficient = per_layer(config.balance, shape),
                                               .fraction = LoadFraction::kOfTokens})},
                       rng);
  };
  return compose<T>(shape, parts, rng);
}

/// The shared expert in Qwen2-MoE's checkpoints.
inline constexpr auto kQwen2SharedExpertNames = std::to_array<TensorName>({
    {"layers.{l}.moe.shared.gate", "model.layers.{l}.mlp.shared_expert.gate_proj.weight"},
    {"layers.{l}.moe.shared.up", "model.layers.{l}.mlp.shared_expert.up_proj.weight"},
    {"layers.{l}.moe.shared.down", "model.layers.{l}.mlp.shared_expert.down_proj.weight"},
    {"layers.{l}.moe.shared_gate.weight", "model.layers.{l}.mlp.shared_expert_gate.weight"},
});

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(
    const weir::presets::Qwen2MoeConfig&, weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(
    const weir::presets::Qwen2MoeConfig&, weir::Rng&);
#endif
