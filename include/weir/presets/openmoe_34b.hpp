// SPDX-License-Identifier: MIT
/// \file
/// OpenMoE-34B.
#pragma once

#include <weir/presets/openmoe.hpp>

namespace weir::presets {

/// 34.6 billion parameters with networks of three matrices, 46.3 as released. (Xue et al. 2024,
/// arXiv:2402.01739.)
inline OpenMoEConfig openmoe_34b() {
  return {.shape = detail::openmoe_shape(32, 3072, 24, 128, 12288, 4, 32)};
}

}  // namespace weir::presets
