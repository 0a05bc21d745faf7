// SPDX-License-Identifier: MIT
/// \file
/// Grok-1 (xAI 2024).
#pragma once

#include <array>
#include <cmath>
#include <concepts>

#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/ops/activation.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/scaled.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::presets {

/// A decoder whose branches have a norm before and one behind them, with soft-capped attention
/// scores, the two best of eight GELU-gated experts weighted by their raw probabilities, and
/// multipliers on the tied embedding and the logits. The released router starts at zero, which
/// sends every token to the first two experts; the router of `make` starts at random.
struct GrokConfig {
  ModelShape shape;
  double norm_epsilon = 1e-5;
  double embedding_multiplier = 78.38367176906169;  ///< The root of d_model = 6144.
  double logit_multiplier = 0.5773502691896257;     ///< 1 / sqrt(3).
  bool renormalise = false;  ///< Whether the probabilities are divided by their sum.
  double balance = 0.0;      ///< Not published.

  bool operator==(const GrokConfig&) const = default;
};

/// "314 billion parameters, 25 % of which are active": 314.9 without the embedding.
/// (github.com/xai-org/grok-1, run.py and model.py.)
inline GrokConfig grok_1() {
  return {.shape = {
              .layers = 64,
              .d_model = 6144,
              .vocab = 131072,
              .tied = true,
              .attention =
                  GroupedQueryConfig{.heads = 48, .kv_heads = 8, .head_dim = 128, .softcap = 30.0},
              .post_norms = true,
              .experts = 8,
              .k = 2,
              .d_hidden = 32768,
          }};
}

/// Does what `scaled` does with all presets; the embedding's multiplier stays the root of d_model.
inline GrokConfig scaled(GrokConfig config, const Scale& to = {}) {
  config.shape = scaled(config.shape, to);
  config.embedding_multiplier = std::sqrt(static_cast<double>(to.d_model));
  return config;
}

/// \throws ConfigError  if a size is out of range.
template <std::floating_point T>
Decoder<T> make(const GrokConfig& config, Rng& rng) {
  const ModelShape& shape = config.shape;
  Parts<T> parts = usual_parts<T, GeluTanh>(shape, config.norm_epsilon, rng);
  parts.mixture = [&] {
    return MoELayer{LinearRouter<T>(shape.d_model, shape.experts, rng),
                    SoftmaxTopK<T>({.k = shape.k, .renormalise = config.renormalise}), Dropless(),
                    gated_experts<T, GeluTanh>(shape, rng),
                    SwitchLoss<T>({.coefficient = config.balance})};
  };
  return compose<T>(shape, parts, rng,
                    {.embedding_multiplier = config.embedding_multiplier,
                     .logit_multiplier = config.logit_multiplier});
}

/// Grok-1 as hpcai-tech/grok-1 has ported it to PyTorch.
inline constexpr auto kGrokNames = std::to_array<TensorName>({
    {"embedding.weight", "model.embed_tokens.weight"},
    {"norm.weight", "model.norm.scale", {.vector = true}},
    {"head.weight", "lm_head.weight"},
    {"layers.{l}.attention_norm.weight", "model.layers.{l}.pre_attn_norm.scale", {.vector = true}},
    {"layers.{l}.attention_post_norm.weight",
     "model.layers.{l}.post_attn_norm.scale",
     {.vector = true}},
    {"layers.{l}.moe_norm.weight", "model.layers.{l}.pre_moe_norm.scale", {.vector = true}},
    {"layers.{l}.moe_post_norm.weight", "model.layers.{l}.post_moe_norm.scale", {.vector = true}},
    {"layers.{l}.attention.query", "model.layers.{l}.attn.q_proj.weight"},
    {"layers.{l}.attention.key", "model.layers.{l}.attn.k_proj.weight"},
    {"layers.{l}.attention.value", "model.layers.{l}.attn.v_proj.weight"},
    {"layers.{l}.attention.output", "model.layers.{l}.attn.o_proj.weight"},
    {"layers.{l}.moe.router.weight", "model.layers.{l}.moe_block.gate.weight"},
    {"layers.{l}.moe.experts.{e}.gate", "model.layers.{l}.moe_block.experts.{e}.linear.weight"},
    {"layers.{l}.moe.experts.{e}.up", "model.layers.{l}.moe_block.experts.{e}.linear_v.weight"},
    {"layers.{l}.moe.experts.{e}.down", "model.layers.{l}.moe_block.experts.{e}.linear_1.weight"},
});

/// Grok-1 in GGUF files. To be looked at before kGgufNames.
inline constexpr auto kGrokGgufNames = std::to_array<TensorName>({
    {"layers.{l}.attention_post_norm.weight", "blk.{l}.attn_output_norm.weight", {.vector = true}},
    {"layers.{l}.moe_post_norm.weight", "blk.{l}.layer_output_norm.weight", {.vector = true}},
});

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(const weir::presets::GrokConfig&,
                                                                weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(const weir::presets::GrokConfig&,
                                                                  weir::Rng&);
#endif
