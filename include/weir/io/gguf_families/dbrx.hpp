// SPDX-License-Identifier: MIT
/// \file
/// The architecture "dbrx" of GGUF files.
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
#include <weir/presets/dbrx.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

/// The weights of the experts are always divided by their sum.
template <>
struct GgufFamily<presets::DbrxConfig> {
  static constexpr bool kMayBeTied = false;

  static bool reads(const Gguf& file) { return file.text("general.architecture") == "dbrx"; }

  static presets::DbrxConfig read(GgufSettings& settings) {
    presets::DbrxConfig config{.shape = read_gguf_shape(settings),
                               .norm_epsilon = settings.number("attention.layer_norm_epsilon")};
    read_gguf_experts(settings, config.shape);
    config.shape.d_hidden = settings.count("feed_forward_length");
    std::get<GroupedQueryConfig>(config.shape.attention).clip_qkv =
        settings.number("attention.clamp_kqv");
    return config;
  }

  static std::string_view architecture(const presets::DbrxConfig& /*config*/) { return "dbrx"; }

  static void write(const presets::DbrxConfig& config, GgufSettingsWriter& to) {
    if (config.weight_norm != 1.0) {
      throw_error<ConfigError>("save_gguf: weight_norm = ", config.weight_norm,
                               ", expected 1, as llama.cpp has it in this family");
    }
    expect_all_sparse(config.shape);
    expect_square_queries(config.shape);
    write_gguf_shape(config.shape, to);
    write_gguf_experts(config.shape, to);
    to.number("attention.layer_norm_epsilon", config.norm_epsilon);
    to.number("attention.clamp_kqv", gguf_grouped_query(config.shape).clip_qkv);
    to.count("feed_forward_length", config.shape.d_hidden);
  }

  static std::vector<presets::TensorName> names(const presets::DbrxConfig& /*config*/,
                                                const Gguf* file) {
    if (file != nullptr) return gguf_names(file, presets::kDbrxGgufNames);
    return presets::join_names(
        {presets::kDbrxGgufNames, presets::kGgufJoinedQkvNames, presets::kGgufNames});
  }
};

}  // namespace weir::io
