// SPDX-License-Identifier: MIT
/// \file
/// ERNIE 4.5's text mixtures (Baidu 2025, "ERNIE 4.5 Technical Report").
#pragma once

#include <array>
#include <concepts>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/biased_probability_top_k.hpp>
#include <weir/ops/rope.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::presets {

/// A decoder that rotates neighbouring numbers and has, behind one dense layer, the six best of 64
/// narrow SwiGLU experts by biased probabilities, which are divided by their sum, beside two that
/// every token visits.
struct ErnieMoeConfig {
  ModelShape shape;
  double norm_epsilon = 1e-5;
  double bias_rate = 0.001;
  /// As in Hugging Face's config, for the mean over the layers, see per_layer.
  double balance = 0.001;

  bool operator==(const ErnieMoeConfig&) const = default;
};

/// ERNIE-4.5-21B-A3B: 21.8 billion parameters, of which 3.3 are active.
/// (huggingface.co/baidu/ERNIE-4.5-21B-A3B-PT.)
inline ErnieMoeConfig ernie_4_5_21b_a3b() {
  return {.shape = {
              .layers = 28,
              .d_model = 2560,
              .vocab = 103424,
              .tied = true,
              .attention = GroupedQueryConfig{.heads = 20,
                                              .kv_heads = 4,
                                              .head_dim = 128,
                                              .rope_theta = 5e5,
                                              .rope_layout = RopeLayout::kInterleaved},
              .interleave = {.first_dense = 1},
              .experts = 64,
              .k = 6,
              .d_hidden = 1536,
              .selection_bias = true,
              .shared_hidden = Index{2} * 1536,
              .dense_hidden = 12288,
          }};
}

/// \throws ConfigError  if a size is out of range.
template <std::floating_point T>
Decoder<T> make(const ErnieMoeConfig& config, Rng& rng) {
  const ModelShape& shape = config.shape;
  Parts<T> parts = usual_parts<T>(shape, config.norm_epsilon, rng);
  parts.mixture = [&] {
    return with_shared(
        shape,
        MoELayer{LinearRouter<T>(shape.d_model, shape.experts, rng),
                 BiasedProbabilityTopK<T>(shape.experts, {.k = shape.k}), Dropless(),
                 gated_experts<T>(shape, rng), BiasBalance<T>({.rate = config.bias_rate}),
                 SwitchLoss<T>({.coefficient = per_layer(config.balance, shape),
                                .fraction = LoadFraction::kOfTokens})},
        rng);
  };
  return compose<T>(shape, parts, rng);
}

/// The bias of the selection in ERNIE's checkpoints, a matrix with one row.
inline constexpr auto kErnieBiasNames = std::to_array<TensorName>({
    {"layers.{l}.moe.selector.bias", "model.layers.{l}.mlp.moe_statics.e_score_correction_bias"},
});

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(
    const weir::presets::ErnieMoeConfig&, weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(
    const weir::presets::ErnieMoeConfig&, weir::Rng&);
#endif
