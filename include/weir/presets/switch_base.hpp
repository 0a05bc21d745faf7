// SPDX-License-Identifier: MIT
/// \file
/// The Switch Transformer of T5-Base, with any number of experts.
#pragma once

#include <weir/presets/switch_transformer.hpp>

namespace weir::presets {

/// 12 layers in the encoder and 12 in the decoder, half of them sparse; see SwitchConfig for what
/// `make` builds.
inline SwitchConfig switch_base(Index experts) {
  ModelShape shape = detail::t5_shape(12, 768, 12, 64, 3072, 2, experts, 1);
  shape.tied = true;
  shape.network = Network::kPlain;
  return {.shape = shape};
}

}  // namespace weir::presets
