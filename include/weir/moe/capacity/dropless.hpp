// SPDX-License-Identifier: MIT
/// \file
/// No limit: every expert takes every token routed to it.
#pragma once

#include <weir/moe/routing.hpp>

namespace weir {

/// Keeps every assignment (Gale et al. 2022, MegaBlocks, arXiv:2211.15841). What one token yields
/// depends on no other token: causal.
struct Dropless {
  void check() const {}

  template <class T>
  void apply(Routing<T>& /*routing*/) const {}
};

}  // namespace weir
