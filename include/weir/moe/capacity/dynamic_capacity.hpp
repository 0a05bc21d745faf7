// SPDX-License-Identifier: MIT
/// \file
/// A capacity that looks at the load: Tutel.
#pragma once

#include <algorithm>
#include <cmath>

#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>
#include <weir/moe/capacity/overflow.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of DynamicCapacity.
struct DynamicCapacityConfig {
  double factor = 0.0;
  Index alignment = 1;
  DropOrder order = DropOrder::kRankMajor;
  Scope scope = Scope::kBatch;
};

/// Each expert takes at most C assignments of each group that `scope` names:
///
///     L = max_e (assignments to e)             the largest load
///     B(f) = k * floor(f * ceil(T / experts))
///
///     factor > 0     C = B(factor)
///     factor = 0     C = L: nothing is dropped
///     factor < 0     C = min(L, B(-factor))
///
/// rounded up to a multiple of `alignment`. T is the number of real tokens of the group, k the
/// largest number of experts one of them has, and `experts` are those that the pass allows to some
/// token. Assignments that are not kept already are not load.
/// (Hwang et al. 2022, arXiv:2206.03382; Tutel's extract_critical, which drops in
/// rank-major or batch-prioritised order.)
///
/// The alignment matters where every expert is padded to its capacity, as it is in Tutel. Here only
/// what is kept is computed: factor 0 costs what Dropless costs, and an alignment only raises C.
/// Because C depends on T, no drop order makes an earlier token independent of later ones, unless
/// the factor is 0.
class DynamicCapacity : public CapacityBase {
 public:
  template <class T>
  using Cache = OverflowSpace<T>;

  /// \throws ConfigError  as `check`.
  explicit DynamicCapacity(DynamicCapacityConfig config = {}) : config_(config) { check(); }

  /// \throws ConfigError  unless the factor is finite and alignment >= 1.
  void check() const {
    expect_finite("DynamicCapacity", "factor", config_.factor);
    expect_at_least<Index>("DynamicCapacity", "alignment", config_.alignment, 1);
  }

  /// C for the tokens `begin` to `end`.
  template <class T>
  Index capacity(const Routing<T>& routing, Index begin, Index end, Cache<T>& cache) const {
    Index c = config_.factor > 0.0 ? bound(routing, begin, end)
                                   : largest_load(routing, begin, end, cache.count);
    if (config_.factor < 0.0) c = std::min(c, bound(routing, begin, end));
    const Index beyond = c % config_.alignment;
    return beyond == 0 ? c : c + (config_.alignment - beyond);
  }

  /// \throws ConfigError  if a random order has no pass.rng in training.
  template <class T>
  void forward(const Pass& pass, Routing<T>& routing, Cache<T>& cache) const {
    routing.rows.for_each_group(config_.scope, [&](Index begin, Index end) {
      const Index c = capacity(routing, begin, end, cache);
      drop_overflow(pass, routing, begin, end, c, config_.order, cache);
    });
  }

  const DynamicCapacityConfig& config() const { return config_; }

 private:
  static Index largest_load(const Assignments& routing, Index begin, Index end, List<Index>& load) {
    load.assign(routing.experts(), 0);
    for (Index a = routing.first(begin); a < routing.offsets[end]; ++a) {
      if (routing.kept[a] != 0) ++load[routing.expert[a]];
    }
    return load.empty() ? 0 : *std::max_element(load.begin(), load.end());
  }

  /// B(|factor|); never more than the assignments, which need not fit an Index otherwise.
  template <class T>
  Index bound(const Routing<T>& routing, Index begin, Index end) const {
    Index k = 0;
    for (Index t = begin; t < end; ++t) k = std::max(k, routing.last(t) - routing.first(t));
    const Index tokens = routing.rows.real(begin, end);
    const Index share = (tokens + routing.open_experts() - 1) / routing.open_experts();
    const double places = std::floor(std::abs(config_.factor) * static_cast<double>(share));
    return k * static_cast<Index>(std::min(places, static_cast<double>(tokens)));
  }

  DynamicCapacityConfig config_;
};

}  // namespace weir
