// SPDX-License-Identifier: MIT
/// \file
/// The same capacity whatever the number of tokens, as in Hugging Face's Switch.
#pragma once

#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>
#include <weir/moe/capacity/overflow.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of FixedCapacity.
struct FixedCapacityConfig {
  Index capacity = 64;
  DropOrder order = DropOrder::kRankMajor;
  Scope scope = Scope::kSequence;
  Index group_size = 0;  ///< Rows that share a capacity; 0: all of the scope (see
                         ///< for_each_capacity_group). ST-MoE: 4096 of the batch.
};

/// Each expert takes at most `capacity` assignments of each group that `scope` and `group_size`
/// name. With token-major order, and with rank-major order for k = 1, an earlier token never
/// depends on a later one: causal.
class FixedCapacity : public CapacityBase {
 public:
  template <class T>
  using Cache = OverflowSpace<T>;

  /// \throws ConfigError  as `check`.
  explicit FixedCapacity(FixedCapacityConfig config = {}) : config_(config) { check(); }

  /// \throws ConfigError  unless capacity >= 1 and group_size >= 0.
  void check() const {
    expect_at_least<Index>("FixedCapacity", "capacity", config_.capacity, 1);
    expect_at_least<Index>("FixedCapacity", "group_size", config_.group_size, 0);
  }

  /// \throws ConfigError  if a random order has no pass.rng in training.
  template <class T>
  void forward(const Pass& pass, Routing<T>& routing, Cache<T>& cache) const {
    const auto limit = [&](Index begin, Index end) {
      drop_overflow(pass, routing, begin, end, config_.capacity, config_.order, cache);
    };
    for_each_capacity_group(routing.rows, config_.scope, config_.group_size, limit);
  }

  const FixedCapacityConfig& config() const { return config_; }

 private:
  FixedCapacityConfig config_;
};

}  // namespace weir
