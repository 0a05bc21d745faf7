// SPDX-License-Identifier: MIT
/// \file
/// Under which names, and how arranged, published checkpoints hold the parameters of a model.
#pragma once

#include <array>
#include <initializer_list>
#include <span>
#include <string_view>
#include <vector>

namespace weir::presets {

/// How parameters that share a published tensor follow one another along `out`.
enum class Turns {
  kOnce,   ///< Each as a whole, in the order of their entries.
  kHeads,  ///< Head by head: its rows of the first parameter, then those of the next.
  kRows,   ///< Row by row in turn.
};

/// How a parameter of weir, a matrix [out, in], lies in a published tensor.
struct Arrangement {
  Turns turns = Turns::kOnce;  ///< Matters where several parameters share the tensor.
  bool vector = false;      ///< A bias or a norm: one row in weir, an axis `out` alone elsewhere.
  bool transposed = false;  ///< [in, out].
  bool flat = false;        ///< The axis of the experts is one with the next.

  /// In each head, numbers i of the first and of the second half are neighbours in the published
  /// tensor: it is meant for the rotation of neighbours, RopeLayout::kInterleaved, where weir's
  /// parameter is meant for RopeLayout::kHalfSplit.
  bool pairs = false;

  /// The rows of each head are a matrix of their own: the tensor has an axis of heads before the
  /// others.
  bool heads = false;
};

/// One kind of parameter, under its name in weir and its name in a published layout. In both,
/// "{l}" stands for the number of a layer, and "{e}" for that of an expert:
///
///     {"layers.{l}.attention.query", "model.layers.{l}.self_attn.q_proj.weight"}
///
/// Parameters with the same published name are put together along `out`. If "{e}" is in weir's name
/// only, the tensor holds all experts, with their number as the first axis. One table serves
/// reading and writing.
struct TensorName {
  std::string_view ours;
  std::string_view theirs;  ///< Empty: the layout has no place for it, and it is left as it is.
  Arrangement how = {};
};

/// What Hugging Face's layouts call the parts around the networks of a layer; most families since
/// Llama have the same. Entries for which a model has no parameter do no harm.
inline constexpr auto kHuggingFaceNames = std::to_array<TensorName>({
    {"embedding.weight", "model.embed_tokens.weight"},
    {"norm.weight", "model.norm.weight", {.vector = true}},
    {"head.weight", "lm_head.weight"},
    {"layers.{l}.attention_norm.weight",
     "model.layers.{l}.input_layernorm.weight",
     {.vector = true}},
    {"layers.{l}.moe_norm.weight",
     "model.layers.{l}.post_attention_layernorm.weight",
     {.vector = true}},
    {"layers.{l}.mlp_norm.weight",
     "model.layers.{l}.post_attention_layernorm.weight",
     {.vector = true}},
    {"layers.{l}.attention.query", "model.layers.{l}.self_attn.q_proj.weight"},
    {"layers.{l}.attention.key", "model.layers.{l}.self_attn.k_proj.weight"},
    {"layers.{l}.attention.value", "model.layers.{l}.self_attn.v_proj.weight"},
    {"layers.{l}.attention.output", "model.layers.{l}.self_attn.o_proj.weight"},
    {"layers.{l}.attention.query_bias", "model.layers.{l}.self_attn.q_proj.bias", {.vector = true}},
    {"layers.{l}.attention.key_bias", "model.layers.{l}.self_attn.k_proj.bias", {.vector = true}},
    {"layers.{l}.attention.value_bias", "model.layers.{l}.self_attn.v_proj.bias", {.vector = true}},
    {"layers.{l}.attention.output_bias",
     "model.layers.{l}.self_attn.o_proj.bias",
     {.vector = true}},
    {"layers.{l}.attention.query_norm",
     "model.layers.{l}.self_attn.q_norm.weight",
     {.vector = true}},
    {"layers.{l}.attention.key_norm", "model.layers.{l}.self_attn.k_norm.weight", {.vector = true}},
    {"layers.{l}.mlp.gate", "model.layers.{l}.mlp.gate_proj.weight"},
    {"layers.{l}.mlp.up", "model.layers.{l}.mlp.up_proj.weight"},
    {"layers.{l}.mlp.down", "model.layers.{l}.mlp.down_proj.weight"},
});

/// The names that most families since Qwen2-MoE have for a mixture.
inline constexpr auto kHuggingFaceMoeNames = std::to_array<TensorName>({
    {"layers.{l}.moe.router.weight", "model.layers.{l}.mlp.gate.weight"},
    {"layers.{l}.moe.experts.{e}.gate", "model.layers.{l}.mlp.experts.{e}.gate_proj.weight"},
    {"layers.{l}.moe.experts.{e}.up", "model.layers.{l}.mlp.experts.{e}.up_proj.weight"},
    {"layers.{l}.moe.experts.{e}.down", "model.layers.{l}.mlp.experts.{e}.down_proj.weight"},
});

/// The same where all experts are in one tensor, as newer versions of Hugging Face's code hold it.
inline constexpr auto kFusedHuggingFaceMoeNames = std::to_array<TensorName>({
    {"layers.{l}.moe.router.weight", "model.layers.{l}.mlp.gate.weight"},
    {"layers.{l}.moe.experts.{e}.gate", "model.layers.{l}.mlp.experts.gate_up_proj"},
    {"layers.{l}.moe.experts.{e}.up", "model.layers.{l}.mlp.experts.gate_up_proj"},
    {"layers.{l}.moe.experts.{e}.down", "model.layers.{l}.mlp.experts.down_proj"},
});

/// The shared experts of DeepSeek's models and those that took over their names.
inline constexpr auto kSharedExpertsNames = std::to_array<TensorName>({
    {"layers.{l}.moe.shared.gate", "model.layers.{l}.mlp.shared_experts.gate_proj.weight"},
    {"layers.{l}.moe.shared.up", "model.layers.{l}.mlp.shared_experts.up_proj.weight"},
    {"layers.{l}.moe.shared.down", "model.layers.{l}.mlp.shared_experts.down_proj.weight"},
});

/// The bias of the selection in the families since DeepSeek-V3.
inline constexpr auto kSelectionBiasNames = std::to_array<TensorName>({
    {"layers.{l}.moe.selector.bias",
     "model.layers.{l}.mlp.gate.e_score_correction_bias",
     {.vector = true}},
});

/// The modules of multi-token prediction, each with the number of the layer that would follow.
inline constexpr auto kPredictionNames = std::to_array<TensorName>({
    {"modules.{l}.embedding_norm.weight", "model.layers.{l}.enorm.weight", {.vector = true}},
    {"modules.{l}.hidden_norm.weight", "model.layers.{l}.hnorm.weight", {.vector = true}},
    {"modules.{l}.projection.weight", "model.layers.{l}.eh_proj.weight"},
    {"modules.{l}.norm.weight", "model.layers.{l}.shared_head.norm.weight", {.vector = true}},
});

/// What GGUF files call the parts of a model; all architectures have these in common. Entries for
/// which a model has no parameter do no harm.
inline constexpr auto kGgufNames = std::to_array<TensorName>({
    {"embedding.weight", "token_embd.weight"},
    {"norm.weight", "output_norm.weight", {.vector = true}},
    {"head.weight", "output.weight"},
    {"layers.{l}.attention_norm.weight", "blk.{l}.attn_norm.weight", {.vector = true}},
    {"layers.{l}.moe_norm.weight", "blk.{l}.ffn_norm.weight", {.vector = true}},
    {"layers.{l}.mlp_norm.weight", "blk.{l}.ffn_norm.weight", {.vector = true}},
    {"layers.{l}.attention.query", "blk.{l}.attn_q.weight"},
    {"layers.{l}.attention.key", "blk.{l}.attn_k.weight"},
    {"layers.{l}.attention.value", "blk.{l}.attn_v.weight"},
    {"layers.{l}.attention.output", "blk.{l}.attn_output.weight"},
    {"layers.{l}.attention.query_bias", "blk.{l}.attn_q.bias", {.vector = true}},
    {"layers.{l}.attention.key_bias", "blk.{l}.attn_k.bias", {.vector = true}},
    {"layers.{l}.attention.value_bias", "blk.{l}.attn_v.bias", {.vector = true}},
    {"layers.{l}.attention.output_bias", "blk.{l}.attn_output.bias", {.vector = true}},
    {"layers.{l}.attention.query_norm", "blk.{l}.attn_q_norm.weight", {.vector = true}},
    {"layers.{l}.attention.key_norm", "blk.{l}.attn_k_norm.weight", {.vector = true}},
    {"layers.{l}.mlp.gate", "blk.{l}.ffn_gate.weight"},
    {"layers.{l}.mlp.up", "blk.{l}.ffn_up.weight"},
    {"layers.{l}.mlp.down", "blk.{l}.ffn_down.weight"},
    {"layers.{l}.moe.router.weight", "blk.{l}.ffn_gate_inp.weight"},
    {"layers.{l}.moe.selector.bias", "blk.{l}.exp_probs_b.bias", {.vector = true}},
    {"layers.{l}.moe.experts.{e}.gate", "blk.{l}.ffn_gate_exps.weight"},
    {"layers.{l}.moe.experts.{e}.up", "blk.{l}.ffn_up_exps.weight"},
    {"layers.{l}.moe.experts.{e}.down", "blk.{l}.ffn_down_exps.weight"},
    {"layers.{l}.moe.shared.gate", "blk.{l}.ffn_gate_shexp.weight"},
    {"layers.{l}.moe.shared.up", "blk.{l}.ffn_up_shexp.weight"},
    {"layers.{l}.moe.shared.down", "blk.{l}.ffn_down_shexp.weight"},
    {"layers.{l}.moe.shared_gate.weight", "blk.{l}.ffn_gate_inp_shexp.weight", {.vector = true}},
});

/// Queries and keys of the architecture "llama". To be looked at before kGgufNames.
inline constexpr auto kGgufPairedNames = std::to_array<TensorName>({
    {"layers.{l}.attention.query", "blk.{l}.attn_q.weight", {.pairs = true}},
    {"layers.{l}.attention.key", "blk.{l}.attn_k.weight", {.pairs = true}},
});

/// Queries, keys and values in one tensor, as DBRX has them in GGUF files, and others may.
inline constexpr auto kGgufJoinedQkvNames = std::to_array<TensorName>({
    {"layers.{l}.attention.query", "blk.{l}.attn_qkv.weight"},
    {"layers.{l}.attention.key", "blk.{l}.attn_qkv.weight"},
    {"layers.{l}.attention.value", "blk.{l}.attn_qkv.weight"},
    {"layers.{l}.attention.query_bias", "blk.{l}.attn_qkv.bias", {.vector = true}},
    {"layers.{l}.attention.key_bias", "blk.{l}.attn_qkv.bias", {.vector = true}},
    {"layers.{l}.attention.value_bias", "blk.{l}.attn_qkv.bias", {.vector = true}},
});

/// One table of several.
inline std::vector<TensorName> join_names(
    std::initializer_list<std::span<const TensorName>> tables) {
  std::vector<TensorName> all;
  for (const auto& table : tables) all.insert(all.end(), table.begin(), table.end());
  return all;
}

}  // namespace weir::presets
