// SPDX-License-Identifier: MIT
/// \file
/// Mixtral: the architecture of Mistral with a mixture of eight experts in every layer
/// (Jiang et al. 2024, arXiv:2401.04088).
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
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::presets {

/// Root mean square norms, rotary positions, grouped queries, and in each layer the two best of
/// eight SwiGLU experts, weighted by the softmax over their two logits. Attention is full: the
/// released models have no window.
struct MixtralConfig {
  ModelShape shape;
  double norm_epsilon = 1e-5;
  /// As in Hugging Face's config, for the mean over the layers, see per_layer.
  double balance = 0.02;

  bool operator==(const MixtralConfig&) const = default;
};

/// \throws ConfigError  if a size is out of range.
template <std::floating_point T>
Decoder<T> make(const MixtralConfig& config, Rng& rng) {
  const ModelShape& shape = config.shape;
  Parts<T> parts = usual_parts<T>(shape, config.norm_epsilon, rng);
  parts.mixture = [&] {
    return MoELayer{LinearRouter<T>(shape.d_model, shape.experts, rng),
                    TopKSoftmax<T>({.k = shape.k}), Dropless(), gated_experts<T>(shape, rng),
                    SwitchLoss<T>({.coefficient = per_layer(config.balance, shape),
                                   .fraction = LoadFraction::kOfTokens})};
  };
  return compose<T>(shape, parts, rng);
}

/// The mixture in Mixtral's checkpoints.
inline constexpr auto kMixtralNames = std::to_array<TensorName>({
    {"layers.{l}.moe.router.weight", "model.layers.{l}.block_sparse_moe.gate.weight"},
    {"layers.{l}.moe.experts.{e}.gate", "model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight"},
    {"layers.{l}.moe.experts.{e}.up", "model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight"},
    {"layers.{l}.moe.experts.{e}.down", "model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight"},
});

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(const weir::presets::MixtralConfig&,
                                                                weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(
    const weir::presets::MixtralConfig&, weir::Rng&);
#endif
