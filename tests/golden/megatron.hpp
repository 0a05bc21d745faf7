// SPDX-License-Identifier: MIT
/// \file
/// The parts of the Megatron-Core family.
#pragma once

#include "golden/families.hpp"

namespace weir::golden {

/// Whether the file has any input of `check_megatron_dropping` that the others do not know.
inline bool is_megatron_dropping(const CaseFile& file) {
  for (const char* name : {"in.routing_map", "in.tokens_per_expert", "in.qb_beta", "out.sinkhorn",
                           "out.sinkhorn_route_k1.map", "out.sinkhorn_route_k2.map"}) {
    if (file.has(name)) return true;
  }
  return false;
}

CheckCase check_megatron_dropping;
CheckCase check_megatron_losses;

}  // namespace weir::golden
