// SPDX-License-Identifier: MIT
/// \file
/// OpenMoE (Xue et al. 2024, arXiv:2402.01739).
#pragma once

#include <concepts>
#include <utility>

#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// Multi-head attention and, in every fourth or sixth layer, the two best experts weighted by their
/// raw probabilities, with a dense network behind them; the other layers are dense.
///
/// The paper and the released code do not agree. The paper's totals are those of gated networks
/// with three matrices and of a tied embedding, without norms and routers. The code has a fourth
/// matrix and a separate output head (see `openmoe_released`), and puts the dense network behind
/// the mixture, which is the default here. The penalty of 1e-4 to 1e-3 on the normaliser of the
/// output belongs to the training, see CrossEntropy.
struct OpenMoEConfig {
  ModelShape shape;
  double norm_epsilon = 1e-6;
  double capacity_train = 1.25;  ///< A multiple of tokens / experts.
  double capacity_evaluate = 2.0;
  Index group_size = 4096;  ///< Tokens that share a capacity.
  bool parallel = false;    ///< Whether the dense network is beside the mixture, as in equation 4.
  double balance = 0.01;    ///< Of the mean over the sparse layers, see per_layer.
  double z_loss = 1e-4;     ///< Of the mean over the sparse layers.
};

/// The model as in the released code: with networks of four matrices and a separate output head.
inline OpenMoEConfig openmoe_released(OpenMoEConfig config) {
  config.shape.network = Network::kOpenMoE;
  config.shape.tied = false;
  return config;
}

namespace detail {

/// The shape of all OpenMoE models: multi-head attention, and networks that are all equally wide.
inline ModelShape openmoe_shape(Index layers, Index d_model, Index heads, Index head_dim,
                                Index d_hidden, Index stride, Index experts) {
  return {
      .layers = layers,
      .d_model = d_model,
      .vocab = 256384,
      .tied = true,
      .attention = t5_attention(heads, head_dim),
      .interleave = {.stride = stride},
      .experts = experts,
      .k = 2,
      .d_hidden = d_hidden,
      .dense_hidden = d_hidden,
      .extra_hidden = d_hidden,
  };
}

}  // namespace detail

/// See OpenMoEConfig.
/// \throws ConfigError  if a size is out of range.
template <std::floating_point T>
Decoder<T> make(const OpenMoEConfig& config, Rng& rng) {
  const ModelShape& shape = config.shape;
  constexpr double kInitScale = 0.1;
  Parts<T> parts = usual_parts<T>(shape, config.norm_epsilon, rng, kInitScale);
  parts.parallel = config.parallel;
  parts.embedding = kT5Embedding;
  parts.mixture = [&] {
    LinearRouter<T> router(shape.d_model, shape.experts, rng);
    return with_experts<T>(shape, rng, kInitScale, [&](auto experts) {
      return MoELayer(std::move(router), SoftmaxTopK<T>({.k = shape.k}),
                      CapacityFactor({.train = config.capacity_train,
                                      .evaluate = config.capacity_evaluate,
                                      .count_k = false,
                                      .rounding = Rounding::kNearest,
                                      .group_size = config.group_size}),
                      std::move(experts),
                      SwitchLoss<T>({.coefficient = per_layer(config.balance, shape),
                                     .fraction = LoadFraction::kOfTokens}),
                      ZLoss<T>({.coefficient = per_layer(config.z_loss, shape)}));
    });
  };
  return compose<T>(shape, parts, rng, t5_head(shape));
}

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(const weir::presets::OpenMoEConfig&,
                                                                weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(
    const weir::presets::OpenMoEConfig&, weir::Rng&);
#endif
