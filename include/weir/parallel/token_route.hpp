// SPDX-License-Identifier: MIT
/// \file
/// The ways that a token's rows take between ranks.
#pragma once

#include <span>

#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/parallel/rank_nodes.hpp>

namespace weir {

/// For what a token's row is sent once.
enum class RowsSent {
  kPerAssignment,  ///< For each of its experts, as ExpertParallel does where nothing else is said.
  kPerRank,        ///< For each rank with experts of its, as DeepSeek-V2's losses have it.
  /// For each node with experts of its: to the rank there that has the source's place in its node,
  /// modulo the ranks there, and from this one to the ranks of the node that need it. DeepSeek-V3
  /// does so (arXiv:2412.19437, section 3.2.2), and ExpertParallel with `once_per_node`.
  kPerNode,
};

/// Finds the rows of one token after the other. It owns the space that this takes.
class TokenRoute {
 public:
  TokenRoute(const RankNodes& nodes, RowsSent sent)
      : sent_(sent),
        met_rank_(nodes.ranks(), 0),
        met_node_(nodes.nodes(), 0),
        first_of_node_(nodes.nodes() + 1, 0) {
    List<Index> next(nodes.nodes(), 0);
    for (Index r = 0; r < nodes.ranks(); ++r) place_.push_back(next[nodes.node_of(r)]++);
    for (Index n = 0; n < nodes.nodes(); ++n) {
      first_of_node_[n + 1] = first_of_node_[n] + nodes.size(n);
    }
    by_node_.resize(nodes.ranks());
    for (Index r = 0; r < nodes.ranks(); ++r) {
      by_node_[first_of_node_[nodes.node_of(r)] + place_[r]] = r;
    }
  }

  RowsSent rows_sent() const { return sent_; }

  /// Calls `row(from, to)` for each row of a token of rank `source`, also where both are the
  /// source: such a row does not travel. \param to       The rank of each assignment. \return On
  /// how many nodes these ranks are.
  template <class Row>
  Index visit(const RankNodes& nodes, Index source, std::span<const Index> to, Row&& row) {
    Index nodes_met = 0;
    for (const Index rank : to) {
      if (sent_ != RowsSent::kPerAssignment && met_rank_[rank] != 0) continue;
      met_rank_[rank] = 1;
      const Index node = nodes.node_of(rank);
      const bool first = met_node_[node] == 0;
      met_node_[node] = 1;
      nodes_met += first ? 1 : 0;
      if (sent_ != RowsSent::kPerNode || nodes.share_node(source, rank)) {
        row(source, rank);
        continue;
      }
      const Index arrival = by_node_[first_of_node_[node] + place_[source] % nodes.size(node)];
      if (first) row(source, arrival);
      if (arrival != rank) row(arrival, rank);
    }
    for (const Index rank : to) {
      met_rank_[rank] = 0;
      met_node_[nodes.node_of(rank)] = 0;
    }
    return nodes_met;
  }

 private:
  RowsSent sent_;
  List<char> met_rank_;        // Whether the token goes there.
  List<char> met_node_;        // The same.
  List<Index> first_of_node_;  // [nodes + 1], into `by_node_`.
  List<Index> by_node_;        // [ranks], those of a node together.
  List<Index> place_;          // [ranks], in the node.
};

}  // namespace weir
