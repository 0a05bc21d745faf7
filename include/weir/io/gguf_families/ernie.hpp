// SPDX-License-Identifier: MIT
/// \file
/// The architecture "ernie4_5-moe" of GGUF files: ERNIE 4.5.
#pragma once

#include <string_view>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/types.hpp>
#include <weir/io/gguf.hpp>
#include <weir/io/gguf_families/gguf_family.hpp>
#include <weir/io/gguf_families/gguf_shape.hpp>
#include <weir/io/gguf_settings.hpp>
#include <weir/ops/rope.hpp>
#include <weir/presets/ernie_4_5.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

template <>
struct GgufFamily<presets::ErnieMoeConfig> {
  static constexpr bool kMayBeTied = true;

  static bool reads(const Gguf& file) {
    return file.text("general.architecture") == "ernie4_5-moe";
  }

  static presets::ErnieMoeConfig read(GgufSettings& settings) {
    presets::ErnieMoeConfig config{.shape = read_gguf_shape(settings),
                                   .norm_epsilon = settings.number(kGgufRmsEpsilon)};
    presets::ModelShape& shape = config.shape;
    auto& attention = std::get<GroupedQueryConfig>(shape.attention);
    attention.rope_layout = RopeLayout::kInterleaved;
    attention.qkv_bias = has_gguf_qkv_bias(settings.file());
    read_gguf_experts(settings, shape);
    shape.selection_bias = true;
    shape.d_hidden = settings.count("expert_feed_forward_length");
    shape.shared_hidden = settings.count("expert_shared_feed_forward_length", 0);
    settings.ignore("expert_shared_count");  // The width says it.
    shape.interleave = {.stride = settings.count("interleave_moe_layer_step"),
                        .first_dense = settings.count("leading_dense_block_count")};
    if (shape.interleave.stride < 1) settings.bad("interleave_moe_layer_step", "at least 1");
    if (shape.interleave.stride > 1 || shape.interleave.first_dense > 0) {
      shape.dense_hidden = settings.count("feed_forward_length");
    }
    settings.ignore("feed_forward_length");
    return config;
  }

  static std::string_view architecture(const presets::ErnieMoeConfig& /*config*/) {
    return "ernie4_5-moe";
  }

  static void write(const presets::ErnieMoeConfig& config, GgufSettingsWriter& to) {
    const presets::ModelShape& shape = config.shape;
    write_gguf_shape(shape, to);
    write_gguf_experts(shape, to);
    to.number(kGgufRmsEpsilon, config.norm_epsilon);
    to.count("expert_feed_forward_length", shape.d_hidden);
    to.count("expert_shared_feed_forward_length", shape.shared_hidden);
    to.count("interleave_moe_layer_step", shape.interleave.stride);
    to.count("leading_dense_block_count", shape.interleave.first_dense);
    to.count("feed_forward_length", shape.dense_hidden > 0 ? shape.dense_hidden : shape.d_hidden);
  }

  static std::vector<presets::TensorName> names(const presets::ErnieMoeConfig& /*config*/,
                                                const Gguf* file) {
    return gguf_names(file, {});
  }
};

}  // namespace weir::io
