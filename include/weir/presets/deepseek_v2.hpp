// SPDX-License-Identifier: MIT
/// \file
/// DeepSeek-V2 (DeepSeek-AI 2024, arXiv:2405.04434).
#pragma once

#include <algorithm>
#include <concepts>

#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/communication_loss.hpp>
#include <weir/moe/balance/device_loss.hpp>
#include <weir/moe/balance/expert_groups.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/device_capacity.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/deepseek_attention.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/scaled.hpp>

namespace weir::presets {

/// Latent attention and, behind one dense layer, the six best of many narrow SwiGLU experts,
/// weighted by their scaled raw probabilities, beside two that every token visits.
struct DeepSeekV2Config {
  ModelShape shape;
  double norm_epsilon = 1e-6;
  double scale = 1.0;           ///< The factor of the weights.
  GroupLimit groups = {};       ///< A token's experts are all in `groups.allowed` groups.
  double balance = 0.001;       ///< Coefficient of the loss in each sequence and layer.
  double device_balance = 0.0;  ///< The same for the loss over devices, which are the groups.
  double communication_balance = 0.0;  ///< The same for what devices receive.
  double device_capacity = 1.0;        ///< In training, a multiple of the mean load of a device.
  double protected_share = 0.0;        ///< The share of the sequences of which nothing is dropped.

  bool operator==(const DeepSeekV2Config&) const = default;
};

/// 236 billion parameters, of which 21 are active. (DeepSeek-AI 2024, arXiv:2405.04434, section
/// 3.1.2.)
inline DeepSeekV2Config deepseek_v2() {
  return {.shape =
              {
                  .layers = 60,
                  .d_model = 5120,
                  .vocab = 102400,
                  .attention = detail::deepseek_attention(128, 1536, 0.707),
                  .interleave = {.first_dense = 1},
                  .experts = 160,
                  .k = 6,
                  .d_hidden = 1536,
                  .shared_hidden = 2 * Index(1536),
                  .dense_hidden = 12288,
              },
          .scale = 16.0,
          .groups = {.count = 8, .allowed = 3, .summed = 1},
          .balance = 0.003,
          .device_balance = 0.05,
          .communication_balance = 0.02,
          .protected_share = 0.1};
}

/// Does what `scaled` does with all presets, and leaves at least two experts in each group.
inline DeepSeekV2Config scaled(DeepSeekV2Config config, Scale to = {}) {
  if (to.experts == 0) to.experts = std::max(2 * config.groups.count, 2 * config.shape.k);
  config.shape = scaled(config.shape, to);
  return config;
}

/// \throws ConfigError  if a size is out of range, or if the groups do not fit.
template <std::floating_point T>
Decoder<T> make(const DeepSeekV2Config& config, Rng& rng) {
  const ModelShape& shape = config.shape;
  Parts<T> parts = usual_parts<T>(shape, config.norm_epsilon, rng);
  parts.mixture = [&] {
    const ExpertGroups devices = ExpertGroups::uniform(shape.experts, config.groups.count);
    return with_shared(
        shape,
        MoELayer{LinearRouter<T>(shape.d_model, shape.experts, rng),
                 SoftmaxTopK<T>({.k = shape.k, .scale = config.scale, .groups = config.groups}),
                 DeviceCapacity({.devices = devices.count(),
                                 .factor = config.device_capacity,
                                 .protected_share = config.protected_share}),
                 gated_experts<T>(shape, rng),
                 SwitchLoss<T>({.coefficient = config.balance, .scope = Scope::kSequence}),
                 DeviceLoss<T>(devices, {.coefficient = config.device_balance}),
                 CommunicationLoss<T>(devices, {.devices_per_token = config.groups.allowed,
                                                .coefficient = config.communication_balance})},
        rng);
  };
  return compose<T>(shape, parts, rng);
}

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(
    const weir::presets::DeepSeekV2Config&, weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(
    const weir::presets::DeepSeekV2Config&, weir::Rng&);
#endif
