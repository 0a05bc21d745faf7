// SPDX-License-Identifier: MIT
/// \file
/// The architecture "phimoe" of GGUF files: Phi-3.5-MoE.
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
#include <weir/presets/model_shape.hpp>
#include <weir/presets/phi_3_5_moe.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

/// A file is read as the published model that it holds. llama.cpp computes another one: its norms
/// divide by the root mean square without taking the mean away, and the weights of the two experts
/// are a softmax over both, where the model has layer norms and SparseMixer. Models are not written
/// therefore.
template <>
struct GgufFamily<presets::PhiMoeConfig> {
  static constexpr bool kMayBeTied = false;

  static bool reads(const Gguf& file) { return file.text("general.architecture") == "phimoe"; }

  static presets::PhiMoeConfig read(GgufSettings& settings) {
    presets::PhiMoeConfig config{.shape = read_gguf_shape(settings, GgufRotation::kFactors),
                                 .norm_epsilon = settings.number(kGgufRmsEpsilon)};
    presets::ModelShape& shape = config.shape;
    auto& attention = std::get<GroupedQueryConfig>(shape.attention);
    attention.window = settings.count("attention.sliding_window", 0);
    attention.qkv_bias = has_gguf_qkv_bias(settings.file());
    attention.output_bias = settings.file().has_tensor("blk.0.attn_output.bias");
    shape.norm_bias = shape.head_bias = true;
    read_gguf_experts(settings, shape);
    shape.d_hidden = settings.count("feed_forward_length");
    return config;
  }

  static std::vector<std::string_view> ignored(const Gguf& /*file*/) {
    return {kGgufShortFactors, kGgufLongFactors};
  }

  static std::string_view architecture(const presets::PhiMoeConfig& /*config*/) { return "phimoe"; }

  /// \throws ConfigError  always.
  static void write(const presets::PhiMoeConfig& /*config*/, GgufSettingsWriter& /*to*/) {
    throw_error<ConfigError>(
        "save_gguf: llama.cpp has neither the layer norms nor the SparseMixer of this family");
  }

  static std::vector<presets::TensorName> names(const presets::PhiMoeConfig& /*config*/,
                                                const Gguf* file) {
    return gguf_names(file, presets::kPhiMoeGgufNames);
  }
};

}  // namespace weir::io
