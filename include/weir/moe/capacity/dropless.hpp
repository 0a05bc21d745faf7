// SPDX-License-Identifier: MIT
/// \file
/// No limit: every expert takes every token routed to it.
#pragma once

#include <weir/moe/concepts.hpp>

namespace weir {

/// Keeps every assignment (Gale et al. 2022, MegaBlocks, arXiv:2211.15841). What one token yields
/// depends on no other token: causal.
class Dropless : public CapacityBase {
 public:
  template <class T>
  void forward(const Pass& /*pass*/, Routing<T>& /*routing*/, Cache<T>& /*cache*/) const {}
};

}  // namespace weir
