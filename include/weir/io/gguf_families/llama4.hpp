// SPDX-License-Identifier: MIT
/// \file
/// The architecture "llama4" of GGUF files: Llama 4's text model.
#pragma once

#include <string_view>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/gguf.hpp>
#include <weir/io/gguf_families/gguf_family.hpp>
#include <weir/io/gguf_families/gguf_rope.hpp>
#include <weir/io/gguf_families/gguf_shape.hpp>
#include <weir/io/gguf_families/llama.hpp>
#include <weir/io/gguf_settings.hpp>
#include <weir/ops/rope.hpp>
#include <weir/ops/rope_scaling.hpp>
#include <weir/presets/llama_4_scout.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

/// llama.cpp knows these models by numbers that stand in no file: chunks of 8192 tokens, every
/// fourth layer without rotation and with a temperature, and norms of queries and keys unless there
/// are 128 experts, as in Maverick.
template <>
struct GgufFamily<presets::Llama4Config> {
  static constexpr bool kMayBeTied = true;

  static bool reads(const Gguf& file) { return file.text("general.architecture") == "llama4"; }

  static presets::Llama4Config read(GgufSettings& settings);

  static std::vector<std::string_view> ignored(const Gguf& /*file*/) { return {kGgufRopeDivisors}; }

  static std::string_view architecture(const presets::Llama4Config& /*config*/) { return "llama4"; }

  static void write(const presets::Llama4Config& config, GgufSettingsWriter& to) {
    const presets::ModelShape& shape = config.shape;
    if (shape.shared_hidden != shape.d_hidden) {
      throw_error<ConfigError>("save_gguf: shared_hidden = ", shape.shared_hidden,
                               ", expected d_hidden = ", shape.d_hidden,
                               ", as llama.cpp has it in this family");
    }
    write_gguf_shape(shape, to);
    write_gguf_experts(shape, to);
    to.number(kGgufRmsEpsilon, config.norm_epsilon);
    to.count("interleave_moe_layer_step", shape.interleave.stride);
    to.count("expert_feed_forward_length", shape.d_hidden);
    to.count("feed_forward_length", shape.dense_hidden > 0 ? shape.dense_hidden : shape.d_hidden);
  }

  static std::vector<presets::TensorName> names(const presets::Llama4Config& /*config*/,
                                                const Gguf* file) {
    return gguf_names(file, presets::kLlama4GgufNames);
  }

 private:
  static constexpr Index kChunk = 8192;
  static constexpr Index kPeriod = 4;
  static constexpr Index kExpertsWithoutNorm = 128;
};

inline presets::Llama4Config GgufFamily<presets::Llama4Config>::read(GgufSettings& settings) {
  presets::Llama4Config config{.shape = detail::read_gguf_llama(settings),
                               .norm_epsilon = settings.number(kGgufRmsEpsilon)};
  presets::ModelShape& shape = config.shape;
  read_gguf_experts(settings, shape);
  shape.d_hidden = shape.shared_hidden = settings.count("expert_feed_forward_length");
  shape.interleave.stride = settings.count("interleave_moe_layer_step");
  if (shape.interleave.stride < 1) settings.bad("interleave_moe_layer_step", "at least 1");
  if (shape.interleave.stride > 1) shape.dense_hidden = settings.count("feed_forward_length");
  settings.ignore("feed_forward_length");

  auto& local = std::get<GroupedQueryConfig>(shape.attention);
  constexpr auto kWindow = "attention.sliding_window";
  if (settings.count(kWindow, kChunk) == 0) settings.bad(kWindow, "above 0");
  settings.expect_count("attention.sliding_window_pattern", kPeriod);
  settings.expect_number("rope.freq_base_swa", local.rope_theta);
  GroupedQueryConfig full = local;
  full.rope = false;
  full.rope_scaling = NoScaling{};
  full.temperature_scale = 0.1;
  full.temperature_floor = kChunk;
  shape.other_attention = full;
  shape.others = {.stride = kPeriod};
  local.rope_layout = RopeLayout::kInterleaved;
  local.chunk = kChunk;
  if (shape.experts != kExpertsWithoutNorm) {
    local.qk_norm = QkNorm::kL2;
    local.qk_norm_epsilon = config.norm_epsilon;
  }
  return config;
}

}  // namespace weir::io
