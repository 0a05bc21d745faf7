// SPDX-License-Identifier: MIT
/// \file
/// Granite's mixtures (IBM Granite Team 2024, "Granite 3.0 Language Models").
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
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::presets {

/// A decoder with multipliers on the embedding, the scores, what each branch adds, and the logits,
/// and the eight best of many narrow SwiGLU experts, weighted by the softmax over their logits. The
/// factor of the scores is `scale` of its attention.
struct GraniteMoeConfig {
  ModelShape shape;
  double norm_epsilon = 1e-6;
  double embedding_multiplier = 12.0;
  double residual_multiplier = 0.22;
  double logits_scaling = 6.0;  ///< What logits are divided by.
  /// As in Hugging Face's config, for the mean over the layers, see per_layer.
  double balance = 0.001;

  bool operator==(const GraniteMoeConfig&) const = default;
};

/// Granite 3.1 1B-A400M: 1.3 billion parameters, of which 0.4 are active. (IBM 2024;
/// huggingface.co/ibm-granite/granite-3.1-1b-a400m-base.)
inline GraniteMoeConfig granite_3_1_1b_a400m() {
  return {.shape = {
              .layers = 24,
              .d_model = 1024,
              .vocab = 49155,
              .tied = true,
              .attention = GroupedQueryConfig{.heads = 16,
                                              .kv_heads = 8,
                                              .head_dim = 64,
                                              .rope_theta = 1.5e6,
                                              .scale = 0.015625},
              .experts = 32,
              .k = 8,
              .d_hidden = 512,
          }};
}

/// \throws ConfigError  if a size is out of range.
template <std::floating_point T>
Decoder<T> make(const GraniteMoeConfig& config, Rng& rng) {
  const ModelShape& shape = config.shape;
  expect_positive("GraniteMoeConfig", "logits_scaling", config.logits_scaling);
  Parts<T> parts = usual_parts<T>(shape, config.norm_epsilon, rng);
  parts.residual_multiplier = config.residual_multiplier;
  parts.mixture = [&] {
    return MoELayer{LinearRouter<T>(shape.d_model, shape.experts, rng),
                    TopKSoftmax<T>({.k = shape.k}), Dropless(), gated_experts<T>(shape, rng),
                    SwitchLoss<T>({.coefficient = per_layer(config.balance, shape),
                                   .fraction = LoadFraction::kOfTokens})};
  };
  return compose<T>(shape, parts, rng,
                    {.embedding_multiplier = config.embedding_multiplier,
                     .logit_multiplier = 1.0 / config.logits_scaling});
}

/// The mixture in Granite's checkpoints, with all experts in one tensor.
inline constexpr auto kGraniteMoeNames = std::to_array<TensorName>({
    {"layers.{l}.moe.router.weight", "model.layers.{l}.block_sparse_moe.router.layer.weight"},
    {"layers.{l}.moe.experts.{e}.gate", "model.layers.{l}.block_sparse_moe.input_linear.weight"},
    {"layers.{l}.moe.experts.{e}.up", "model.layers.{l}.block_sparse_moe.input_linear.weight"},
    {"layers.{l}.moe.experts.{e}.down", "model.layers.{l}.block_sparse_moe.output_linear.weight"},
});

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(
    const weir::presets::GraniteMoeConfig&, weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(
    const weir::presets::GraniteMoeConfig&, weir::Rng&);
#endif
