// SPDX-License-Identifier: MIT
/// \file
/// Modules of multi-token prediction as DeepSeek-V3 has them, of a family's own layers.
#pragma once

#include <concepts>
#include <utility>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/multi_token.hpp>
#include <weir/nn/linear.hpp>
#include <weir/presets/compose.hpp>
#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// The modules that `shape` says, each with a sparse layer.
/// \param weight   See MultiTokenConfig.
/// \throws ConfigError  if a size is out of range, or if there are no modules.
template <std::floating_point T>
MultiToken<T> compose_prediction(ModelShape shape, const Parts<T>& parts, double weight, Rng& rng) {
  shape.check();
  shape.interleave = {};
  const Index d = shape.d_model;
  std::vector<MultiTokenModule<T>> modules;
  for (Index m = 0; m < shape.prediction_modules; ++m) {
    Linear<T> projection(2 * d, d, rng);
    modules.push_back({parts.norm(), parts.norm(), std::move(projection),
                       make_layer(shape, shape.layers + m, parts, rng), parts.norm()});
  }
  return MultiToken<T>(std::move(modules), {.weight = weight});
}

}  // namespace weir::presets
