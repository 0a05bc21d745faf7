// SPDX-License-Identifier: MIT
/// \file
/// Published models made small.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <variant>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// Target sizes. 0 picks the smallest value that keeps the structure.
struct Scale {
  Index d_model = 32;
  Index vocab = 256;
  Index layers = 0;   ///< 0: one period of everything that alternates, at least 2.
  Index experts = 0;  ///< 0: twice as many as a token visits, at least 4. A dense model has none.
  Index window = 8;   ///< The window or chunk of attention that has one.
};

namespace detail {

/// Scales sizes in proportion to the widths.
class Shrink {
 public:
  Shrink(Index from, Index to) : factor_(static_cast<double>(to) / static_cast<double>(from)) {}

  /// The multiple of `step` that is nearest to size * factor, at least `step`; 0 stays 0.
  Index operator()(Index size, Index step) const {
    if (size == 0) return 0;
    const double steps = static_cast<double>(size) * factor_ / static_cast<double>(step);
    return step * std::max<Index>(1, static_cast<Index>(std::lround(steps)));
  }

 private:
  double factor_;
};

/// Leaves two key and value heads, or one if there was only one, with as many queries to each as
/// before.
inline AttentionShape scaled(GroupedQueryConfig a, Index d_model, const Shrink& shrink,
                             Index window) {
  a.d_model = d_model;
  a = a.checked();
  const Index width = a.heads * a.head_dim;
  const Index queries = a.heads / a.kv_heads;
  a.kv_heads = std::min<Index>(a.kv_heads, 2);
  a.heads = queries * a.kv_heads;
  const Index head_dim = a.head_dim;
  a.head_dim = std::max<Index>(4, shrink(width, 2 * a.heads) / a.heads);
  if (a.rotary_dim > 0) a.rotary_dim = Shrink(head_dim, a.head_dim)(a.rotary_dim, 2);
  a.window = std::min(a.window, window);
  a.chunk = std::min(a.chunk, window);
  a.temperature_floor = std::min(a.temperature_floor, window);
  return a;
}

inline AttentionShape scaled(LatentConfig a, Index /*d_model*/, const Shrink& shrink,
                             Index /*window*/) {
  a.heads = std::min<Index>(a.heads, 2);
  a.q_rank = shrink(a.q_rank, 12);
  a.kv_rank = shrink(a.kv_rank, 8);
  a.nope_dim = shrink(a.nope_dim, 8);
  a.rope_dim = shrink(a.rope_dim, 4);
  a.value_dim = shrink(a.value_dim, 8);
  return a;
}

}  // namespace detail

/// The model with other sizes and the same structure: which layers are sparse and in what order,
/// how many experts a token visits, how many queries share a key, what is tied, biased, shared or
/// normalised. Widths keep roughly their proportion to d_model. If the model begins with dense
/// layers, one of them is left.
/// \throws ConfigError  if a size is out of range, if there are fewer layers than the structure
///                      needs, or fewer experts than a token visits.
inline ModelShape scaled(ModelShape shape, const Scale& to = {}) {
  shape.check();
  expect_at_least<Index>("scaled", "d_model", to.d_model, 1);
  expect_at_least<Index>("scaled", "vocab", to.vocab, 1);
  expect_at_least<Index>("scaled", "window", to.window, 1);
  const detail::Shrink shrink(shape.d_model, to.d_model);
  const auto scaled_attention = [&](const AttentionShape& attention) {
    return std::visit(
        [&](const auto& a) { return detail::scaled(a, shape.d_model, shrink, to.window); },
        attention);
  };
  shape.attention = scaled_attention(shape.attention);
  if (shape.other_attention) shape.other_attention = scaled_attention(*shape.other_attention);
  shape.d_model = to.d_model;
  shape.vocab = to.vocab;

  shape.interleave.first_dense = std::min<Index>(shape.interleave.first_dense, 1);
  const Index attentions = shape.other_attention ? shape.others.stride : 1;
  const Index period = shape.interleave.first_dense + std::lcm(shape.interleave.stride, attentions);
  if (to.layers != 0) expect_at_least<Index>("scaled", "layers", to.layers, period);
  shape.layers = to.layers == 0 ? std::max<Index>(2, period) : to.layers;
  if (shape.encoder_layers > 0) shape.encoder_layers = shape.layers;

  if (shape.experts > 0) {
    shape.experts =
        to.experts == 0 ? std::min(shape.experts, std::max<Index>(4, 2 * shape.k)) : to.experts;
  }
  // Shared experts that are as wide as others stay that many.
  const bool whole = shape.d_hidden > 0 && shape.shared_hidden % shape.d_hidden == 0;
  const Index shared = whole ? shape.shared_hidden / shape.d_hidden : 0;
  for (Index* width :
       {&shape.d_hidden, &shape.shared_hidden, &shape.dense_hidden, &shape.extra_hidden}) {
    *width = shrink(*width, 4);
  }
  if (whole) shape.shared_hidden = shared * shape.d_hidden;
  shape.check();
  return shape;
}

/// A preset with other sizes and everything else unchanged.
template <Preset Config>
Config scaled(Config config, const Scale& to = {}) {
  config.shape = scaled(config.shape, to);
  return config;
}

}  // namespace weir::presets
