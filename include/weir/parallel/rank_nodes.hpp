// SPDX-License-Identifier: MIT
/// \file
/// Which processes of a parallel program share a machine.
#pragma once

#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// The ranks of a parallel program and the node that each of them runs on. Ranks of one node
/// exchange data through memory, others through a network.
class RankNodes {
 public:
  /// \param node_of  The node of each rank, in any order.
  /// \throws ConfigError  unless each node from 0 to the highest has a rank.
  explicit RankNodes(std::vector<Index> node_of) : node_of_(std::move(node_of)) {
    if (node_of_.empty()) throw_error<ConfigError>("RankNodes: ranks = 0, expected >= 1");
    for (std::size_t r = 0; r < node_of_.size(); ++r) {
      const Index node = node_of_[r];
      if (node < 0 || node >= ranks()) {
        throw_error<ConfigError>("RankNodes: the node of rank ", r, " = ", node,
                                 ", expected 0 <= node < ranks = ", ranks());
      }
      if (node >= nodes()) size_.resize(static_cast<std::size_t>(node) + 1, 0);
      ++size_[static_cast<std::size_t>(node)];
    }
    for (Index n = 0; n < nodes(); ++n) {
      if (size(n) == 0) {
        throw_error<ConfigError>("RankNodes: node ", n, " has no rank, expected at least one");
      }
    }
  }

  /// All ranks on one node.
  /// \throws ConfigError  unless ranks >= 1.
  static RankNodes single(Index ranks) {
    expect_at_least<Index>("RankNodes", "ranks", ranks, 1);
    return uniform(ranks, ranks);
  }

  /// Neighbours share a node, as mpirun places them if it fills one node after the other: rank r is
  /// on node floor(r / ranks_per_node). The last node has fewer ranks where the numbers do not
  /// divide.
  /// \throws ConfigError  unless both are at least 1.
  static RankNodes uniform(Index ranks, Index ranks_per_node) {
    expect_at_least<Index>("RankNodes", "ranks", ranks, 1);
    expect_at_least<Index>("RankNodes", "ranks_per_node", ranks_per_node, 1);
    std::vector<Index> node_of;
    for (Index r = 0; r < ranks; ++r) node_of.push_back(r / ranks_per_node);
    return RankNodes(std::move(node_of));
  }

  Index ranks() const { return static_cast<Index>(node_of_.size()); }
  Index nodes() const { return static_cast<Index>(size_.size()); }
  Index node_of(Index rank) const { return node_of_[static_cast<std::size_t>(rank)]; }
  /// How many ranks are on a node.
  Index size(Index node) const { return size_[static_cast<std::size_t>(node)]; }
  bool share_node(Index a, Index b) const { return node_of(a) == node_of(b); }

  /// \throws ConfigError  unless 0 <= rank < ranks; `name` of `who` is what the rank is called.
  void expect_rank(std::string_view who, std::string_view name, Index rank) const {
    if (rank >= 0 && rank < ranks()) return;
    throw_error<ConfigError>(who, ": ", name, " = ", rank, ", expected 0 <= ", name,
                             " < ranks = ", ranks());
  }

  bool operator==(const RankNodes&) const = default;

 private:
  std::vector<Index> node_of_;
  std::vector<Index> size_;
};

}  // namespace weir
