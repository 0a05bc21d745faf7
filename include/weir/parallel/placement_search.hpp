// SPDX-License-Identifier: MIT
/// \file
/// A placement that is changed step by step, with the cost of its traffic.
#pragma once

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/parallel/placement.hpp>
#include <weir/parallel/routed_tokens.hpp>
#include <weir/parallel/token_route.hpp>

namespace weir {

/// What the search wants to be small: first the load above the limit, then the cost of rows.
struct PlacementCost {
  Index excess = 0;  ///< Assignments above the limit, over all ranks.
  Index rows = 0;    ///< Rows, each times its cost.

  auto operator<=>(const PlacementCost&) const = default;  // NOLINT(modernize-use-nullptr)
};

/// What a row costs.
struct RowCosts {
  Index across = 10;  ///< Between nodes.
  Index within = 1;   ///< Between ranks of a node.
};

/// The traffic of tokens under a placement, counted as Traffic counts it, which can try what a
/// change of the placement would do to it: only tokens with the experts in question are looked at.
class PlacementSearch {
 public:
  /// \param tokens   Has to outlive the search, and to fit `start`: see RoutedTokens::check.
  /// \param most_load  The most assignments of a rank that do not count as excess.
  PlacementSearch(const RoutedTokens& tokens, const Placement& start, RowsSent sent,
                  const RowCosts& costs, Index most_load)
      : tokens_(tokens),
        nodes_(start.nodes()),
        route_(nodes_, sent),
        costs_(costs),
        most_load_(most_load),
        tokens_of_(static_cast<std::size_t>(start.experts())),
        demand_(start.experts() * nodes_.ranks(), 0),
        met_(tokens.tokens(), 0) {
    for (Index t = 0; t < tokens.tokens(); ++t) {
      for (Index a = tokens.layer.first(t); a < tokens.layer.last(t); ++a) {
        if (tokens.layer.kept[a] == 0) continue;
        const Index e = tokens.layer.expert[a];
        tokens_of_[static_cast<std::size_t>(e)].push_back(t);
        ++demand_[e * nodes_.ranks() + tokens.source[t]];
      }
    }
    set(start);
  }

  /// Goes on from this placement, which has the same experts and ranks.
  void set(const Placement& placement) {
    ranks_of_.clear();
    slots_.assign(nodes_.ranks(), 0);
    load_.assign(nodes_.ranks(), 0);
    for (Index e = 0; e < placement.experts(); ++e) {
      const std::span<const Index> holders = placement.ranks_of(e);
      ranks_of_.emplace_back(holders.begin(), holders.end());
      for (const Index r : holders) ++slots_[r];
      add_load(e, load_, 1);
    }
    cost_ = {.excess = excess(load_), .rows = 0};
    cost_of_.resize(tokens_.tokens());
    for (Index t = 0; t < tokens_.tokens(); ++t) cost_.rows += cost_of_[t] = cost_of(t);
  }

  Placement placement() const { return {ranks_of_, nodes_}; }
  const PlacementCost& cost() const { return cost_; }
  const RankNodes& nodes() const { return nodes_; }
  Index experts() const { return static_cast<Index>(ranks_of_.size()); }
  const std::vector<Index>& ranks_of(Index e) const {
    return ranks_of_[static_cast<std::size_t>(e)];
  }
  Index slots(Index rank) const { return slots_[rank]; }
  bool holds(Index rank, Index e) const {
    return std::binary_search(ranks_of(e).begin(), ranks_of(e).end(), rank);
  }
  /// The assignments to an expert.
  Index load_of(Index e) const {
    return static_cast<Index>(tokens_of_[static_cast<std::size_t>(e)].size());
  }

  /// What the cost would be if rank `to` held expert e, in place of rank `from` unless that is -1;
  /// and, unless f is -1, `from` held f in place of `to`. With `keep`, it is so from then on.
  PlacementCost change(Index e, Index from, Index to, Index f, bool keep) {
    changed_load_ = load_;
    const auto for_both = [&](auto&& body) {
      body(e);
      if (f >= 0) body(f);
    };
    for_both([&](Index g) { add_load(g, changed_load_, -1); });
    replace(e, from, to);
    if (f >= 0) replace(f, to, from);
    for_both([&](Index g) { add_load(g, changed_load_, 1); });

    PlacementCost changed{.excess = excess(changed_load_), .rows = cost_.rows};
    new_costs_.clear();
    if (keep || changed.excess <= cost_.excess) {
      for_both([&](Index g) {
        for (const Index t : tokens_of_[static_cast<std::size_t>(g)]) {
          if (std::exchange(met_[t], 1) != 0) continue;
          const Index cost = cost_of(t);
          changed.rows += cost - cost_of_[t];
          new_costs_.emplace_back(t, cost);
        }
      });
    }
    for (const auto& [t, cost] : new_costs_) {
      met_[t] = 0;
      if (keep) cost_of_[t] = cost;
    }
    if (keep) {
      load_ = changed_load_;
      cost_ = changed;
    } else {
      replace(e, to, from);
      if (f >= 0) replace(f, from, to);
    }
    return changed;
  }

  /// Makes the change if the cost is lower then.
  bool improve(Index e, Index from, Index to, Index f) {
    if (change(e, from, to, f, false) >= cost_) return false;
    change(e, from, to, f, true);
    return true;
  }

 private:
  Index cost_of(Index t) {
    const Index source = tokens_.source[t];
    to_.clear();
    for (Index a = tokens_.layer.first(t); a < tokens_.layer.last(t); ++a) {
      if (tokens_.layer.kept[a] == 0) continue;
      to_.push_back(nearest_replica(ranks_of(tokens_.layer.expert[a]), source, nodes_));
    }
    Index cost = 0;
    route_.visit(nodes_, source, to_, [&](Index from, Index to) {
      if (from != to) cost += nodes_.share_node(from, to) ? costs_.within : costs_.across;
    });
    return cost;
  }

  void add_load(Index e, List<Index>& load, Index sign) const {
    const std::vector<Index>& holders = ranks_of(e);
    for (Index source = 0; source < nodes_.ranks(); ++source) {
      const Index demand = demand_[e * nodes_.ranks() + source];
      if (demand > 0) load[nearest_replica(holders, source, nodes_)] += sign * demand;
    }
  }

  Index excess(const List<Index>& load) const {
    Index sum = 0;
    for (const Index l : load) sum += std::max<Index>(0, l - most_load_);
    return sum;
  }

  /// \param from, to  -1 for none.
  void replace(Index e, Index from, Index to) {
    std::vector<Index>& holders = ranks_of_[static_cast<std::size_t>(e)];
    if (from >= 0) {
      holders.erase(std::lower_bound(holders.begin(), holders.end(), from));
      --slots_[from];
    }
    if (to >= 0) {
      holders.insert(std::lower_bound(holders.begin(), holders.end(), to), to);
      ++slots_[to];
    }
  }

  const RoutedTokens& tokens_;
  RankNodes nodes_;
  TokenRoute route_;
  RowCosts costs_;
  Index most_load_;
  std::vector<List<Index>> tokens_of_;  // Of each expert.
  List<Index> demand_;                  // [experts, ranks], assignments by the token's rank.

  std::vector<std::vector<Index>> ranks_of_;
  List<Index> slots_;  // [ranks], in use.
  List<Index> load_;   // [ranks]
  PlacementCost cost_;
  List<Index> cost_of_;  // [tokens]

  List<Index> to_, changed_load_;
  List<char> met_;  // [tokens]
  std::vector<std::pair<Index, Index>> new_costs_;
};

}  // namespace weir
