// SPDX-License-Identifier: MIT
/// \file
/// OpenMoE-8B.
#pragma once

#include <weir/presets/openmoe.hpp>

namespace weir::presets {

/// 8.8 billion parameters with networks of three matrices, 11.9 as released. (Xue et al. 2024,
/// arXiv:2402.01739.)
inline OpenMoEConfig openmoe_8b() {
  return {.shape = detail::openmoe_shape(24, 2048, 24, 128, 8192, 6, 32)};
}

}  // namespace weir::presets
