// SPDX-License-Identifier: MIT
/// \file
/// Llama 4 Scout, the text model (Meta 2025).
#pragma once

#include <array>
#include <concepts>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/input_weighted.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/ops/llama3_scaling.hpp>
#include <weir/ops/rope.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::presets {

/// A decoder whose layers attend within chunks and have rotary positions, except every fourth,
/// which attends to everything and knows no positions. The experts take the token multiplied by the
/// sigmoid of its logit, beside one that every token visits.
struct Llama4Config {
  ModelShape shape;
  double norm_epsilon = 1e-5;

  /// What the model was trained with is not known. Its config.json has router_aux_loss_coef =
  /// 0.001, and output_router_logits = false.
  double balance = 0.0;

  bool operator==(const Llama4Config&) const = default;
};

/// 107.8 billion parameters, of which 17.2 are active; the published 109 include the vision model.
/// (Meta 2025; huggingface.co/meta-llama/Llama-4-Scout-17B-16E.)
inline Llama4Config llama_4_scout() {
  const GroupedQueryConfig local{.heads = 40,
                                 .kv_heads = 8,
                                 .head_dim = 128,
                                 .rope_theta = 5e5,
                                 .rope_layout = RopeLayout::kInterleaved,
                                 .rope_scaling = Llama3Scaling{.factor = 16.0,
                                                               .low_freq_factor = 1.0,
                                                               .high_freq_factor = 1.0,
                                                               .original_context = 8192},
                                 .chunk = 8192,
                                 .qk_norm = QkNorm::kL2,
                                 .qk_norm_epsilon = 1e-5};
  const GroupedQueryConfig full{.heads = 40,
                                .kv_heads = 8,
                                .head_dim = 128,
                                .rope = false,
                                .temperature_scale = 0.1,
                                .temperature_floor = 8192};
  return {.shape = {
              .layers = 48,
              .d_model = 5120,
              .vocab = 202048,
              .attention = local,
              .other_attention = full,
              .others = {.stride = 4},
              .experts = 16,
              .k = 1,
              .d_hidden = 8192,
              .shared_hidden = 8192,
          }};
}

/// \throws ConfigError  if a size is out of range.
template <std::floating_point T>
Decoder<T> make(const Llama4Config& config, Rng& rng) {
  const ModelShape& shape = config.shape;
  Parts<T> parts = usual_parts<T>(shape, config.norm_epsilon, rng);
  parts.mixture = [&] {
    return with_shared(shape,
                       MoELayer{LinearRouter<T>(shape.d_model, shape.experts, rng),
                                SigmoidTopK<T>(shape.experts, {.k = shape.k, .renormalise = false}),
                                Dropless(), InputWeighted(gated_experts<T>(shape, rng)),
                                SwitchLoss<T>({.coefficient = config.balance})},
                       rng);
  };
  return compose<T>(shape, parts, rng);
}

/// The networks of Llama 4's checkpoints. To be looked at before kHuggingFaceNames.
inline constexpr auto kLlama4Names = std::to_array<TensorName>({
    {"layers.{l}.moe.router.weight", "model.layers.{l}.feed_forward.router.weight"},
    {"layers.{l}.moe.selector.bias", ""},  // Zero: nothing moves it.
    {"layers.{l}.moe.experts.{e}.gate",
     "model.layers.{l}.feed_forward.experts.gate_up_proj",
     {.transposed = true}},
    {"layers.{l}.moe.experts.{e}.up",
     "model.layers.{l}.feed_forward.experts.gate_up_proj",
     {.transposed = true}},
    {"layers.{l}.moe.experts.{e}.down",
     "model.layers.{l}.feed_forward.experts.down_proj",
     {.transposed = true}},
    {"layers.{l}.moe.shared.gate", "model.layers.{l}.feed_forward.shared_expert.gate_proj.weight"},
    {"layers.{l}.moe.shared.up", "model.layers.{l}.feed_forward.shared_expert.up_proj.weight"},
    {"layers.{l}.moe.shared.down", "model.layers.{l}.feed_forward.shared_expert.down_proj.weight"},
    {"layers.{l}.mlp.gate", "model.layers.{l}.feed_forward.gate_proj.weight"},
    {"layers.{l}.mlp.up", "model.layers.{l}.feed_forward.up_proj.weight"},
    {"layers.{l}.mlp.down", "model.layers.{l}.feed_forward.down_proj.weight"},
});

/// The same in GGUF files. To be looked at before kGgufNames.
inline constexpr auto kLlama4GgufNames = std::to_array<TensorName>({
    {"layers.{l}.moe.selector.bias", ""},  // Zero: nothing moves it.
});

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(const weir::presets::Llama4Config&,
                                                                weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(
    const weir::presets::Llama4Config&, weir::Rng&);
#endif
