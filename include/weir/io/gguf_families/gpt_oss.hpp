// SPDX-License-Identifier: MIT
/// \file
/// The architecture "gpt-oss" of GGUF files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/gguf.hpp>
#include <weir/io/gguf_families/gguf_family.hpp>
#include <weir/io/gguf_families/gguf_shape.hpp>
#include <weir/io/gguf_settings.hpp>
#include <weir/presets/gpt_oss_20b.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

namespace detail {

/// Every how many layers one has no window: 2, unless the file says otherwise or lists them.
inline Index read_window_period(GgufSettings& settings, Index layers) {
  constexpr auto kKey = "attention.sliding_window_pattern";
  if (!settings.has(kKey)) return 2;
  const std::string whole = settings.architecture() + "." + kKey;
  Index period = 0;
  if (!settings.file().value(whole).is_array) {
    period = settings.count(kKey);
  } else {
    const std::vector<std::int64_t> has_window = settings.file().integers(whole);
    while (period < static_cast<Index>(has_window.size()) &&
           has_window[static_cast<std::size_t>(period)] != 0) {
      ++period;
    }
    ++period;
    bool is_regular = static_cast<Index>(has_window.size()) == layers;
    for (std::size_t l = 0; l < has_window.size(); ++l) {
      const bool expected = (static_cast<Index>(l) + 1) % period != 0;
      is_regular = is_regular && (has_window[l] != 0) == expected;
    }
    if (!is_regular) settings.bad(kKey, "one layer without a window after equally many with one");
  }
  if (period < 2) settings.bad(kKey, "at least 2");
  return period;
}

}  // namespace detail

/// llama.cpp rounds the bounds of the yarn's ramp, where the published model does not
/// (Yarn::truncate), so that its logits differ a little from that model's.
template <>
struct GgufFamily<presets::GptOssConfig> {
  static constexpr bool kMayBeTied = false;

  static bool reads(const Gguf& file) { return file.text("general.architecture") == "gpt-oss"; }

  static presets::GptOssConfig read(GgufSettings& settings) {
    presets::GptOssConfig config{.shape = read_gguf_shape(settings),
                                 .norm_epsilon = settings.number(kGgufRmsEpsilon)};
    presets::ModelShape& shape = config.shape;
    read_gguf_experts(settings, shape);
    shape.d_hidden = settings.count("expert_feed_forward_length");
    settings.ignore("feed_forward_length");
    shape.expert_bias = shape.router_bias = true;
    auto& local = std::get<GroupedQueryConfig>(shape.attention);
    local.qkv_bias = local.output_bias = local.sinks = true;
    settings.expect_number("rope.freq_base_swa", local.rope_theta);
    GroupedQueryConfig full = local;
    local.window = settings.count("attention.sliding_window");
    if (local.window < 1) settings.bad("attention.sliding_window", "at least 1");
    shape.other_attention = full;
    shape.others = {.stride = detail::read_window_period(settings, shape.layers)};
    return config;
  }

  static std::string_view architecture(const presets::GptOssConfig& /*config*/) {
    return "gpt-oss";
  }

  static void write(const presets::GptOssConfig& config, GgufSettingsWriter& to) {
    const presets::ModelShape& shape = config.shape;
    expect_all_sparse(shape);
    write_gguf_shape(shape, to);
    write_gguf_experts(shape, to);
    to.number(kGgufRmsEpsilon, config.norm_epsilon);
    to.count("expert_feed_forward_length", shape.d_hidden);
    to.count("feed_forward_length", shape.d_hidden);
    to.count("attention.sliding_window", gguf_grouped_query(shape).window);
    if (shape.others.stride != 2) {
      to.count("attention.sliding_window_pattern", shape.others.stride);
    }
  }

  static std::vector<presets::TensorName> names(const presets::GptOssConfig& /*config*/,
                                                const Gguf* file) {
    return gguf_names(file, presets::kGptOssGgufNames);
  }
};

}  // namespace weir::io
