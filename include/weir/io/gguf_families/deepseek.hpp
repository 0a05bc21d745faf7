// SPDX-License-Identifier: MIT
/// \file
/// The architecture "deepseek2" of GGUF files: DeepSeek-V2, V3 and what took over their layers.
#pragma once

#include <array>
#include <string_view>
#include <variant>
#include <vector>

#include <weir/attention/latent.hpp>
#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/gguf.hpp>
#include <weir/io/gguf_families/gguf_family.hpp>
#include <weir/io/gguf_families/gguf_rope.hpp>
#include <weir/io/gguf_families/gguf_shape.hpp>
#include <weir/io/gguf_settings.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/ops/rope_scaling.hpp>
#include <weir/presets/deepseek_attention.hpp>
#include <weir/presets/deepseek_v2.hpp>
#include <weir/presets/deepseek_v3.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

namespace detail {

inline bool is_gguf_deepseek(const Gguf& file, GgufGate gate) {
  if (file.text("general.architecture") != "deepseek2") return false;
  constexpr auto kKey = "deepseek2.expert_gating_func";
  const bool is_sigmoid = file.has(kKey) && file.integer(kKey) == Index(GgufGate::kSigmoid);
  return is_sigmoid == (gate == GgufGate::kSigmoid);
}

/// The yarn of DeepSeek's models, whose two factors are equal: scores are multiplied, rotations are
/// not.
inline RopeScaling read_latent_scaling(GgufSettings& settings) {
  RopeScaling scaling = read_gguf_scaling(settings);
  constexpr auto kFactor = "rope.scaling.yarn_log_multiplier";
  if (std::holds_alternative<LinearScaling>(scaling)) {
    settings.bad("rope.scaling.factor", "1 without a yarn in this architecture");
  }
  auto* const yarn = std::get_if<Yarn>(&scaling);
  if (yarn == nullptr) {
    settings.ignore(kFactor);
    return scaling;
  }
  settings.expect_number("rope.scaling.attn_factor", 1.0);
  yarn->mscale = yarn->mscale_all_dim = settings.number(kFactor) / 0.1;
  if (!(yarn->mscale > 0.0)) settings.bad(kFactor, "a number above 0 with a yarn");
  return scaling;
}

inline LatentConfig read_gguf_latent(GgufSettings& settings) {
  LatentConfig attention{.heads = settings.count("attention.head_count"),
                         .q_rank = settings.count("attention.q_lora_rank", 0),
                         .kv_rank = settings.count("attention.kv_lora_rank"),
                         .rope_dim = settings.count("rope.dimension_count"),
                         .rope_theta = settings.number("rope.freq_base", 1e4),
                         .rope_scaling = read_latent_scaling(settings),
                         .norm_epsilon = settings.number(kGgufRmsEpsilon)};
  settings.ignore("attention.head_count_kv", "attention.key_length", "attention.value_length");
  // Older files have no sizes of heads beside those of the shared latent.
  constexpr auto kKey = "attention.key_length_mla";
  const bool is_old = !settings.has(kKey);
  attention.nope_dim = settings.count(is_old ? "attention.key_length" : kKey) - attention.rope_dim;
  attention.value_dim =
      settings.count(is_old ? "attention.value_length" : "attention.value_length_mla");
  settings.expect_flag("attention.causal", true);
  return attention;
}

inline presets::ModelShape read_gguf_deepseek(GgufSettings& settings) {
  presets::ModelShape shape{.layers = settings.count("block_count"),
                            .d_model = settings.count("embedding_length"),
                            .attention = read_gguf_latent(settings)};
  shape.interleave.first_dense = settings.count("leading_dense_block_count", 0);
  shape.experts = settings.count("expert_count");
  shape.k = settings.count("expert_used_count");
  shape.d_hidden = settings.count("expert_feed_forward_length");
  shape.shared_hidden = settings.count("expert_shared_count") * shape.d_hidden;
  if (shape.interleave.first_dense > 0) shape.dense_hidden = settings.count("feed_forward_length");
  settings.ignore("feed_forward_length");
  settings.expect_count("nextn_predict_layers", 0);
  return shape;
}

inline GroupLimit read_gguf_groups(GgufSettings& settings) {
  const Index count = settings.count("expert_group_count", 0);
  const Index allowed = settings.count("expert_group_used_count", 0);
  if (count <= 1) return {};
  return {.count = count, .allowed = allowed, .summed = 2};
}

/// \throws ConfigError  if llama.cpp scores groups otherwise.
inline void write_gguf_groups(const GroupLimit& groups, GgufSettingsWriter& to) {
  if (!groups.limits()) return;
  if (groups.summed != 2) {
    throw_error<ConfigError>("save_gguf: groups.summed = ", groups.summed,
                             ", expected 2, as llama.cpp has it in this family");
  }
  to.count("expert_group_count", groups.count);
  to.count("expert_group_used_count", groups.allowed);
}

inline void write_gguf_latent(const LatentConfig& attention, double norm_epsilon,
                              GgufSettingsWriter& to) {
  if (attention.norm_epsilon != norm_epsilon) {
    throw_error<ConfigError>("save_gguf: attention.norm_epsilon = ", attention.norm_epsilon,
                             ", expected norm_epsilon = ", norm_epsilon,
                             ", as llama.cpp has it in this family");
  }
  to.count("attention.head_count", attention.heads);
  to.count("attention.head_count_kv", 1);
  to.count("attention.q_lora_rank", attention.q_rank);
  to.count("attention.kv_lora_rank", attention.kv_rank);
  to.count("attention.key_length", attention.kv_rank + attention.rope_dim);
  to.count("attention.value_length", attention.kv_rank);
  to.count("attention.key_length_mla", attention.query_dim());
  to.count("attention.value_length_mla", attention.value_dim);
  to.count("rope.dimension_count", attention.rope_dim);
  to.number("rope.freq_base", attention.rope_theta);
  write_gguf_scaling(attention.rope_scaling, to);
  if (const auto* const yarn = std::get_if<Yarn>(&attention.rope_scaling)) {
    to.number("rope.scaling.yarn_log_multiplier", 0.1 * yarn->mscale_all_dim);
  }
}

inline void write_gguf_deepseek(const presets::ModelShape& shape, double norm_epsilon, double scale,
                                GgufSettingsWriter& to) {
  const auto* const attention = std::get_if<LatentConfig>(&shape.attention);
  if (attention == nullptr) {
    throw_error<ConfigError>(
        "save_gguf: attention is a GroupedQueryConfig, expected a LatentConfig in this family");
  }
  if ((shape.layers == 26 || shape.layers == 27) && attention->q_rank > 0) {
    throw_error<ConfigError>("save_gguf: q_rank = ", attention->q_rank, ", expected 0 with ",
                             shape.layers, " layers, which llama.cpp takes for DeepSeek-V2-Lite");
  }
  const Index shared = gguf_shared_count(shape);
  write_gguf_sizes(shape, to);
  write_gguf_latent(*attention, norm_epsilon, to);
  write_gguf_experts(shape, to);
  to.number(kGgufRmsEpsilon, norm_epsilon);
  to.count("leading_dense_block_count", shape.interleave.first_dense);
  to.count("feed_forward_length", shape.dense_hidden > 0 ? shape.dense_hidden : shape.d_hidden);
  to.count("expert_feed_forward_length", shape.d_hidden);
  to.count("expert_shared_count", shared);
  to.number("expert_weights_scale", scale);
}

/// Gates and values of all experts in one tensor.
inline constexpr auto kGgufJoinedExpertNames = std::to_array<presets::TensorName>({
    {"layers.{l}.moe.experts.{e}.gate", "blk.{l}.ffn_gate_up_exps.weight"},
    {"layers.{l}.moe.experts.{e}.up", "blk.{l}.ffn_gate_up_exps.weight"},
});

inline std::vector<presets::TensorName> gguf_latent_names(const presets::ModelShape& shape,
                                                          const Gguf* file) {
  std::vector<presets::TensorName> names = presets::join_names({presets::kLatentGgufNames});
  const auto add = [&](const auto& table) {
    names.insert(names.end(), table.begin(), table.end());
  };
  const auto* const attention = std::get_if<LatentConfig>(&shape.attention);
  if (attention != nullptr && attention->q_rank > 0) add(presets::kLatentGgufQueryNames);
  if (file != nullptr && file->has_tensor("blk.0.attn_kv_b.weight")) {
    add(presets::kLatentOldGgufUpNames);
  } else {
    add(presets::kLatentGgufUpNames);
  }
  const std::string first_mixture = "blk." + std::to_string(shape.interleave.first_dense);
  if (file != nullptr && file->has_tensor(first_mixture + ".ffn_gate_up_exps.weight")) {
    add(kGgufJoinedExpertNames);
  }
  add(presets::kGgufNames);
  return names;
}

}  // namespace detail

/// With groups, llama.cpp scores a group by the sum of its two best experts, as in DeepSeek-V3,
/// where DeepSeek-V2 has the best alone: what is loaded does so too.
template <>
struct GgufFamily<presets::DeepSeekV2Config> {
  static constexpr bool kMayBeTied = true;

  static bool reads(const Gguf& file) { return detail::is_gguf_deepseek(file, GgufGate::kSoftmax); }

  static presets::DeepSeekV2Config read(GgufSettings& settings) {
    presets::DeepSeekV2Config config{.shape = detail::read_gguf_deepseek(settings),
                                     .norm_epsilon = settings.number(kGgufRmsEpsilon),
                                     .scale = read_weights_scale(settings),
                                     .groups = detail::read_gguf_groups(settings)};
    settings.expect_flag("expert_weights_norm", false);
    settings.expect_count(kGgufGate, Index(GgufGate::kSoftmax));
    return config;
  }

  static std::string_view architecture(const presets::DeepSeekV2Config& /*config*/) {
    return "deepseek2";
  }

  static void write(const presets::DeepSeekV2Config& config, GgufSettingsWriter& to) {
    detail::write_gguf_deepseek(config.shape, config.norm_epsilon, config.scale, to);
    detail::write_gguf_groups(config.groups, to);
    to.flag("expert_weights_norm", false);
    to.count(kGgufGate, Index(GgufGate::kSoftmax));
  }

  static std::vector<presets::TensorName> names(const presets::DeepSeekV2Config& config,
                                                const Gguf* file) {
    return detail::gguf_latent_names(config.shape, file);
  }
};

/// Modules of multi-token prediction are left out.
template <>
struct GgufFamily<presets::DeepSeekV3Config> {
  static constexpr bool kMayBeTied = true;

  static bool reads(const Gguf& file) { return detail::is_gguf_deepseek(file, GgufGate::kSigmoid); }

  static presets::DeepSeekV3Config read(GgufSettings& settings) {
    presets::DeepSeekV3Config config{.shape = detail::read_gguf_deepseek(settings),
                                     .norm_epsilon = settings.number(kGgufRmsEpsilon),
                                     .renormalise = settings.flag("expert_weights_norm", false),
                                     .scale = read_weights_scale(settings),
                                     .groups = detail::read_gguf_groups(settings)};
    config.shape.selection_bias = true;
    settings.ignore(kGgufGate);
    return config;
  }

  static std::string_view architecture(const presets::DeepSeekV3Config& /*config*/) {
    return "deepseek2";
  }

  static void write(const presets::DeepSeekV3Config& config, GgufSettingsWriter& to) {
    detail::write_gguf_deepseek(config.shape, config.norm_epsilon, config.scale, to);
    detail::write_gguf_groups(config.groups, to);
    to.flag("expert_weights_norm", config.renormalise);
    to.count(kGgufGate, Index(GgufGate::kSigmoid));
  }

  static std::vector<presets::TensorName> names(const presets::DeepSeekV3Config& config,
                                                const Gguf* file) {
    return detail::gguf_latent_names(config.shape, file);
  }
};

}  // namespace weir::io
