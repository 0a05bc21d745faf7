// SPDX-License-Identifier: MIT
/// \file
/// Switch-Base-128.
#pragma once

#include <weir/presets/switch_base.hpp>

namespace weir::presets {

/// 7.4 billion parameters, of which 0.2 are active. Published as an encoder-decoder, of which
/// `make` builds the decoder half. (Fedus et al. 2021, arXiv:2101.03961.)
inline SwitchConfig switch_base_128() {
  return switch_base(128);
}

}  // namespace weir::presets
