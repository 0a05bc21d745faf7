// SPDX-License-Identifier: MIT
/// \file
/// The architecture "grok" of GGUF files.
#pragma once

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
#include <weir/presets/grok_1.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

/// llama.cpp always divides the weights of the experts by their sum, where xAI's code does not: the
/// config of a loaded model says renormalise = true, and a model without is not saved. It also
/// takes the GELU from a table of 16-bit numbers, so that its logits have three correct digits.
template <>
struct GgufFamily<presets::GrokConfig> {
  static constexpr bool kMayBeTied = true;

  /// What is not given has the value of Grok-1, as in llama.cpp.
  static bool reads(const Gguf& file) { return file.text("general.architecture") == "grok"; }

  static presets::GrokConfig read(GgufSettings& settings) {
    const presets::GrokConfig usual = presets::grok_1();
    presets::GrokConfig config{
        .shape = read_gguf_shape(settings),
        .norm_epsilon = settings.number(kGgufRmsEpsilon),
        .embedding_multiplier = settings.number("embedding_scale", usual.embedding_multiplier),
        .logit_multiplier = settings.number("logit_scale", usual.logit_multiplier),
        .renormalise = true};
    presets::ModelShape& shape = config.shape;
    read_gguf_experts(settings, shape);
    shape.post_norms = true;
    const Index dense = settings.count("feed_forward_length");
    const Index own = settings.count("expert_feed_forward_length", 0);
    shape.d_hidden = own > 0 ? own : dense;
    auto& attention = std::get<GroupedQueryConfig>(shape.attention);
    if (!std::holds_alternative<NoScaling>(attention.rope_scaling)) {
      settings.bad("rope.scaling.type", "none in this architecture");
    }
    const double scale = settings.number("attention.output_scale", 0.08838834764831845);
    // In 32 bits it may be the one that attention has by itself.
    const bool is_usual = static_cast<float>(scale) == static_cast<float>(attention.shape().scale);
    if (!is_usual) attention.scale = scale;
    attention.softcap = settings.number("attn_logit_softcapping", 30.0);
    settings.expect_number("final_logit_softcapping", 0.0);
    settings.ignore("router_logit_softcapping");  // Read by nobody.
    return config;
  }

  static std::string_view architecture(const presets::GrokConfig& /*config*/) { return "grok"; }

  static void write(const presets::GrokConfig& config, GgufSettingsWriter& to) {
    expect_renormalise(config.renormalise, true);
    expect_all_sparse(config.shape);
    expect_square_queries(config.shape);
    write_gguf_shape(config.shape, to);
    write_gguf_experts(config.shape, to);
    const presets::ModelShape shape = presets::settled(config.shape);
    const GroupedQueryConfig& attention = gguf_grouped_query(shape);
    to.number(kGgufRmsEpsilon, config.norm_epsilon);
    to.count("feed_forward_length", shape.d_hidden);
    to.number("embedding_scale", config.embedding_multiplier);
    to.number("logit_scale", config.logit_multiplier);
    to.number("attention.output_scale", attention.scale);
    to.number("attn_logit_softcapping", attention.softcap);
  }

  static std::vector<presets::TensorName> names(const presets::GrokConfig& /*config*/,
                                                const Gguf* file) {
    return gguf_names(file, presets::kGrokGgufNames);
  }
};

}  // namespace weir::io
