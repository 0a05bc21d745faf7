// SPDX-License-Identifier: MIT
/// \file
/// Placements that a trace of routing suggests.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/parallel/placement.hpp>
#include <weir/parallel/placement_search.hpp>
#include <weir/parallel/routed_tokens.hpp>
#include <weir/parallel/token_route.hpp>
#include <weir/parallel/traffic.hpp>

namespace weir {

/// Settings of optimise_placement.
struct PlacementOptimiserConfig {
  RowsSent sent = RowsSent::kPerNode;
  RowCosts costs = {};
  /// The most experts on a rank: the memory for experts over the bytes of one. What is not needed
  /// takes replicas. 0: as many as the fullest rank has at the start.
  Index slots = 0;
  /// The load of a rank over the mean above which less load is worth more than less traffic. 0: any
  /// load will do.
  double most_load = 0.0;
  Index candidates = 8;    ///< Experts that are tried for the next replica, those of most load.
  Index restarts = 4;      ///< How often the search goes on from a disturbed placement.
  std::uint64_t seed = 0;  ///< Of the disturbances.

  /// \throws ConfigError  if a setting is out of range.
  void check() const {
    expect_at_least<Index>("optimise_placement", "costs.across", costs.across, 0);
    expect_at_least<Index>("optimise_placement", "costs.within", costs.within, 0);
    expect_at_least<Index>("optimise_placement", "slots", slots, 0);
    if (most_load != 0.0) expect_at_least("optimise_placement", "most_load", most_load, 1.0);
    expect_at_least<Index>("optimise_placement", "candidates", candidates, 1);
    expect_at_least<Index>("optimise_placement", "restarts", restarts, 0);
  }
};

namespace detail {

/// Cuts `experts` into groups of these sizes. Each begins with the expert of most tokens that is
/// left, and takes, one after the other, the expert that shares most tokens with those it has.
/// \param pairs    [experts, experts], tokens with both; with the expert on the diagonal.
inline std::vector<std::vector<Index>> group_together(std::vector<Index> experts,
                                                      const Matrix<double>& pairs,
                                                      const std::vector<Index>& sizes) {
  std::vector<std::vector<Index>> groups;
  for (const Index size : sizes) {
    std::vector<Index>& group = groups.emplace_back();
    while (static_cast<Index>(group.size()) < size) {
      auto best = experts.begin();
      double most = -1.0;
      for (auto e = experts.begin(); e != experts.end(); ++e) {
        double shared = group.empty() ? pairs(*e, *e) : 0.0;
        for (const Index f : group) shared += pairs(*e, f);
        if (shared > most) {
          most = shared;
          best = e;
        }
      }
      group.push_back(*best);
      experts.erase(best);
    }
  }
  return groups;
}

/// One exchange or move after the other that lowers the cost, until there is none.
inline void improve_placement(PlacementSearch& search, Index slots) {
  // Exchanges the first replicas of e and f that it can.
  const auto exchange = [&](Index e, Index f) {
    for (std::size_t i = 0; i < search.ranks_of(e).size(); ++i) {
      for (std::size_t j = 0; j < search.ranks_of(f).size(); ++j) {
        const Index a = search.ranks_of(e)[i], b = search.ranks_of(f)[j];
        if (a == b || search.holds(b, e) || search.holds(a, f)) continue;
        if (search.improve(e, a, b, f)) return true;  // Whose ranks are others now.
      }
    }
    return false;
  };
  const auto move = [&](Index e) {
    for (std::size_t i = 0; i < search.ranks_of(e).size(); ++i) {
      const Index a = search.ranks_of(e)[i];
      for (Index b = 0; b < search.nodes().ranks(); ++b) {
        if (search.slots(b) >= slots || search.holds(b, e)) continue;
        if (search.improve(e, a, b, -1)) return true;
      }
    }
    return false;
  };
  for (bool improved = true; improved;) {  // Ends, since the cost falls each time.
    improved = false;
    for (Index e = 0; e < search.experts(); ++e) {
      for (Index f = e + 1; f < search.experts(); ++f) improved = exchange(e, f) || improved;
      improved = move(e) || improved;
    }
  }
}

/// Replicates the experts of most load per replica, where it lowers the cost most.
inline void replicate(PlacementSearch& search, Index slots, Index candidates) {
  struct Candidate {
    double load = 0.0;
    Index expert = 0;
  };
  while (true) {
    std::vector<Candidate> hot;
    for (Index e = 0; e < search.experts(); ++e) {
      const auto replicas = static_cast<double>(search.ranks_of(e).size());
      hot.push_back({static_cast<double>(search.load_of(e)) / replicas, e});
    }
    std::stable_sort(hot.begin(), hot.end(),
                     [](const Candidate& a, const Candidate& b) { return a.load > b.load; });
    hot.resize(std::min(hot.size(), static_cast<std::size_t>(candidates)));
    PlacementCost best = search.cost();
    std::optional<std::pair<Index, Index>> found;
    for (const Candidate& candidate : hot) {
      for (Index r = 0; r < search.nodes().ranks(); ++r) {
        if (search.slots(r) >= slots || search.holds(r, candidate.expert)) continue;
        const PlacementCost cost = search.change(candidate.expert, -1, r, -1, false);
        if (cost >= best) continue;
        best = cost;
        found = {candidate.expert, r};
      }
    }
    if (!found.has_value()) return;
    search.change(found->first, -1, found->second, -1, true);
  }
}

/// Exchanges a few experts at random.
inline void disturb(PlacementSearch& search, Rng& rng) {
  for (Index i = 0; i < 1 + search.experts() / 4; ++i) {
    const Index e = rng.below(search.experts()), f = rng.below(search.experts());
    const auto pick = [&](Index g) {
      const std::vector<Index>& holders = search.ranks_of(g);
      return holders[static_cast<std::size_t>(rng.below(static_cast<Index>(holders.size())))];
    };
    const Index a = pick(e), b = pick(f);
    if (a == b || search.holds(b, e) || search.holds(a, f)) continue;
    search.change(e, a, b, f, true);
  }
}

}  // namespace detail

/// Experts that share tokens on the same node, and within it on the same rank, as far as they fit:
/// each node, then each rank of it, takes the expert of most tokens that is left, and those that
/// share most tokens with what it has. Ranks get as many experts as in Placement::contiguous.
/// \throws ConfigError  if the tokens have no experts or wrong sources.
inline Placement co_activated_placement(const RoutedTokens& tokens, const RankNodes& nodes) {
  const Index experts = tokens.layer.experts;
  tokens.check("co_activated_placement", experts, nodes.ranks());
  const Placement sizes = Placement::contiguous(experts, nodes);
  Matrix<double> pairs = Matrix<double>::Zero(experts, experts);
  for (Index t = 0; t < tokens.tokens(); ++t) {
    for (const Index e : tokens.layer.experts_of(t)) {
      for (const Index f : tokens.layer.experts_of(t)) pairs(e, f) += 1.0;
    }
  }
  std::vector<Index> all, of_node(static_cast<std::size_t>(nodes.nodes()), 0);
  for (Index e = 0; e < experts; ++e) all.push_back(e);
  for (Index r = 0; r < nodes.ranks(); ++r) {
    of_node[static_cast<std::size_t>(nodes.node_of(r))] += sizes.slots(r);
  }
  const auto by_node = detail::group_together(all, pairs, of_node);
  std::vector<Index> rank_of(static_cast<std::size_t>(experts), 0);
  for (Index n = 0; n < nodes.nodes(); ++n) {
    std::vector<Index> ranks, of_rank;
    for (Index r = 0; r < nodes.ranks(); ++r) {
      if (nodes.node_of(r) != n) continue;
      ranks.push_back(r);
      of_rank.push_back(sizes.slots(r));
    }
    const auto groups =
        detail::group_together(by_node[static_cast<std::size_t>(n)], pairs, of_rank);
    for (std::size_t i = 0; i < ranks.size(); ++i) {
      for (const Index e : groups[i]) rank_of[static_cast<std::size_t>(e)] = ranks[i];
    }
  }
  return Placement::from_map(rank_of, nodes);
}

/// Looks for a placement under which the tokens of a trace cause little traffic:
///
///     cost = (sum over ranks of max(0, load - limit),
///             rows between nodes * costs.across + other rows between ranks * costs.within)
///
/// of which the first is made small before the second; limit = most_load * mean load. It begins
/// with `start` and with experts that share tokens together (co_activated_placement); exchanges the
/// ranks of two experts, or moves one to a free slot, as long as the cost falls; fills free slots
/// with single replicas of the experts of most load as long as the cost falls; exchanges again; and
/// does so again from a few places nearby. The best placement met is returned, `start` among them:
/// what is found is a local optimum.
///
/// With rows per assignment, and tokens of all kinds on all ranks, traffic between nodes does not
/// depend on who is together: replicas alone save any then. Time grows with the square of the
/// experts times the tokens of an expert; some thousand tokens are a good sample.
///
/// \throws ConfigError  if a setting is out of range, the tokens do not fit `start`, or `slots` is
///                      fewer than the fullest rank has at the start.
inline Placement optimise_placement(const RoutedTokens& tokens, const Placement& start,
                                    const PlacementOptimiserConfig& config = {}) {
  config.check();
  tokens.check("optimise_placement", start.experts(), start.ranks());
  const Index slots = config.slots == 0 ? start.most_slots() : config.slots;
  if (slots < start.most_slots()) {
    throw_error<ConfigError>("optimise_placement: slots = ", slots,
                             ", expected >= ", start.most_slots(),
                             ", those of the fullest rank at the start");
  }
  Index limit = std::numeric_limits<Index>::max();
  if (config.most_load > 0.0) {
    Index assignments = 0;
    for (const std::uint8_t kept : tokens.layer.kept) assignments += kept;
    limit = static_cast<Index>(std::floor(config.most_load * static_cast<double>(assignments) /
                                          static_cast<double>(start.ranks())));
  }
  PlacementSearch search(tokens, start, config.sent, config.costs, limit);
  Placement best = start;
  PlacementCost least = search.cost();
  const auto try_from = [&](const Placement& from, Rng* rng) {
    search.set(from);
    if (rng != nullptr) detail::disturb(search, *rng);
    detail::improve_placement(search, start.most_slots());  // The rest is for replicas.
    detail::replicate(search, slots, config.candidates);
    detail::improve_placement(search, slots);
    if (search.cost() >= least) return;
    least = search.cost();
    best = search.placement();
  };
  try_from(start, nullptr);
  const Placement together = co_activated_placement(tokens, start.nodes());
  try_from(together, nullptr);
  Rng rng(config.seed);
  for (Index i = 0; i < config.restarts; ++i) try_from(i % 2 == 0 ? best : together, &rng);
  return best;
}

/// The traffic and load of tokens under a placement.
struct TrafficSummary {
  Index tokens = 0;
  Index across = 0;  ///< Rows between nodes.
  Index total = 0;   ///< Rows between ranks, those between nodes among them.
  double load_imbalance = 0.0;
  double nodes_per_token = 0.0;  ///< On how many nodes the experts of a token are, on average.
};

/// \throws ConfigError  if the tokens do not fit the placement.
inline TrafficSummary summarise_traffic(const RoutedTokens& tokens, const Placement& placement,
                                        RowsSent sent) {
  tokens.check("summarise_traffic", placement.experts(), placement.ranks());
  Traffic traffic(placement.nodes(), sent);
  traffic.add(tokens.layer, placement, [&](Index t) { return tokens.source[t]; });
  TrafficSummary summary{.tokens = tokens.tokens(),
                         .across = traffic.across(),
                         .total = traffic.total(),
                         .load_imbalance = traffic.load_imbalance()};
  for (Index n = 1; n <= placement.nodes().nodes(); ++n) {
    summary.nodes_per_token += static_cast<double>(n * traffic.tokens_on_nodes(n)) /
                               static_cast<double>(std::max<Index>(1, tokens.tokens()));
  }
  return summary;
}

/// What a placement saves, by counting the same tokens under both.
struct PlacementComparison {
  TrafficSummary before, after;

  /// Bytes of dispatch and combine between nodes that are saved; negative if there are more.
  Index across_bytes_saved(const RowSizes& sizes) const {
    return (before.across - after.across) * (sizes.dispatch + sizes.combine);
  }
  /// The same between ranks.
  Index total_bytes_saved(const RowSizes& sizes) const {
    return (before.total - after.total) * (sizes.dispatch + sizes.combine);
  }
  /// The share of rows between nodes that is saved; 0 if there were none.
  double across_saved() const {
    return before.across == 0 ? 0.0
                              : static_cast<double>(before.across - after.across) /
                                    static_cast<double>(before.across);
  }
};

/// \throws ConfigError  if the tokens do not fit the placements.
inline PlacementComparison compare_placements(const RoutedTokens& tokens, const Placement& before,
                                              const Placement& after, RowsSent sent) {
  return {summarise_traffic(tokens, before, sent), summarise_traffic(tokens, after, sent)};
}

}  // namespace weir
