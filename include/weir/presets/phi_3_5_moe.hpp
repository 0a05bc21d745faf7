// SPDX-License-Identifier: MIT
/// \file
/// Phi-3.5-MoE (Abdin et al. 2024, arXiv:2404.14219; Liu et al. 2024, arXiv:2409.12136).
#pragma once

#include <array>
#include <concepts>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/error.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sparse_mixer.hpp>
#include <weir/nn/layer_norm.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::presets {

/// A decoder with layer norms, biases of attention and head, and two of sixteen SwiGLU experts,
/// chosen one after the other by SparseMixer.
struct PhiMoeConfig {
  ModelShape shape;
  double norm_epsilon = 1e-5;
  double router_epsilon = 0.01;  ///< Of SparseMixer.
  /// As in Hugging Face's config, for the mean over the layers, see per_layer.
  double balance = 0.0;

  bool operator==(const PhiMoeConfig&) const = default;
};

/// 41.9 billion parameters, of which 6.6 are active. (arXiv:2404.14219, section 5.) The released
/// model stretches its positions by LongRopeScaling, whose factors its config.json has.
inline PhiMoeConfig phi_3_5_moe() {
  return {.shape = {
              .layers = 32,
              .d_model = 4096,
              .vocab = 32064,
              .attention = GroupedQueryConfig{.heads = 32,
                                              .kv_heads = 8,
                                              .head_dim = 128,
                                              .qkv_bias = true,
                                              .output_bias = true,
                                              .window = 131072},
              .norm_bias = true,
              .head_bias = true,
              .experts = 16,
              .k = 2,
              .d_hidden = 6400,
          }};
}

/// \throws ConfigError  if a size is out of range, or unless k is 2.
template <std::floating_point T>
Decoder<T> make(const PhiMoeConfig& config, Rng& rng) {
  const ModelShape& shape = config.shape;
  if (shape.k != 2) throw_error<ConfigError>("PhiMoeConfig: k = ", shape.k, ", expected 2");
  Parts<T> parts = usual_parts<T>(shape, config.norm_epsilon, rng);
  parts.norm = [&] {
    return LayerNorm<T>(shape.d_model, {.epsilon = config.norm_epsilon, .bias = shape.norm_bias});
  };
  parts.mixture = [&] {
    return MoELayer{LinearRouter<T>(shape.d_model, shape.experts, rng),
                    SparseMixer<T>({.epsilon = config.router_epsilon}), Dropless(),
                    gated_experts<T>(shape, rng),
                    SwitchLoss<T>({.coefficient = per_layer(config.balance, shape),
                                   .fraction = LoadFraction::kOfTokens})};
  };
  return compose<T>(shape, parts, rng);
}

/// The biases of norms and head in Phi-3.5-MoE's checkpoints. The mixture has Mixtral's names.
inline constexpr auto kPhiMoeBiasNames = std::to_array<TensorName>({
    {"norm.bias", "model.norm.bias", {.vector = true}},
    {"head.bias", "lm_head.bias", {.vector = true}},
    {"layers.{l}.attention_norm.bias", "model.layers.{l}.input_layernorm.bias", {.vector = true}},
    {"layers.{l}.moe_norm.bias",
     "model.layers.{l}.post_attention_layernorm.bias",
     {.vector = true}},
});

/// The same in GGUF files. To be looked at before kGgufNames.
inline constexpr auto kPhiMoeGgufNames = std::to_array<TensorName>({
    {"norm.bias", "output_norm.bias", {.vector = true}},
    {"head.bias", "output.bias", {.vector = true}},
    {"layers.{l}.attention_norm.bias", "blk.{l}.attn_norm.bias", {.vector = true}},
    {"layers.{l}.moe_norm.bias", "blk.{l}.ffn_norm.bias", {.vector = true}},
});

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(const weir::presets::PhiMoeConfig&,
                                                                weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(
    const weir::presets::PhiMoeConfig&, weir::Rng&);
#endif
