// SPDX-License-Identifier: MIT
/// \file
/// The attention that DeepSeek-V2, V2-Lite and V3 have in common.
#pragma once

#include <array>

#include <weir/attention/latent.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/yarn.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::presets::detail {

/// Latent attention with the sizes of all DeepSeek models. The first training has contexts of 4096
/// tokens, which the yarn stretches 40 times.
///
/// \param q_rank   0: queries come from x directly.
/// \param mscale   Both factors of the yarn.
inline LatentConfig deepseek_attention(Index heads, Index q_rank, double mscale) {
  return {
      .heads = heads,
      .q_rank = q_rank,
      .kv_rank = 512,
      .nope_dim = 128,
      .rope_dim = 64,
      .value_dim = 128,
      .rope_scaling = Yarn{
          .factor = 40.0, .original_context = 4096, .mscale = mscale, .mscale_all_dim = mscale}};
}

}  // namespace weir::presets::detail

namespace weir::presets {

/// Latent attention in the checkpoints of DeepSeek-V2 and V3. To be looked at before
/// kHuggingFaceNames, whose names it shares for the output and for queries without a latent.
inline constexpr auto kLatentNames = std::to_array<TensorName>({
    {"layers.{l}.attention.query_down", "model.layers.{l}.self_attn.q_a_proj.weight"},
    {"layers.{l}.attention.query_norm.weight",
     "model.layers.{l}.self_attn.q_a_layernorm.weight",
     {.vector = true}},
    {"layers.{l}.attention.kv_down", "model.layers.{l}.self_attn.kv_a_proj_with_mqa.weight"},
    {"layers.{l}.attention.kv_norm.weight",
     "model.layers.{l}.self_attn.kv_a_layernorm.weight",
     {.vector = true}},
    {"layers.{l}.attention.key_up",
     "model.layers.{l}.self_attn.kv_b_proj.weight",
     {.turns = Turns::kHeads}},
    {"layers.{l}.attention.value_up",
     "model.layers.{l}.self_attn.kv_b_proj.weight",
     {.turns = Turns::kHeads}},
});

/// Queries that are made from a latent.
inline constexpr auto kLatentQueryNames = std::to_array<TensorName>({
    {"layers.{l}.attention.query", "model.layers.{l}.self_attn.q_b_proj.weight"},
});

/// Latent attention in GGUF files. To be looked at before kGgufNames.
inline constexpr auto kLatentGgufNames = std::to_array<TensorName>({
    {"layers.{l}.attention.query_down", "blk.{l}.attn_q_a.weight"},
    {"layers.{l}.attention.query_norm.weight", "blk.{l}.attn_q_a_norm.weight", {.vector = true}},
    {"layers.{l}.attention.kv_down", "blk.{l}.attn_kv_a_mqa.weight"},
    {"layers.{l}.attention.kv_norm.weight", "blk.{l}.attn_kv_a_norm.weight", {.vector = true}},
});

/// Keys and values from the latent, each head's apart.
inline constexpr auto kLatentGgufUpNames = std::to_array<TensorName>({
    {"layers.{l}.attention.key_up", "blk.{l}.attn_k_b.weight", {.transposed = true, .heads = true}},
    {"layers.{l}.attention.value_up", "blk.{l}.attn_v_b.weight", {.heads = true}},
});

/// The same in older files, as in the checkpoints.
inline constexpr auto kLatentOldGgufUpNames = std::to_array<TensorName>({
    {"layers.{l}.attention.key_up", "blk.{l}.attn_kv_b.weight", {.turns = Turns::kHeads}},
    {"layers.{l}.attention.value_up", "blk.{l}.attn_kv_b.weight", {.turns = Turns::kHeads}},
});

/// Queries that are made from a latent.
inline constexpr auto kLatentGgufQueryNames = std::to_array<TensorName>({
    {"layers.{l}.attention.query", "blk.{l}.attn_q_b.weight"},
});

}  // namespace weir::presets
