// SPDX-License-Identifier: MIT
/// \file
/// The same capacity whatever the number of tokens, as in Hugging Face's Switch.
#pragma once

#include <weir/core/error.hpp>
#include <weir/moe/capacity/overflow.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Each expert takes at most `capacity` assignments of each group that `scope` names. With
/// token-major order, and with rank-major order for k = 1, an earlier token never depends on a
/// later one: causal.
struct FixedCapacity {
  Index capacity = 64;
  DropOrder order = DropOrder::kRankMajor;
  Scope scope = Scope::kSequence;
  OnDrop on_drop = OnDrop::kZero;

  /// \throws ConfigError  unless capacity >= 1.
  void check() const { expect_at_least<Index>("FixedCapacity", "capacity", capacity, 1); }

  /// \throws ConfigError  as `check`.
  template <class T>
  void apply(Routing<T>& routing) const {
    check();
    routing.pass_dropped = on_drop == OnDrop::kPass;
    routing.for_each_group(scope, [&](Index begin, Index end) {
      drop_overflow(routing, begin, end, capacity, order);
    });
  }
};

}  // namespace weir
