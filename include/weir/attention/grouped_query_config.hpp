// SPDX-License-Identifier: MIT
/// \file
/// The numbers of a grouped-query attention layer.
#pragma once

#include <cmath>
#include <variant>

#include <weir/attention/heads.hpp>
#include <weir/attention/qk_norm.hpp>
#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/rope.hpp>
#include <weir/ops/rope_scaling.hpp>

namespace weir {

/// Settings of `GroupedQueryAttention`. Options that are not given are off. Queries, keys and
/// values pass through projection, bias, clamp, norms kFull and kPerHead, rotation, norm kL2 and
/// temperature, in this order.
struct GroupedQueryConfig {
  Index d_model = 0;
  Index heads = 0;
  Index kv_heads = 0;  ///< Divides heads: `heads` is multi-head, 1 is multi-query attention.
  Index head_dim = 0;  ///< 0 stands for d_model / heads.

  /// How many numbers of each head are rotated, from its first on; even. 0 stands for head_dim. The
  /// others know no positions. (Partial rotation, as in GPT-NeoX; `partial_rotary_factor` in
  /// Hugging Face's is rotary_dim / head_dim.)
  Index rotary_dim = 0;
  double rope_theta = 1e4;
  RopeLayout rope_layout = RopeLayout::kHalfSplit;
  bool qkv_bias = false;     ///< Whether the projections to queries, keys and values have one.
  bool output_bias = false;  ///< Whether the projection of the heads' outputs has one.
  bool rope = true;          ///< Whether rotation encodes positions; if not, nothing does (NoPE).
  RopeScaling rope_scaling = NoScaling{};  ///< Stretches the rotation; a Yarn scales scores too.
  double scale = 0.0;     ///< Multiplies scores; 0 stands for 1 / sqrt(head_dim) times the Yarn's.
  double softcap = 0.0;   ///< See `AttentionHeads`.
  Index window = 0;       ///< See `AttentionHeads`.
  Index chunk = 0;        ///< See `AttentionHeads`.
  double clip_qkv = 0.0;  ///< Above zero, the bound within which queries, keys and values are kept.
  QkNorm qk_norm = QkNorm::kNone;
  double qk_norm_epsilon = 1e-6;
  bool sinks = false;  ///< Whether each head has a learned logit, see `CausalAttention`.

  /// Above zero, the query at position t is multiplied by
  ///
  ///     1 + temperature_scale * log(1 + floor((t + 1) / temperature_floor))
  ///
  /// (Llama 4's released code, in layers without rotation; 0.1 there.)
  double temperature_scale = 0.0;
  Index temperature_floor = 8192;

  double init_scale = 1.0;  ///< `scale` of `switch_init`.

  /// Whether query weights begin 1 / (scale * sqrt(head_dim)) times as large, so that scores begin
  /// as with the usual scale. T5 and its successors, whose scale is 1, begin like this.
  /// (`fold_scaling_into_initializer` in Mesh TensorFlow.)
  bool fold_scale = false;

  bool operator==(const GroupedQueryConfig&) const = default;

  /// How many numbers of each head are rotated, if there is rotation.
  Index rotated() const { return rotary_dim == 0 ? head_dim : rotary_dim; }

  Index query_width() const { return heads * head_dim; }
  Index kv_width() const { return kv_heads * head_dim; }

  AttentionHeads shape() const {
    double factor = scale;
    if (factor == 0.0) {
      factor = score_scale(rope_scaling) / std::sqrt(static_cast<double>(head_dim));
    }
    return {heads, kv_heads, head_dim, head_dim, factor, softcap, window, chunk};
  }

  /// By how much initial query weights differ from those of keys.
  double query_init_factor() const {
    return fold_scale ? 1.0 / (scale * std::sqrt(static_cast<double>(head_dim))) : 1.0;
  }

  double temperature(Index position) const {
    const Index steps = (position + 1) / temperature_floor;
    return 1.0 + temperature_scale * std::log(1.0 + static_cast<double>(steps));
  }

  /// A copy with head_dim filled in.
  /// \throws ConfigError  if a size is out of range, heads do not divide evenly, or options
  ///                      contradict each other.
  GroupedQueryConfig checked() const {
    constexpr auto kWhere = "GroupedQueryAttention";
    GroupedQueryConfig c = *this;
    expect_at_least<Index>(kWhere, "d_model", d_model, 1);
    expect_at_least<Index>(kWhere, "heads", heads, 1);
    expect_at_least<Index>(kWhere, "kv_heads", kv_heads, 1);
    expect_at_least<Index>(kWhere, "head_dim", head_dim, 0);
    if (heads % kv_heads != 0) {
      throw_error<ConfigError>(kWhere, ": kv_heads = ", kv_heads,
                               ", expected a divisor of heads = ", heads);
    }
    if (head_dim == 0) {
      if (d_model % heads != 0) {
        throw_error<ConfigError>(kWhere, ": heads = ", heads,
                                 ", expected a divisor of d_model = ", d_model,
                                 " where head_dim is not given");
      }
      c.head_dim = d_model / heads;
    }
    expect_in<Index>(kWhere, "rotary_dim", rotary_dim, 0, c.head_dim);
    if (rope && c.rotated() % 2 != 0) {
      throw_error<ConfigError>(kWhere, ": ", rotary_dim == 0 ? "head_dim" : "rotary_dim", " = ",
                               c.rotated(), ", expected an even number");
    }
    expect_positive(kWhere, "rope_theta", rope_theta);
    expect_at_least(kWhere, "scale", scale, 0.0);
    expect_at_least(kWhere, "softcap", softcap, 0.0);
    expect_at_least(kWhere, "clip_qkv", clip_qkv, 0.0);
    expect_at_least(kWhere, "temperature_scale", temperature_scale, 0.0);
    expect_at_least<Index>(kWhere, "window", window, 0);
    expect_at_least<Index>(kWhere, "chunk", chunk, 0);
    expect_at_least<Index>(kWhere, "temperature_floor", temperature_floor, 1);
    if (qk_norm != QkNorm::kNone) expect_positive(kWhere, "qk_norm_epsilon", qk_norm_epsilon);
    const auto expect_rope = [&](bool given, const char* what) {
      if (given && !rope) {
        throw_error<ConfigError>(kWhere, ": ", what, " without rope, expected both");
      }
    };
    expect_rope(!std::holds_alternative<NoScaling>(rope_scaling), "rope_scaling");
    expect_rope(rotary_dim > 0, "rotary_dim");
    expect_rope(qk_norm == QkNorm::kL2, "qk_norm = kL2");
    if (rope && temperature_scale > 0.0) {
      throw_error<ConfigError>(kWhere, ": temperature_scale = ", temperature_scale,
                               " with rope, expected it only without");
    }
    if (fold_scale && scale == 0.0) {
      throw_error<ConfigError>(kWhere, ": fold_scale without scale, expected both");
    }
    return c;
  }
};

}  // namespace weir
