// SPDX-License-Identifier: MIT
/// \file
/// The architecture "olmoe" of GGUF files.
#pragma once

#include <string_view>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/error.hpp>
#include <weir/io/gguf.hpp>
#include <weir/io/gguf_families/gguf_family.hpp>
#include <weir/io/gguf_families/gguf_shape.hpp>
#include <weir/io/gguf_settings.hpp>
#include <weir/presets/olmoe_1b_7b.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

/// The weights of the experts are never divided by their sum, each query has a key of its own, and
/// nothing is clipped.
template <>
struct GgufFamily<presets::OlmoeConfig> {
  static constexpr bool kMayBeTied = false;

  static bool reads(const Gguf& file) { return file.text("general.architecture") == "olmoe"; }

  static presets::OlmoeConfig read(GgufSettings& settings) {
    presets::OlmoeConfig config{.shape = read_gguf_shape(settings),
                                .norm_epsilon = settings.number(kGgufRmsEpsilon)};
    read_gguf_experts(settings, config.shape);
    config.shape.d_hidden = settings.count("feed_forward_length");
    auto& attention = std::get<GroupedQueryConfig>(config.shape.attention);
    if (attention.kv_heads != attention.heads) {
      settings.bad("attention.head_count_kv", "as many as attention.head_count");
    }
    attention.qk_norm = QkNorm::kFull;
    attention.qk_norm_epsilon = config.norm_epsilon;
    return config;
  }

  static std::string_view architecture(const presets::OlmoeConfig& /*config*/) { return "olmoe"; }

  static void write(const presets::OlmoeConfig& config, GgufSettingsWriter& to) {
    const GroupedQueryConfig& attention = gguf_grouped_query(config.shape);
    expect_renormalise(config.renormalise, false);
    expect_all_sparse(config.shape);
    expect_square_queries(config.shape);
    if (attention.kv_heads != attention.heads) {
      throw_error<ConfigError>("save_gguf: kv_heads = ", attention.kv_heads,
                               ", expected heads = ", attention.heads, ", as llama.cpp has it");
    }
    if (attention.clip_qkv != 0.0) {
      throw_error<ConfigError>("save_gguf: clip_qkv = ", attention.clip_qkv,
                               ", expected 0, as llama.cpp has it in this family");
    }
    write_gguf_shape(config.shape, to);
    write_gguf_experts(config.shape, to);
    to.number(kGgufRmsEpsilon, config.norm_epsilon);
    to.count("feed_forward_length", config.shape.d_hidden);
  }

  static std::vector<presets::TensorName> names(const presets::OlmoeConfig& /*config*/,
                                                const Gguf* file) {
    return gguf_names(file, {});
  }
};

}  // namespace weir::io
