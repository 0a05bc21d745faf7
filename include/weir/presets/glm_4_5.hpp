// SPDX-License-Identifier: MIT
/// \file
/// GLM-4.5 (GLM-4.5 Team 2025, arXiv:2508.06471).
#pragma once

#include <array>
#include <concepts>
#include <variant>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/multi_token.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/deepseek_v3.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/prediction.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::presets {

/// Grouped queries of which a half of each head is rotated and, behind dense layers, the mixture of
/// DeepSeek-V3: the best of many narrow SwiGLU experts by biased sigmoids, beside one that every
/// token visits.
struct Glm4MoeConfig {
  ModelShape shape;
  double norm_epsilon = 1e-5;
  bool renormalise = true;  ///< Whether the sigmoids are divided by their sum.
  double scale = 1.0;       ///< The factor of the weights, after that.
  GroupLimit groups = {.count = 1, .allowed = 1, .summed = 2};
  double bias_rate = 0.001;
  double balance = 0.0001;         ///< Coefficient of the loss in each sequence and layer.
  double prediction_weight = 0.3;  ///< The weight of the modules' losses; 0.1 late in the training.

  bool operator==(const Glm4MoeConfig&) const = default;
};

/// GLM-4.5-Air: 106.9 billion parameters, of which 13.4 are active, without the module of
/// multi-token prediction. (arXiv:2508.06471, table 1, which counts 106 and 12.)
inline Glm4MoeConfig glm_4_5_air() {
  return {.shape = {
              .layers = 46,
              .d_model = 4096,
              .vocab = 151552,
              .attention = GroupedQueryConfig{.heads = 96,
                                              .kv_heads = 8,
                                              .head_dim = 128,
                                              .rotary_dim = 64,
                                              .rope_theta = 1e6,
                                              .qkv_bias = true},
              .interleave = {.first_dense = 1},
              .experts = 128,
              .k = 8,
              .d_hidden = 1408,
              .selection_bias = true,
              .shared_hidden = 1408,
              .dense_hidden = 10944,
              .prediction_modules = 1,
          }};
}

/// GLM-4.5: 352.8 billion parameters, of which 33.6 are active, without the module of multi-token
/// prediction. (arXiv:2508.06471, table 1, which counts 355 and 32.)
inline Glm4MoeConfig glm_4_5() {
  Glm4MoeConfig config = glm_4_5_air();
  ModelShape& shape = config.shape;
  shape.layers = 92;
  shape.d_model = 5120;
  auto& attention = std::get<GroupedQueryConfig>(shape.attention);
  attention.qk_norm = QkNorm::kPerHead;
  attention.qk_norm_epsilon = config.norm_epsilon;
  shape.interleave.first_dense = 3;
  shape.experts = 160;
  shape.d_hidden = shape.shared_hidden = 1536;
  shape.dense_hidden = 12288;
  config.scale = 2.5;
  return config;
}

/// The model without its module of multi-token prediction, see `make_prediction`.
/// \throws ConfigError  if a size is out of range, or if the groups do not fit.
template <std::floating_point T>
Decoder<T> make(const Glm4MoeConfig& config, Rng& rng) {
  return compose<T>(config.shape, detail::deepseek_v3_parts<T>(config, rng), rng);
}

/// The modules of multi-token prediction, as DeepSeek-V3 has them.
/// \throws ConfigError  if a size is out of range, or if there are no modules.
template <std::floating_point T>
MultiToken<T> make_prediction(const Glm4MoeConfig& config, Rng& rng) {
  return compose_prediction<T>(config.shape, detail::deepseek_v3_parts<T>(config, rng),
                               config.prediction_weight, rng);
}

/// What GGUF files call otherwise in GLM-4.5. To be looked at before kGgufNames.
inline constexpr auto kGlm4MoeGgufNames = std::to_array<TensorName>({
    {"layers.{l}.moe_norm.weight", "blk.{l}.post_attention_norm.weight", {.vector = true}},
    {"layers.{l}.mlp_norm.weight", "blk.{l}.post_attention_norm.weight", {.vector = true}},
    {"modules.{l}.embedding_norm.weight", "blk.{l}.nextn.enorm.weight", {.vector = true}},
    {"modules.{l}.hidden_norm.weight", "blk.{l}.nextn.hnorm.weight", {.vector = true}},
    {"modules.{l}.projection.weight", "blk.{l}.nextn.eh_proj.weight"},
    {"modules.{l}.norm.weight", "blk.{l}.nextn.shared_head_norm.weight", {.vector = true}},
});

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(const weir::presets::Glm4MoeConfig&,
                                                                weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(
    const weir::presets::Glm4MoeConfig&, weir::Rng&);
extern template weir::MultiToken<float> weir::presets::make_prediction<float>(
    const weir::presets::Glm4MoeConfig&, weir::Rng&);
extern template weir::MultiToken<double> weir::presets::make_prediction<double>(
    const weir::presets::Glm4MoeConfig&, weir::Rng&);
#endif
