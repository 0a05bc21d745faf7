// SPDX-License-Identifier: MIT
/// \file
/// A capacity in proportion to the tokens: Switch, GShard, ST-MoE, DeepSpeed, Megatron-Core.
#pragma once

#include <algorithm>
#include <cmath>

#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>
#include <weir/moe/capacity/overflow.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// How a fractional capacity becomes a number of tokens.
enum class Rounding {
  kDown,     ///< As Mesh TensorFlow, Tutel and MegaBlocks.
  kNearest,  ///< Halves to the even neighbour, as flaxformer.
  kUp,       ///< As DeepSpeed and Megatron-Core.
};

/// Settings of CapacityFactor.
struct CapacityFactorConfig {
  double train = 1.25;    ///< The factor where pass.training is set.
  double evaluate = 2.0;  ///< The factor elsewhere.
  bool count_k = true;    ///< Whether C grows with the number of experts of a token.
  Rounding rounding = Rounding::kUp;
  Index minimum = 4;
  DropOrder order = DropOrder::kRankMajor;
  Scope scope = Scope::kBatch;
  Index group_size = 0;  ///< Rows that share a capacity; 0: all of the scope (see
                         ///< for_each_capacity_group). ST-MoE: 4096 of the batch.
};

/// Each expert takes at most
///
///     C = max(minimum, round((T * k / experts) * factor))    count_k, as Megatron-Core, DeepSpeed
///     C = max(minimum, round((factor * T) / experts))        otherwise, as Switch, Mesh TensorFlow
///
/// assignments, computed in double and in this order, on which the last rounding can depend. T is
/// the number of real tokens in the group that `scope` and `group_size` name, T * k their number of
/// assignments. Mesh TensorFlow and flaxformer cut groups by rows as well, and route no padding
/// either, but count it in T, so that C is a constant: with padding their C is larger. `experts`
/// are those that the pass allows to some token: with experts that are switched off for all tokens,
/// the others have the places of a layer without them; one that is forbidden to some tokens counts.
/// What is dropped yields zero, unless the bank is in a PassDropped; its weight is not given to the
/// token's other experts, unless the policy is in a RenormaliseKept.
///
/// (Fedus et al. 2021, arXiv:2101.03961, eq. 3; Lepikhin et al. 2020, arXiv:2006.16668, section
/// 2.2.) Because C depends on T, no drop order makes an earlier token independent of the number of
/// tokens; see DropOrder for its dependence on their routing.
class CapacityFactor : public CapacityBase {
 public:
  template <class T>
  using Cache = OverflowSpace<T>;

  /// \throws ConfigError  as `check`.
  explicit CapacityFactor(CapacityFactorConfig config = {}) : config_(config) { check(); }

  /// \throws ConfigError  unless both factors are finite and > 0, minimum >= 0 and group_size >= 0.
  void check() const {
    expect_positive("CapacityFactor", "train", config_.train);
    expect_positive("CapacityFactor", "evaluate", config_.evaluate);
    expect_at_least<Index>("CapacityFactor", "minimum", config_.minimum, 0);
    expect_at_least<Index>("CapacityFactor", "group_size", config_.group_size, 0);
  }

  /// C for `count` tokens or, with count_k, assignments; a factor never makes it more than `count`.
  Index capacity(Index count, Index experts, bool training) const {
    const double factor = training ? config_.train : config_.evaluate;
    const auto tokens = static_cast<double>(count);
    const auto share = static_cast<double>(experts);
    const double exact = config_.count_k ? tokens / share * factor : factor * tokens / share;
    const double rounded = config_.rounding == Rounding::kDown ? std::floor(exact)
                           : config_.rounding == Rounding::kUp ? std::ceil(exact)
                                                               : std::nearbyint(exact);
    // Beyond `count` a capacity limits nothing, and need not fit an Index.
    return std::max(config_.minimum,
                    static_cast<Index>(std::min(rounded, static_cast<double>(count))));
  }

  /// \throws ConfigError  if a random order has no pass.rng in training.
  template <class T>
  void forward(const Pass& pass, Routing<T>& routing, Cache<T>& cache) const {
    const auto limit = [&](Index begin, Index end) {
      const Index assignments = routing.offsets[end] - routing.first(begin);
      const Index count = config_.count_k ? assignments : routing.rows.real(begin, end);
      const Index c = capacity(count, routing.open_experts(), pass.training);
      drop_overflow(pass, routing, begin, end, c, config_.order, cache);
    };
    for_each_capacity_group(routing.rows, config_.scope, config_.group_size, limit);
  }

  const CapacityFactorConfig& config() const { return config_; }

 private:
  CapacityFactorConfig config_;
};

}  // namespace weir
