// SPDX-License-Identifier: MIT
/// \file
/// The same capacity whatever the number of tokens, as in Hugging Face's Switch.
#pragma once

#include <weir/core/error.hpp>
#include <weir/moe/capacity/overflow.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Each expert takes at most `capacity` assignments of each group that `scope` and `group_size`
/// name. With token-major order, and with rank-major order for k = 1, an earlier token never
/// depends on a later one: causal.
struct FixedCapacity {
  Index capacity = 64;
  DropOrder order = DropOrder::kRankMajor;
  Scope scope = Scope::kSequence;
  OnDrop on_drop = OnDrop::kZero;
  Index group_size = 0;  ///< Rows that share a capacity; 0: all of the scope (see
                         ///< for_each_capacity_group). ST-MoE: 4096 of the batch.

  /// \throws ConfigError  unless capacity >= 1 and group_size >= 0.
  void check() const {
    expect_at_least<Index>("FixedCapacity", "capacity", capacity, 1);
    expect_at_least<Index>("FixedCapacity", "group_size", group_size, 0);
  }

  /// \throws ConfigError  as `check`; if a random order has no pass.rng in training.
  template <class T>
  void apply(Routing<T>& routing) const {
    check();
    routing.pass_dropped = on_drop == OnDrop::kPass;
    for_each_capacity_group(routing, scope, group_size, [&](Index begin, Index end) {
      drop_overflow(routing, begin, end, capacity, order);
    });
  }
};

}  // namespace weir
