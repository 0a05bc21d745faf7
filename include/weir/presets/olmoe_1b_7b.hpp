// SPDX-License-Identifier: MIT
/// \file
/// OLMoE-1B-7B (Muennighoff et al. 2024, arXiv:2409.02060).
#pragma once

#include <concepts>

#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// A decoder whose queries and keys are normalised over their whole width, with the eight best of
/// 64 narrow SwiGLU experts in each layer, weighted by their raw probabilities.
struct OlmoeConfig {
  ModelShape shape;
  double norm_epsilon = 1e-5;
  bool renormalise = false;  ///< Whether the probabilities are divided by their sum.
  double balance = 0.01;     ///< For the mean over the layers, see per_layer, as z_loss is.
  double z_loss = 0.001;

  bool operator==(const OlmoeConfig&) const = default;
};

/// 6.9 billion parameters, of which 1.3 are active. (Muennighoff et al. 2024, arXiv:2409.02060;
/// the experts of the checkpoint are 1024 wide, not 2048 as the default of Hugging Face's
/// class says.)
inline OlmoeConfig olmoe_1b_7b() {
  return {.shape = {
              .layers = 16,
              .d_model = 2048,
              .vocab = 50304,
              .attention = GroupedQueryConfig{.heads = 16,
                                              .kv_heads = 16,
                                              .head_dim = 128,
                                              .qk_norm = QkNorm::kFull,
                                              .qk_norm_epsilon = 1e-5},
              .experts = 64,
              .k = 8,
              .d_hidden = 1024,
          }};
}

/// \throws ConfigError  if a size is out of range.
template <std::floating_point T>
Decoder<T> make(const OlmoeConfig& config, Rng& rng) {
  const ModelShape& shape = config.shape;
  Parts<T> parts = usual_parts<T>(shape, config.norm_epsilon, rng);
  parts.mixture = [&] {
    return MoELayer{LinearRouter<T>(shape.d_model, shape.experts, rng),
                    SoftmaxTopK<T>({.k = shape.k, .renormalise = config.renormalise}),
                    Dropless(),
                    gated_experts<T>(shape, rng),
                    SwitchLoss<T>({.coefficient = per_layer(config.balance, shape)}),
                    ZLoss<T>({.coefficient = per_layer(config.z_loss, shape)})};
  };
  return compose<T>(shape, parts, rng);
}

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(const weir::presets::OlmoeConfig&,
                                                                weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(const weir::presets::OlmoeConfig&,
                                                                  weir::Rng&);
#endif
