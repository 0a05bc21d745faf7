// SPDX-License-Identifier: MIT
/// \file
/// DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437).
#pragma once

#include <concepts>
#include <variant>

#include <weir/attention/latent.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/multi_token.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/ops/yarn.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/deepseek_attention.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/prediction.hpp>

namespace weir::presets {

/// Latent attention and, behind three dense layers, the eight best of 256 narrow SwiGLU experts by
/// biased sigmoids, beside one that every token visits; the bias is what balances them.
struct DeepSeekV3Config {
  ModelShape shape;
  double norm_epsilon = 1e-6;
  bool renormalise = true;  ///< Whether the sigmoids are divided by their sum.
  double scale = 2.5;       ///< The factor of the weights, after that.
  GroupLimit groups = {.count = 8, .allowed = 4, .summed = 2};
  double bias_rate = 0.001;
  double balance = 0.0001;         ///< Coefficient of the loss in each sequence and layer.
  double prediction_weight = 0.3;  ///< The weight of the modules' losses; 0.1 late in the training.

  bool operator==(const DeepSeekV3Config&) const = default;
};

/// 671 billion parameters, of which 37 are active; the module of multi-token prediction is
/// counted apart. (DeepSeek-AI 2024, arXiv:2412.19437, section 4.2.)
inline DeepSeekV3Config deepseek_v3() {
  return {.shape = {
              .layers = 61,
              .d_model = 7168,
              .vocab = 129280,
              .attention = detail::deepseek_attention(128, 1536, 1.0),
              .interleave = {.first_dense = 3},
              .experts = 256,
              .k = 8,
              .d_hidden = 2048,
              .selection_bias = true,
              .shared_hidden = 2048,
              .dense_hidden = 18432,
              .prediction_modules = 1,
          }};
}

/// Kimi K2: 1026.4 billion parameters, of which 32.9 are active. (Kimi Team 2025,
/// arXiv:2507.20534, section 2.3; the yarn is that of the released configuration.)
inline DeepSeekV3Config kimi_k2() {
  DeepSeekV3Config config = deepseek_v3();
  config.shape.vocab = 163840;
  LatentConfig attention = detail::deepseek_attention(64, 1536, 1.0);
  attention.rope_theta = 50000.0;
  auto& yarn = std::get<Yarn>(attention.rope_scaling);
  yarn.factor = 32.0;
  yarn.beta_fast = yarn.beta_slow = 1.0;
  config.shape.attention = attention;
  config.shape.interleave.first_dense = 1;
  config.shape.experts = 384;
  config.shape.prediction_modules = 0;
  config.scale = 2.827;
  config.groups = {.count = 1, .allowed = 1, .summed = 2};
  return config;
}

namespace detail {

/// The norms and networks of DeepSeek-V3, and of what took over its mixture. `config` and `rng`
/// have to live as long as the parts.
template <std::floating_point T, class Config>
Parts<T> deepseek_v3_parts(const Config& config, Rng& rng) {
  const ModelShape& shape = config.shape;
  Parts<T> parts = usual_parts<T>(shape, config.norm_epsilon, rng);
  parts.mixture = [&] {
    return with_shared(shape,
                       MoELayer{LinearRouter<T>(shape.d_model, shape.experts, rng),
                                SigmoidTopK<T>(shape.experts, {.k = shape.k,
                                                               .renormalise = config.renormalise,
                                                               .scale = config.scale,
                                                               .groups = config.groups}),
                                Dropless(), gated_experts<T>(shape, rng),
                                BiasBalance<T>({.rate = config.bias_rate}),
                                SwitchLoss<T>({.coefficient = config.balance,
                                               .count = LoadCount::kTopProbabilities,
                                               .scope = Scope::kSequence})},
                       rng);
  };
  return parts;
}

}  // namespace detail

/// The model without its module of multi-token prediction, see `make_prediction`.
/// \throws ConfigError  if a size is out of range, or if the groups do not fit.
template <std::floating_point T>
Decoder<T> make(const DeepSeekV3Config& config, Rng& rng) {
  return compose<T>(config.shape, detail::deepseek_v3_parts<T>(config, rng), rng);
}

/// The modules of multi-token prediction, one as published, each with a sparse layer of the model's
/// kind.
/// \throws ConfigError  if a size is out of range, or if there are no modules.
template <std::floating_point T>
MultiToken<T> make_prediction(const DeepSeekV3Config& config, Rng& rng) {
  return compose_prediction<T>(config.shape, detail::deepseek_v3_parts<T>(config, rng),
                               config.prediction_weight, rng);
}

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(
    const weir::presets::DeepSeekV3Config&, weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(
    const weir::presets::DeepSeekV3Config&, weir::Rng&);
extern template weir::MultiToken<float> weir::presets::make_prediction<float>(
    const weir::presets::DeepSeekV3Config&, weir::Rng&);
extern template weir::MultiToken<double> weir::presets::make_prediction<double>(
    const weir::presets::DeepSeekV3Config&, weir::Rng&);
#endif
