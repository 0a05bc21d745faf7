// SPDX-License-Identifier: MIT
/// \file
/// OpenMoE-Base.
#pragma once

#include <weir/presets/openmoe.hpp>

namespace weir::presets {

/// 650 million parameters with networks of three matrices. (Xue et al. 2024, arXiv:2402.01739.
/// The released config has networks 2048 wide.)
inline OpenMoEConfig openmoe_base() {
  return {.shape = detail::openmoe_shape(12, 768, 12, 64, 3072, 4, 16)};
}

}  // namespace weir::presets
