// SPDX-License-Identifier: MIT
/// \file
/// A capacity that looks at the load: Tutel.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/moe/capacity/overflow.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

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
/// largest number of experts one of them has. Assignments that are not kept already are not load.
/// (Hwang et al. 2022, arXiv:2206.03382; Tutel's extract_critical, which drops in
/// rank-major or batch-prioritised order.)
///
/// The alignment matters where every expert is padded to its capacity, as it is in Tutel. Here only
/// what is kept is computed: factor 0 costs what Dropless costs, and an alignment only raises C.
/// Because C depends on T, no drop order makes an earlier token independent of later ones, unless
/// the factor is 0.
struct DynamicCapacity {
  double factor = 0.0;
  Index alignment = 1;
  DropOrder order = DropOrder::kRankMajor;
  Scope scope = Scope::kBatch;
  OnDrop on_drop = OnDrop::kZero;

  /// \throws ConfigError  unless the factor is finite and alignment >= 1.
  void check() const {
    if (!std::isfinite(factor)) {
      fail<ConfigError>("DynamicCapacity: factor = ", factor, ", expected a finite number");
    }
    expect_at_least<Index>("DynamicCapacity", "alignment", alignment, 1);
  }

  /// C for the tokens `begin` to `end`.
  template <class T>
  Index capacity(Routing<T>& routing, Index begin, Index end) const {
    Index c = factor > 0.0 ? bound(routing, begin, end) : largest_load(routing, begin, end);
    if (factor < 0.0) c = std::min(c, bound(routing, begin, end));
    return (c + alignment - 1) / alignment * alignment;
  }

  /// \throws ConfigError  as `check`; if a random order has no pass.rng in training.
  template <class T>
  void apply(Routing<T>& routing) const {
    check();
    routing.pass_dropped = on_drop == OnDrop::kPass;
    routing.for_each_group(scope, [&](Index begin, Index end) {
      drop_overflow(routing, begin, end, capacity(routing, begin, end), order);
    });
  }

 private:
  template <class T>
  static Index largest_load(Routing<T>& routing, Index begin, Index end) {
    std::vector<Index>& load = routing.workspace;
    load.assign(static_cast<std::size_t>(routing.experts()), 0);
    for (Index a = routing.first(begin); a < routing.offsets[static_cast<std::size_t>(end)]; ++a) {
      const auto i = static_cast<std::size_t>(a);
      if (routing.kept[i] != 0) ++load[static_cast<std::size_t>(routing.expert[i])];
    }
    return load.empty() ? 0 : *std::max_element(load.begin(), load.end());
  }

  /// B(|factor|); never more than the assignments, which need not fit an Index otherwise.
  template <class T>
  Index bound(const Routing<T>& routing, Index begin, Index end) const {
    Index k = 0;
    for (Index t = begin; t < end; ++t) k = std::max(k, routing.last(t) - routing.first(t));
    const Index tokens = routing.real_tokens(begin, end);
    const Index share = (tokens + routing.experts() - 1) / routing.experts();
    const double places = std::floor(std::abs(factor) * static_cast<double>(share));
    return k * static_cast<Index>(std::min(places, static_cast<double>(tokens)));
  }
};

}  // namespace weir
