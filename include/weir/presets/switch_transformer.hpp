// SPDX-License-Identifier: MIT
/// \file
/// The Switch Transformer (Fedus et al. 2021, arXiv:2101.03961).
#pragma once

#include <concepts>
#include <utility>

#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/ops/activation.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// T5 with the best expert, weighted by its raw probability, in every other layer.
///
/// An encoder-decoder: `count` counts the published model, and `make` builds its decoder half,
/// which cannot share with it
///
/// - the attention to an encoder between self-attention and network, and with it the task: the half
///   is a language model, the published model fills gaps of a text that the encoder reads;
/// - the bias by relative distance that T5 adds to scores, one table of 32 buckets for all layers:
///   rotary positions take its place, so that published weights of attention would not fit;
/// - the dropout of layers and experts.
///
/// Capacities are those of the sizes' configurations in Flaxformer (t5x/configs/moe/models), which
/// names no jitter, and rounds a capacity to the nearest number; here both are as in Mesh
/// TensorFlow, in which the models were trained.
struct SwitchConfig {
  ModelShape shape;
  double norm_epsilon = 1e-6;
  double capacity_train = 1.25;  ///< A multiple of tokens / experts.
  double capacity_evaluate = 2.0;
  Index capacity_minimum = 4;  ///< Tokens that an expert takes at least.
  Index group_size = 8192;     ///< Tokens that share a capacity.
  double jitter = 0.01;
  double balance = 0.01;
};

namespace detail {

/// A T5 with the same number of layers in encoder and decoder, and 32 buckets of positions.
inline ModelShape t5_shape(Index layers, Index d_model, Index heads, Index head_dim, Index d_hidden,
                           Index stride, Index experts, Index k) {
  return {
      .layers = layers,
      .d_model = d_model,
      .vocab = 32128,
      .attention = t5_attention(heads, head_dim),
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

/// The decoder half, see SwitchConfig.
/// \throws ConfigError  if a size is out of range.
template <std::floating_point T>
Decoder<T> make(const SwitchConfig& config, Rng& rng) {
  const ModelShape shape = config.shape.decoder_half();
  constexpr double kInitScale = 0.1;  // Fedus et al. 2021, section 2.4.
  Parts<T> parts = usual_parts<T, GeluTanh>(shape, config.norm_epsilon, rng, kInitScale);
  parts.embedding = kT5Embedding;
  parts.mixture = [&] {
    JitterRouter router(LinearRouter<T>(shape.d_model, shape.experts, rng),
                        {.epsilon = config.jitter});
    return with_experts<T, GeluTanh>(shape, rng, kInitScale, [&](auto experts) {
      return MoELayer(std::move(router), SoftmaxTopK<T>({.k = shape.k}),
                      CapacityFactor({.train = config.capacity_train,
                                      .evaluate = config.capacity_evaluate,
                                      .count_k = false,
                                      .rounding = Rounding::kDown,
                                      .minimum = config.capacity_minimum,
                                      .group_size = config.group_size}),
                      std::move(experts), SwitchLoss<T>({.coefficient = config.balance}));
    });
  };
  return compose<T>(shape, parts, rng, t5_head(shape));
}

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(const weir::presets::SwitchConfig&,
                                                                weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(
    const weir::presets::SwitchConfig&, weir::Rng&);
#endif
