// SPDX-License-Identifier: MIT
/// \file
/// A capacity in proportion to the tokens: Switch, GShard, ST-MoE, DeepSpeed, Megatron-Core.
#pragma once

#include <algorithm>
#include <cmath>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/moe/capacity/overflow.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// How a fractional capacity becomes a number of tokens.
enum class Rounding {
  kDown,     ///< As Mesh TensorFlow, Tutel and MegaBlocks.
  kNearest,  ///< Halves to the even neighbour, as flaxformer.
  kUp,       ///< As DeepSpeed and Megatron-Core.
};

/// Each expert takes at most
///
///     C = max(minimum, round(factor * T * k / experts))      count_k, as Megatron-Core, DeepSpeed
///     C = max(minimum, round(factor * T / experts))          otherwise, as Switch, Mesh TensorFlow
///
/// assignments. T is the number of real tokens in the group that `scope` and `group_size` name,
/// T * k their number of assignments. What is dropped yields zero (see OnDrop), and its weight is
/// not given to the token's other experts, but by RenormaliseKept.
///
/// (Fedus et al. 2021, arXiv:2101.03961, eq. 3; Lepikhin et al. 2020, arXiv:2006.16668, section
/// 2.2.) Because C depends on T, no drop order makes an earlier token independent of the number of
/// tokens; see DropOrder for its dependence on their routing.
struct CapacityFactor {
  double train = 1.25;    ///< The factor where pass.training is set.
  double evaluate = 2.0;  ///< The factor elsewhere.
  bool count_k = true;
  Rounding rounding = Rounding::kUp;
  Index minimum = 4;
  DropOrder order = DropOrder::kRankMajor;
  Scope scope = Scope::kBatch;
  OnDrop on_drop = OnDrop::kZero;
  Index group_size = 0;  ///< Rows that share a capacity; 0: all of the scope (see
                         ///< for_each_capacity_group). ST-MoE: 4096 of the batch.

  /// \throws ConfigError  unless both factors are finite and > 0, minimum >= 0 and group_size >= 0.
  void check() const {
    check_factor("train", train);
    check_factor("evaluate", evaluate);
    expect_at_least<Index>("CapacityFactor", "minimum", minimum, 0);
    expect_at_least<Index>("CapacityFactor", "group_size", group_size, 0);
  }

  /// C for `count` tokens or, with count_k, assignments; a factor never makes it more than `count`.
  Index capacity(Index count, Index experts, bool training) const {
    const double exact =
        (training ? train : evaluate) * static_cast<double>(count) / static_cast<double>(experts);
    const double rounded = rounding == Rounding::kDown ? std::floor(exact)
                           : rounding == Rounding::kUp ? std::ceil(exact)
                                                       : std::nearbyint(exact);
    // Beyond `count` a capacity limits nothing, and need not fit an Index.
    return std::max(minimum, static_cast<Index>(std::min(rounded, static_cast<double>(count))));
  }

  /// \throws ConfigError  as `check`; if a random order has no pass.rng in training.
  template <class T>
  void apply(Routing<T>& routing) const {
    check();
    routing.pass_dropped = on_drop == OnDrop::kPass;
    for_each_capacity_group(routing, scope, group_size, [&](Index begin, Index end) {
      const Index assignments =
          routing.offsets[static_cast<std::size_t>(end)] - routing.first(begin);
      const Index count = count_k ? assignments : routing.real_tokens(begin, end);
      drop_overflow(routing, begin, end, capacity(count, routing.experts(), routing.training),
                    order);
    });
  }

 private:
  static void check_factor(std::string_view name, double factor) {
    if (!(factor > 0.0 && std::isfinite(factor))) {
      fail<ConfigError>("CapacityFactor: ", name, " = ", factor, ", expected a finite number > 0");
    }
  }
};

}  // namespace weir
