// SPDX-License-Identifier: MIT
/// \file
/// The architecture "granitemoe" of GGUF files.
#pragma once

#include <string_view>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/types.hpp>
#include <weir/io/gguf.hpp>
#include <weir/io/gguf_families/gguf_family.hpp>
#include <weir/io/gguf_families/gguf_rope.hpp>
#include <weir/io/gguf_families/gguf_shape.hpp>
#include <weir/io/gguf_families/llama.hpp>
#include <weir/io/gguf_settings.hpp>
#include <weir/presets/granite_moe.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

/// Multipliers that a file does not have are 1.
template <>
struct GgufFamily<presets::GraniteMoeConfig> {
  static constexpr bool kMayBeTied = true;

  static bool reads(const Gguf& file) { return file.text("general.architecture") == "granitemoe"; }

  static presets::GraniteMoeConfig read(GgufSettings& settings) {
    presets::GraniteMoeConfig config{
        .shape = detail::read_gguf_llama(settings),
        .norm_epsilon = settings.number(kGgufRmsEpsilon),
        .embedding_multiplier = read_multiplier(settings, "embedding_scale"),
        .residual_multiplier = read_multiplier(settings, "residual_scale"),
        .logits_scaling = settings.number("logit_scale")};
    presets::ModelShape& shape = config.shape;
    auto& attention = std::get<GroupedQueryConfig>(shape.attention);
    attention.scale = settings.number("attention.scale", 0.0);
    attention.qkv_bias = has_gguf_qkv_bias(settings.file());
    attention.output_bias = settings.file().has_tensor("blk.0.attn_output.bias");
    read_gguf_experts(settings, shape);
    shape.d_hidden = settings.count("feed_forward_length");
    settings.expect_count("expert_shared_feed_forward_length", 0);
    settings.expect_flag("rope.scaling.finetuned", true);  // Whether positions are rotated at all.
    return config;
  }

  static std::vector<std::string_view> ignored(const Gguf& /*file*/) { return {kGgufRopeDivisors}; }

  static std::string_view architecture(const presets::GraniteMoeConfig& /*config*/) {
    return "granitemoe";
  }

  static void write(const presets::GraniteMoeConfig& config, GgufSettingsWriter& to) {
    expect_all_sparse(config.shape);
    write_gguf_shape(config.shape, to);
    write_gguf_experts(config.shape, to);
    const presets::ModelShape shape = presets::settled(config.shape);
    to.number(kGgufRmsEpsilon, config.norm_epsilon);
    to.count("feed_forward_length", shape.d_hidden);
    to.number("attention.scale", gguf_grouped_query(shape).scale);
    to.number("embedding_scale", config.embedding_multiplier);
    to.number("residual_scale", config.residual_multiplier);
    to.number("logit_scale", config.logits_scaling);
  }

  static std::vector<presets::TensorName> names(const presets::GraniteMoeConfig& /*config*/,
                                                const Gguf* /*file*/) {
    return presets::join_names({presets::kGgufPairedNames, presets::kGgufNames});
  }

 private:
  static double read_multiplier(GgufSettings& settings, const char* key) {
    const double value = settings.number(key, 0.0);
    return value == 0.0 ? 1.0 : value;
  }
};

}  // namespace weir::io
