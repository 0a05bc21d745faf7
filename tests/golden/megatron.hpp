// SPDX-License-Identifier: MIT
/// \file
/// The parts of the Megatron-Core family.
#pragma once

#include "golden/families.hpp"

namespace weir::golden {

CheckCase check_megatron_dropping;
CheckCase check_megatron_losses;

}  // namespace weir::golden
