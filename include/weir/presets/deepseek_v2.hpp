// SPDX-License-Identifier: MIT
/// \file
/// DeepSeek-V2 (DeepSeek-AI 2024, arXiv:2405.04434).
#pragma once

#include <algorithm>
#include <concepts>

#include <weir/attention/latent.hpp>
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
#include <weir/ops/yarn.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/scaled.hpp>

namespace weir::presets {

/// Latent attention and, behind one dense layer, the six best of many narrow SwiGLU experts,
/// weighted by their scaled raw probabilities, beside two that every token visits.
struct DeepSeekV2Config {
  ModelShape shape;
  double norm_epsilon = 1e-6;
  double scale = 1.0;           ///< Of the weights.
  GroupLimit groups = {};       ///< A token's experts live in `groups.allowed` of them.
  double balance = 0.001;       ///< In each sequence and layer, like the two below.
  double device_balance = 0.0;  ///< A device is a group.
  double communication_balance = 0.0;
  double device_capacity = 1.0;  ///< In training, times the mean load of a device.
  double protected_share = 0.0;  ///< Of the sequences, of which nothing is dropped.
};

/// 236 billion parameters, 21 of which a token meets. (DeepSeek-AI 2024, arXiv:2405.04434, section
/// 3.1.2.)
inline DeepSeekV2Config deepseek_v2() {
  return {.shape =
              {
                  .layers = 60,
                  .d_model = 5120,
                  .vocab = 102400,
                  .attention = LatentConfig{.heads = 128,
                                            .q_rank = 1536,
                                            .kv_rank = 512,
                                            .nope_dim = 128,
                                            .rope_dim = 64,
                                            .value_dim = 128,
                                            .yarn = Yarn{.factor = 40.0,
                                                         .original_context = 4096,
                                                         .mscale = 0.707,
                                                         .mscale_all_dim = 0.707}},
                  .interleave = {.first_dense = 1},
                  .experts = 160,
                  .k = 6,
                  .d_hidden = 1536,
                  .shared_hidden = 2 * 1536,
                  .dense_hidden = 12288,
              },
          .scale = 16.0,
          .groups = {.count = 8, .allowed = 3, .summed = 1},
          .balance = 0.003,
          .device_balance = 0.05,
          .communication_balance = 0.02,
          .protected_share = 0.1};
}

/// As `scaled` of all presets, with at least two experts in each group.
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
        MoELayer{
            LinearRouter<T>(shape.d_model, shape.experts, rng),
            SoftmaxTopK<T>{.k = shape.k, .scale = config.scale, .groups = config.groups},
            DeviceCapacity{.devices = devices.count(),
                           .factor = config.device_capacity,
                           .protected_share = config.protected_share},
            gated_experts<T>(shape, rng),
            SwitchLoss<T>{.coefficient = static_cast<T>(config.balance), .scope = Scope::kSequence},
            DeviceLoss<T>{.devices = devices, .coefficient = static_cast<T>(config.device_balance)},
            CommunicationLoss<T>{.devices = devices,
                                 .devices_per_token = config.groups.allowed,
                                 .coefficient = static_cast<T>(config.communication_balance)}},
        rng);
  };
  return compose<T>(shape, parts, rng);
}

}  // namespace weir::presets
