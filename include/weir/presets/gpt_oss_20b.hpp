// SPDX-License-Identifier: MIT
/// \file
/// gpt-oss-20b (OpenAI 2025, arXiv:2508.10925).
#pragma once

#include <array>
#include <concepts>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/clamped_glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/ops/yarn.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::presets {

/// A decoder with biases, a learned sink in each head's softmax, a window in every other layer, and
/// the four best of 32 clamped experts, weighted by the softmax over their logits.
struct GptOssConfig {
  ModelShape shape;
  double norm_epsilon = 1e-5;

  /// What the model was trained with is not known. Its config.json has router_aux_loss_coef = 0.9,
  /// and output_router_logits = false, with which Hugging Face's code adds no loss.
  double balance = 0.0;

  bool operator==(const GptOssConfig&) const = default;
};

/// 20.9 billion parameters, of which 3.6 are active without the embedding, as OpenAI counts.
/// (OpenAI 2025, arXiv:2508.10925, table 1.)
inline GptOssConfig gpt_oss_20b() {
  const GroupedQueryConfig local{
      .heads = 64,
      .kv_heads = 8,
      .head_dim = 64,
      .rope_theta = 150000.0,
      .qkv_bias = true,
      .output_bias = true,
      .rope_scaling = Yarn{.factor = 32.0, .original_context = 4096, .truncate = false},
      .window = 128,
      .sinks = true};
  GroupedQueryConfig full = local;
  full.window = 0;
  return {.shape = {
              .layers = 24,
              .d_model = 2880,
              .vocab = 201088,
              .attention = local,
              .other_attention = full,
              .others = {.stride = 2},
              .experts = 32,
              .k = 4,
              .d_hidden = 2880,
              .expert_bias = true,
              .router_bias = true,
          }};
}

/// \throws ConfigError  if a size is out of range.
template <std::floating_point T>
Decoder<T> make(const GptOssConfig& config, Rng& rng) {
  const ModelShape& shape = config.shape;
  Parts<T> parts = usual_parts<T>(shape, config.norm_epsilon, rng);
  parts.mixture = [&] {
    return MoELayer{LinearRouter<T>(shape.d_model, shape.experts, rng, {.bias = true}),
                    TopKSoftmax<T>({.k = shape.k}), Dropless(),
                    ClampedGluBank<T>(shape.d_model, shape.experts, shape.d_hidden, rng),
                    SwitchLoss<T>({.coefficient = config.balance})};
  };
  return compose<T>(shape, parts, rng);
}

/// The parts of gpt-oss that others do not have.
inline constexpr auto kGptOssNames = std::to_array<TensorName>({
    {"layers.{l}.attention.sinks", "model.layers.{l}.self_attn.sinks", {.vector = true}},
    {"layers.{l}.moe.router.weight", "model.layers.{l}.mlp.router.weight"},
    {"layers.{l}.moe.router.bias", "model.layers.{l}.mlp.router.bias", {.vector = true}},
    {"layers.{l}.moe.experts.{e}.gate_bias",
     "model.layers.{l}.mlp.experts.gate_up_proj_bias",
     {.turns = Turns::kRows, .vector = true}},
    {"layers.{l}.moe.experts.{e}.up_bias",
     "model.layers.{l}.mlp.experts.gate_up_proj_bias",
     {.turns = Turns::kRows, .vector = true}},
    {"layers.{l}.moe.experts.{e}.down_bias",
     "model.layers.{l}.mlp.experts.down_proj_bias",
     {.vector = true}},
});

/// Its experts in the layout of Hugging Face's code: gate and up are even and odd columns.
inline constexpr auto kGptOssExpertNames = std::to_array<TensorName>({
    {"layers.{l}.moe.experts.{e}.gate",
     "model.layers.{l}.mlp.experts.gate_up_proj",
     {.turns = Turns::kRows, .transposed = true}},
    {"layers.{l}.moe.experts.{e}.up",
     "model.layers.{l}.mlp.experts.gate_up_proj",
     {.turns = Turns::kRows, .transposed = true}},
    {"layers.{l}.moe.experts.{e}.down",
     "model.layers.{l}.mlp.experts.down_proj",
     {.transposed = true}},
});

/// Its experts as published, in blocks of four-bit numbers: gate and up are even and odd rows.
inline constexpr auto kGptOssBlockNames = std::to_array<TensorName>({
    {"layers.{l}.moe.experts.{e}.gate",
     "model.layers.{l}.mlp.experts.gate_up_proj_blocks",
     {.turns = Turns::kRows}},
    {"layers.{l}.moe.experts.{e}.up",
     "model.layers.{l}.mlp.experts.gate_up_proj_blocks",
     {.turns = Turns::kRows}},
    {"layers.{l}.moe.experts.{e}.down", "model.layers.{l}.mlp.experts.down_proj_blocks"},
});

/// gpt-oss in GGUF files. To be looked at before kGgufNames.
inline constexpr auto kGptOssGgufNames = std::to_array<TensorName>({
    {"layers.{l}.attention.sinks", "blk.{l}.attn_sinks.weight", {.vector = true}},
    {"layers.{l}.moe_norm.weight", "blk.{l}.post_attention_norm.weight", {.vector = true}},
    {"layers.{l}.moe.router.bias", "blk.{l}.ffn_gate_inp.bias", {.vector = true}},
    {"layers.{l}.moe.experts.{e}.gate_bias", "blk.{l}.ffn_gate_exps.bias", {.vector = true}},
    {"layers.{l}.moe.experts.{e}.up_bias", "blk.{l}.ffn_up_exps.bias", {.vector = true}},
    {"layers.{l}.moe.experts.{e}.down_bias", "blk.{l}.ffn_down_exps.bias", {.vector = true}},
});

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::make<float>(const weir::presets::GptOssConfig&,
                                                                weir::Rng&);
extern template weir::Decoder<double> weir::presets::make<double>(
    const weir::presets::GptOssConfig&, weir::Rng&);
#endif
