// SPDX-License-Identifier: MIT
/// \file
/// The architecture "llama" of GGUF files, with experts (Mixtral) and without, and "qwen3".
#pragma once

#include <string_view>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/error.hpp>
#include <weir/io/gguf.hpp>
#include <weir/io/gguf_families/gguf_family.hpp>
#include <weir/io/gguf_families/gguf_rope.hpp>
#include <weir/io/gguf_families/gguf_shape.hpp>
#include <weir/io/gguf_settings.hpp>
#include <weir/ops/llama3_scaling.hpp>
#include <weir/presets/dense.hpp>
#include <weir/presets/mixtral.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

namespace detail {

inline bool is_gguf_llama(const Gguf& file, bool with_experts) {
  if (!file.has("general.architecture") || file.text("general.architecture") != "llama") {
    return false;
  }
  constexpr auto kExperts = "llama.expert_count";
  return (file.has(kExperts) && file.integer(kExperts) > 0) == with_experts;
}

/// Reads the sizes of an architecture that may have Llama 3's scaling.
inline presets::ModelShape read_gguf_llama(GgufSettings& settings) {
  presets::ModelShape shape = read_gguf_shape(settings);
  auto& attention = std::get<GroupedQueryConfig>(shape.attention);
  if (settings.file().has_tensor(kGgufRopeDivisors)) {
    if (!std::holds_alternative<NoScaling>(attention.rope_scaling)) {
      settings.bad("rope.scaling.type", "none beside a tensor rope_freqs.weight");
    }
    attention.rope_scaling =
        read_rope_divisors(settings.file(), attention.head_dim, attention.rope_theta);
  }
  return shape;
}

inline void refuse_window(const presets::ModelShape& shape) {
  if (gguf_grouped_query(shape).window > 0) {
    throw_error<ConfigError>("save_gguf: window = ", gguf_grouped_query(shape).window,
                             ", expected 0: files of this family cannot say it");
  }
}

}  // namespace detail

/// Old files, from before 2024, have a tensor for each expert; neither llama.cpp nor weir reads
/// them.
template <>
struct GgufFamily<presets::MixtralConfig> {
  static constexpr bool kMayBeTied = true;

  static bool reads(const Gguf& file) { return detail::is_gguf_llama(file, true); }

  static presets::MixtralConfig read(GgufSettings& settings) {
    presets::MixtralConfig config{.shape = detail::read_gguf_llama(settings),
                                  .norm_epsilon = settings.number(kGgufRmsEpsilon)};
    read_gguf_experts(settings, config.shape);
    config.shape.d_hidden = settings.count("feed_forward_length");
    return config;
  }

  static std::vector<std::string_view> ignored(const Gguf& /*file*/) { return {kGgufRopeDivisors}; }

  static std::string_view architecture(const presets::MixtralConfig& /*config*/) { return "llama"; }

  static void write(const presets::MixtralConfig& config, GgufSettingsWriter& to) {
    detail::refuse_window(config.shape);
    expect_all_sparse(config.shape);
    write_gguf_shape(config.shape, to);
    write_gguf_experts(config.shape, to);
    to.number(kGgufRmsEpsilon, config.norm_epsilon);
    to.count("feed_forward_length", config.shape.d_hidden);
  }

  static std::vector<presets::TensorName> names(const presets::MixtralConfig& /*config*/,
                                                const Gguf* /*file*/) {
    return presets::join_names({presets::kGgufPairedNames, presets::kGgufNames});
  }
};

/// With norms of queries and keys the architecture is "qwen3", which does not pair their numbers.
template <>
struct GgufFamily<presets::DenseConfig> {
  static constexpr bool kMayBeTied = true;

  static bool reads(const Gguf& file) {
    return detail::is_gguf_llama(file, false) || file.text("general.architecture") == "qwen3";
  }

  static presets::DenseConfig read(GgufSettings& settings) {
    const bool is_qwen = settings.architecture() == "qwen3";
    presets::DenseConfig config{
        .shape = is_qwen ? read_gguf_shape(settings) : detail::read_gguf_llama(settings),
        .norm_epsilon = settings.number(kGgufRmsEpsilon)};
    config.shape.dense_hidden = settings.count("feed_forward_length");
    settings.ignore("expert_used_count");
    settings.expect_count("expert_count", 0);
    if (is_qwen) {
      auto& attention = std::get<GroupedQueryConfig>(config.shape.attention);
      attention.qk_norm = QkNorm::kPerHead;
      attention.qk_norm_epsilon = config.norm_epsilon;
    }
    return config;
  }

  static std::vector<std::string_view> ignored(const Gguf& file) {
    if (file.text("general.architecture") == "qwen3") return {};
    return {kGgufRopeDivisors};
  }

  static std::string_view architecture(const presets::DenseConfig& config) {
    return gguf_grouped_query(config.shape).qk_norm == QkNorm::kNone ? "llama" : "qwen3";
  }

  static void write(const presets::DenseConfig& config, GgufSettingsWriter& to) {
    detail::refuse_window(config.shape);
    write_gguf_shape(config.shape, to);
    to.number(kGgufRmsEpsilon, config.norm_epsilon);
    to.count("feed_forward_length", config.shape.dense_hidden);
  }

  static std::vector<presets::TensorName> names(const presets::DenseConfig& config,
                                                const Gguf* file) {
    if (architecture(config) == "qwen3") return gguf_names(file, {});
    return presets::join_names({presets::kGgufPairedNames, presets::kGgufNames});
  }
};

}  // namespace weir::io
