// SPDX-License-Identifier: MIT
/// \file
/// ST-MoE-32B (Zoph et al. 2022, arXiv:2202.08906).
#pragma once

#include <concepts>

#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/ops/activation.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/switch_transformer.hpp>

namespace weir::presets {

/// T5 with GELU-gated networks and, in every fourth layer, the two best experts weighted by their
/// raw probabilities, with a dense network behind them.
///
/// An encoder-decoder: `count` counts the published model, and `make` builds its decoder half,
/// which cannot share with it
///
/// - the attention to an encoder between self-attention and network, and with it the task: the half
///   is a language model, the published model fills gaps of a text that the encoder reads;
/// - the bias by relative distance that T5 adds to scores, one table of 32 buckets for all layers:
///   rotary positions take its place, so that published weights of attention would not fit;
/// - the dropout of layers and experts.
struct StMoEConfig {
  ModelShape shape;
  double norm_epsilon = 1e-6;
  double capacity_train = 1.25;  ///< A multiple of tokens / experts.
  double capacity_evaluate = 2.0;
  Index group_size = 4096;  ///< Tokens that share a capacity.
  double balance = 0.01;
  double z_loss = 0.001;
};

/// 269 billion parameters, as expensive as 32 dense ones. (Zoph et al. 2022, arXiv:2202.08906; the
/// total includes the dense network behind each mixture.)
inline StMoEConfig st_moe_32b() {
  ModelShape shape = detail::t5_shape(24, 5120, 64, 128, 20480, 4, 64, 2);
  shape.extra_hidden = 20480;
  return {.shape = shape};
}

/// The decoder half, see StMoEConfig.
/// \throws ConfigError  if a size is out of range.
template <std::floating_point T>
Decoder<T> make(const StMoEConfig& config, Rng& rng) {
  const ModelShape shape = config.shape.decoder_half();
  constexpr double kInitScale = 0.1;
  Parts<T> parts = usual_parts<T, GeluTanh>(shape, config.norm_epsilon, rng, kInitScale);
  parts.embedding = kT5Embedding;
  parts.mixture = [&] {
    return MoELayer{
        LinearRouter<T>(shape.d_model, shape.experts, rng),
        SoftmaxTopK<T>({.k = shape.k}),
        CapacityFactor({.train = config.capacity_train,
                        .evaluate = config.capacity_evaluate,
                        .count_k = false,
                        .rounding = Rounding::kNearest,
                        .group_size = config.group_size}),
        gated_experts<T, GeluTanh>(shape, rng, kInitScale),
        SwitchLoss<T>({.coefficient = config.balance, .fraction = LoadFraction::kOfTokens}),
        ZLoss<T>({.coefficient = config.z_loss})};
  };
  return compose<T>(shape, parts, rng, t5_head(shape));
}

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(const weir::presets::StMoEConfig&,
                                                                weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(const weir::presets::StMoEConfig&,
                                                                  weir::Rng&);
#endif
