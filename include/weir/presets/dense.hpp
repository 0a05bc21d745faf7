// SPDX-License-Identifier: MIT
/// \file
/// Dense decoders since Llama (Touvron et al. 2023, arXiv:2302.13971): Llama, Mistral, Qwen3. They
/// are where mixtures are made from (upcycling), and what they are compared with.
#pragma once

#include <concepts>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/error.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/ops/llama3_scaling.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// Root mean square norms, rotary positions, grouped queries, and a SwiGLU network in each layer.
/// Which of the families it is follows from its attention.
struct DenseConfig {
  ModelShape shape;
  double norm_epsilon = 1e-5;

  bool operator==(const DenseConfig&) const = default;
};

/// 8.0 billion parameters. (Llama Team 2024, arXiv:2407.21783, table 3; version 3.1.)
inline DenseConfig llama_3_1_8b() {
  return {.shape = {
              .layers = 32,
              .d_model = 4096,
              .vocab = 128256,
              .attention = GroupedQueryConfig{.heads = 32,
                                              .kv_heads = 8,
                                              .head_dim = 128,
                                              .rope_theta = 5e5,
                                              .rope_scaling = Llama3Scaling{}},
              .dense_hidden = 14336,
          }};
}

/// 7.2 billion parameters. (Jiang et al. 2023, arXiv:2310.06825, table 1; version 0.1, the only one
/// with a window.)
inline DenseConfig mistral_7b() {
  return {.shape = {
              .layers = 32,
              .d_model = 4096,
              .vocab = 32000,
              .attention =
                  GroupedQueryConfig{.heads = 32, .kv_heads = 8, .head_dim = 128, .window = 4096},
              .dense_hidden = 14336,
          }};
}

/// 8.2 billion parameters. (Yang et al. 2025, arXiv:2505.09388, table 1.)
inline DenseConfig qwen3_8b() {
  return {.shape =
              {
                  .layers = 36,
                  .d_model = 4096,
                  .vocab = 151936,
                  .attention = GroupedQueryConfig{.heads = 32,
                                                  .kv_heads = 8,
                                                  .head_dim = 128,
                                                  .rope_theta = 1e6,
                                                  .qk_norm = QkNorm::kPerHead},
                  .dense_hidden = 12288,
              },
          .norm_epsilon = 1e-6};
}

/// \throws ConfigError  if a size is out of range, or the shape has experts.
template <std::floating_point T>
Decoder<T> make(const DenseConfig& config, Rng& rng) {
  if (config.shape.experts != 0) {
    throw_error<ConfigError>("DenseConfig: experts = ", config.shape.experts, ", expected 0");
  }
  return compose<T>(config.shape, usual_parts<T>(config.shape, config.norm_epsilon, rng), rng);
}

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(const weir::presets::DenseConfig&,
                                                                weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(const weir::presets::DenseConfig&,
                                                                  weir::Rng&);
#endif
