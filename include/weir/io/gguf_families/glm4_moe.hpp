// SPDX-License-Identifier: MIT
/// \file
/// The architecture "glm4moe" of GGUF files: GLM-4.5.
#pragma once

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
#include <weir/presets/glm_4_5.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

/// Files have the module of multi-token prediction as a last layer, which is read; llama.cpp does
/// not compute it, and `save_gguf` leaves it out.
template <>
struct GgufFamily<presets::Glm4MoeConfig> {
  static constexpr bool kMayBeTied = true;

  static bool reads(const Gguf& file) { return file.text("general.architecture") == "glm4moe"; }

  static presets::Glm4MoeConfig read(GgufSettings& settings) {
    presets::Glm4MoeConfig config{.shape = read_gguf_shape(settings, GgufRotation::kPart),
                                  .norm_epsilon = settings.number(kGgufRmsEpsilon),
                                  .renormalise = settings.flag("expert_weights_norm", false),
                                  .scale = read_weights_scale(settings)};
    read_layers(settings, config.shape);
    settings.expect_count(kGgufGate, Index(GgufGate::kSigmoid));
    auto& attention = std::get<GroupedQueryConfig>(config.shape.attention);
    attention.qkv_bias = has_gguf_qkv_bias(settings.file());
    if (settings.file().has_tensor("blk.0.attn_q_norm.weight")) {
      attention.qk_norm = QkNorm::kPerHead;
      attention.qk_norm_epsilon = config.norm_epsilon;
    }
    return config;
  }

  static std::vector<std::string_view> ignored(const Gguf& /*file*/) {
    // What modules of prediction share with the model.
    return {"blk.*.nextn.embed_tokens.weight", "blk.*.nextn.shared_head_head.weight"};
  }

  static std::string_view architecture(const presets::Glm4MoeConfig& /*config*/) {
    return "glm4moe";
  }

  static void write(const presets::Glm4MoeConfig& config, GgufSettingsWriter& to) {
    const presets::ModelShape& shape = config.shape;
    if (config.groups.limits()) {
      throw_error<ConfigError>("save_gguf: groups.allowed = ", config.groups.allowed,
                               " of groups.count = ", config.groups.count,
                               ", expected all, as llama.cpp has it in this family");
    }
    const Index shared = gguf_shared_count(shape);
    write_gguf_shape(shape, to, GgufRotation::kPart);
    write_gguf_experts(shape, to);
    to.number(kGgufRmsEpsilon, config.norm_epsilon);
    to.count("leading_dense_block_count", shape.interleave.first_dense);
    to.count("feed_forward_length", shape.dense_hidden > 0 ? shape.dense_hidden : shape.d_hidden);
    to.count("expert_feed_forward_length", shape.d_hidden);
    to.count("expert_shared_count", shared);
    to.number("expert_weights_scale", config.scale);
    to.flag("expert_weights_norm", config.renormalise);
    to.count(kGgufGate, Index(GgufGate::kSigmoid));
  }

  static std::vector<presets::TensorName> names(const presets::Glm4MoeConfig& /*config*/,
                                                const Gguf* file) {
    return gguf_names(file, presets::kGlm4MoeGgufNames);
  }

 private:
  static void read_layers(GgufSettings& settings, presets::ModelShape& shape) {
    constexpr auto kModules = "nextn_predict_layers";
    read_gguf_experts(settings, shape);
    shape.selection_bias = true;
    shape.prediction_modules = settings.count(kModules, 0);
    if (shape.prediction_modules >= shape.layers) {
      settings.bad(kModules, "less than block_count = " + std::to_string(shape.layers));
    }
    shape.layers -= shape.prediction_modules;
    shape.interleave.first_dense = settings.count("leading_dense_block_count", 0);
    shape.d_hidden = settings.count("expert_feed_forward_length");
    shape.shared_hidden = settings.count("expert_shared_count") * shape.d_hidden;
    if (shape.interleave.first_dense > 0) {
      shape.dense_hidden = settings.count("feed_forward_length");
    }
    settings.ignore("feed_forward_length");
  }
};

}  // namespace weir::io
