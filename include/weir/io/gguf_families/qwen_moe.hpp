// SPDX-License-Identifier: MIT
/// \file
/// The architectures "qwen3moe" and "qwen2moe" of GGUF files.
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
#include <weir/presets/qwen2_moe.hpp>
#include <weir/presets/qwen3_30b_a3b.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

namespace detail {

/// Where no width of the experts is given, it is the share of one of a dense network's.
inline Index read_gguf_hidden(GgufSettings& settings, const presets::ModelShape& shape) {
  settings.ignore("feed_forward_length");
  constexpr auto kOwn = "expert_feed_forward_length";
  if (const Index own = settings.count(kOwn, 0); own > 0) return own;
  if (shape.k < 1) settings.bad("expert_used_count", "at least 1");
  return settings.count("feed_forward_length") / shape.k;
}

}  // namespace detail

/// The weights of the experts are always divided by their sum.
template <>
struct GgufFamily<presets::Qwen3Config> {
  static constexpr bool kMayBeTied = true;

  static bool reads(const Gguf& file) { return file.text("general.architecture") == "qwen3moe"; }

  static presets::Qwen3Config read(GgufSettings& settings) {
    presets::Qwen3Config config{.shape = read_gguf_shape(settings),
                                .norm_epsilon = settings.number(kGgufRmsEpsilon)};
    read_gguf_experts(settings, config.shape);
    config.shape.d_hidden = detail::read_gguf_hidden(settings, config.shape);
    auto& attention = std::get<GroupedQueryConfig>(config.shape.attention);
    attention.qk_norm = QkNorm::kPerHead;
    attention.qk_norm_epsilon = config.norm_epsilon;
    return config;
  }

  static std::string_view architecture(const presets::Qwen3Config& /*config*/) {
    return "qwen3moe";
  }

  static void write(const presets::Qwen3Config& config, GgufSettingsWriter& to) {
    expect_renormalise(config.renormalise, true);
    expect_all_sparse(config.shape);
    write_gguf_shape(config.shape, to);
    write_gguf_experts(config.shape, to);
    to.number(kGgufRmsEpsilon, config.norm_epsilon);
    to.count("expert_feed_forward_length", config.shape.d_hidden);
    to.count("feed_forward_length", config.shape.d_hidden);
  }

  static std::vector<presets::TensorName> names(const presets::Qwen3Config& /*config*/,
                                                const Gguf* file) {
    return gguf_names(file, {});
  }
};

/// The weights of the experts are never divided by their sum.
template <>
struct GgufFamily<presets::Qwen2MoeConfig> {
  static constexpr bool kMayBeTied = false;

  static bool reads(const Gguf& file) { return file.text("general.architecture") == "qwen2moe"; }

  static presets::Qwen2MoeConfig read(GgufSettings& settings) {
    presets::Qwen2MoeConfig config{.shape = read_gguf_shape(settings),
                                   .norm_epsilon = settings.number(kGgufRmsEpsilon)};
    presets::ModelShape& shape = config.shape;
    read_gguf_experts(settings, shape);
    shape.d_hidden = detail::read_gguf_hidden(settings, shape);
    shape.shared_hidden = settings.count("expert_shared_feed_forward_length", 0);
    if (shape.shared_hidden == 0) shape.shared_hidden = settings.count("feed_forward_length");
    shape.shared_gate = true;
    std::get<GroupedQueryConfig>(shape.attention).qkv_bias = has_gguf_qkv_bias(settings.file());
    return config;
  }

  static std::string_view architecture(const presets::Qwen2MoeConfig& /*config*/) {
    return "qwen2moe";
  }

  static void write(const presets::Qwen2MoeConfig& config, GgufSettingsWriter& to) {
    const presets::ModelShape& shape = config.shape;
    expect_renormalise(config.renormalise, false);
    expect_all_sparse(shape);
    expect_square_queries(shape);
    write_gguf_shape(shape, to);
    write_gguf_experts(shape, to);
    to.number(kGgufRmsEpsilon, config.norm_epsilon);
    to.count("expert_feed_forward_length", shape.d_hidden);
    to.count("expert_shared_feed_forward_length", shape.shared_hidden);
    to.count("feed_forward_length", shape.shared_hidden);
  }

  static std::vector<presets::TensorName> names(const presets::Qwen2MoeConfig& /*config*/,
                                                const Gguf* file) {
    return gguf_names(file, {});
  }
};

}  // namespace weir::io
