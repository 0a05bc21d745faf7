// SPDX-License-Identifier: MIT
/// \file
/// DBRX (Databricks 2024).
#pragma once

#include <array>
#include <concepts>

#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/layer_norm.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::presets {

/// A decoder with layer norms without bias, clipped queries, keys and values, and the four best of
/// sixteen SwiGLU experts, whose probabilities are divided by their sum.
struct DbrxConfig {
  ModelShape shape;
  double norm_epsilon = 1e-5;
  double weight_norm = 1.0;  ///< p: weights are divided by their p-norm; 0: not at all.
  double balance = 0.05;     ///< For the mean over the layers, see per_layer.

  bool operator==(const DbrxConfig&) const = default;
};

/// 132 billion parameters, of which 36 are active. (Databricks 2024, "Introducing DBRX";
/// huggingface.co/databricks/dbrx-base.)
inline DbrxConfig dbrx() {
  return {
      .shape = {
          .layers = 40,
          .d_model = 6144,
          .vocab = 100352,
          .attention =
              GroupedQueryConfig{
                  .heads = 48, .kv_heads = 8, .head_dim = 128, .rope_theta = 5e5, .clip_qkv = 8.0},
          .experts = 16,
          .k = 4,
          .d_hidden = 10752,
      }};
}

/// \throws ConfigError  if a size is out of range.
template <std::floating_point T>
Decoder<T> make(const DbrxConfig& config, Rng& rng) {
  const ModelShape& shape = config.shape;
  Parts<T> parts = usual_parts<T>(shape, config.norm_epsilon, rng);
  parts.norm = [&] {
    return LayerNorm<T>(shape.d_model, {.epsilon = config.norm_epsilon, .bias = false});
  };
  parts.mixture = [&] {
    return MoELayer{LinearRouter<T>(shape.d_model, shape.experts, rng),
                    SoftmaxTopK<T>({.k = shape.k,
                                    .renormalise = config.weight_norm != 0.0,
                                    .norm = config.weight_norm != 0.0 ? config.weight_norm : 1.0}),
                    Dropless(), gated_experts<T>(shape, rng),
                    SwitchLoss<T>({.coefficient = per_layer(config.balance, shape),
                                   .fraction = LoadFraction::kOfTokens})};
  };
  return compose<T>(shape, parts, rng);
}

/// DBRX's checkpoints, in which the experts of a layer stand on top of each other.
inline constexpr auto kDbrxNames = std::to_array<TensorName>({
    {"embedding.weight", "transformer.wte.weight"},
    {"norm.weight", "transformer.norm_f.weight", {.vector = true}},
    {"head.weight", "lm_head.weight"},
    {"layers.{l}.attention_norm.weight",
     "transformer.blocks.{l}.norm_attn_norm.norm_1.weight",
     {.vector = true}},
    {"layers.{l}.moe_norm.weight",
     "transformer.blocks.{l}.norm_attn_norm.norm_2.weight",
     {.vector = true}},
    {"layers.{l}.attention.query", "transformer.blocks.{l}.norm_attn_norm.attn.Wqkv.weight"},
    {"layers.{l}.attention.key", "transformer.blocks.{l}.norm_attn_norm.attn.Wqkv.weight"},
    {"layers.{l}.attention.value", "transformer.blocks.{l}.norm_attn_norm.attn.Wqkv.weight"},
    {"layers.{l}.attention.output", "transformer.blocks.{l}.norm_attn_norm.attn.out_proj.weight"},
    {"layers.{l}.moe.router.weight", "transformer.blocks.{l}.ffn.router.layer.weight"},
    {"layers.{l}.moe.experts.{e}.gate",
     "transformer.blocks.{l}.ffn.experts.mlp.w1",
     {.flat = true}},
    {"layers.{l}.moe.experts.{e}.up", "transformer.blocks.{l}.ffn.experts.mlp.v1", {.flat = true}},
    {"layers.{l}.moe.experts.{e}.down",
     "transformer.blocks.{l}.ffn.experts.mlp.w2",
     {.transposed = true, .flat = true}},
});

/// DBRX in GGUF files. To be looked at before kGgufNames.
inline constexpr auto kDbrxGgufNames = std::to_array<TensorName>({
    {"layers.{l}.moe_norm.weight", "blk.{l}.attn_output_norm.weight", {.vector = true}},
});

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(const weir::presets::DbrxConfig&,
                                                                weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(const weir::presets::DbrxConfig&,
                                                                  weir::Rng&);
#endif
