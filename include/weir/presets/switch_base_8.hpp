// SPDX-License-Identifier: MIT
/// \file
/// Switch-Base-8.
#pragma once

#include <weir/presets/switch_base.hpp>

namespace weir::presets {

/// 0.6 billion parameters, of which 0.2 are active. Published as an encoder-decoder, of which
/// `make` builds the decoder half. (Fedus et al. 2021, arXiv:2101.03961.)
inline SwitchConfig switch_base_8() {
  return switch_base(8);
}

}  // namespace weir::presets
