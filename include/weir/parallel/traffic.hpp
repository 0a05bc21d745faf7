// SPDX-License-Identifier: MIT
/// \file
/// How much travels between ranks when tokens go to their experts and back, by counting.
#pragma once

#include <algorithm>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/parallel/placement.hpp>
#include <weir/parallel/token_route.hpp>

namespace weir {

/// The bytes of one row, see `row_bytes`: of a token on its way to an expert, and of an expert's
/// output on its way back.
struct RowSizes {
  Index dispatch = 0;
  Index combine = 0;
};

/// The rows that ranks send each other in the dispatch of tokens to experts. Combine sends as many
/// the other way, and in the backward pass the gradients of outputs go the way of tokens and those
/// of tokens the way of outputs. A rank's rows for itself are counted apart: they do not travel.
/// Dropped assignments are not sent.
///
///     Traffic traffic(placement.nodes(), RowsSent::kPerAssignment);
///     traffic.add(routing, placement, rank);
///     traffic.sent(rank) * sizes.dispatch                     // bytes out of the rank in dispatch
///     traffic.received(rank) * sizes.combine                  // and in combine
class Traffic {
 public:
  /// Nothing yet. Memory is [ranks, ranks].
  Traffic(RankNodes nodes, RowsSent sent)
      : nodes_(std::move(nodes)),
        route_(nodes_, sent),
        rows_(ranks() * ranks(), 0),
        load_(ranks(), 0),
        on_nodes_(nodes_.nodes() + 1, 0) {}

  /// Adds the tokens of a routing, or of a layer of a trace.
  /// \param source_of  The rank that a token belongs to.
  /// \throws ConfigError  if the placement has other ranks or experts, or for a rank that there is
  ///                      not; nothing has been added then.
  template <class Choices>
  void add(const Choices& routing, const Placement& placement,
           FunctionRef<Index(Index token)> source_of);

  /// The same where all tokens belong to rank `source`.
  template <class Choices>
  void add(const Choices& routing, const Placement& placement, Index source) {
    add(routing, placement, [source](Index /*token*/) { return source; });
  }

  const RankNodes& nodes() const { return nodes_; }
  Index ranks() const { return nodes_.ranks(); }
  RowsSent rows_sent() const { return route_.rows_sent(); }

  /// Rows from one rank to another, or that stay on a rank.
  Index rows(Index from, Index to) const { return rows_[from * ranks() + to]; }

  /// Rows out of a rank; those to ranks of other nodes.
  Index sent(Index rank) const;
  Index sent_across(Index rank) const;
  /// Rows into a rank; those from ranks of other nodes.
  Index received(Index rank) const;
  Index received_across(Index rank) const;
  /// Rows into a rank and those that stay there: with kPerRank, the tokens that have an expert
  /// there.
  Index arrived(Index rank) const { return received(rank) + rows(rank, rank); }

  /// Rows that go from a rank to another one; to one of another node.
  Index total() const;
  Index across() const;
  /// Bytes of dispatch and combine between ranks; between nodes.
  Index total_bytes(const RowSizes& sizes) const {
    return total() * (sizes.dispatch + sizes.combine);
  }
  Index across_bytes(const RowSizes& sizes) const {
    return across() * (sizes.dispatch + sizes.combine);
  }
  /// Bytes out of a rank: its own tokens, and what its experts made of those of others.
  Index bytes_out(Index rank, const RowSizes& sizes) const {
    return sent(rank) * sizes.dispatch + received(rank) * sizes.combine;
  }
  Index bytes_out_across(Index rank, const RowSizes& sizes) const {
    return sent_across(rank) * sizes.dispatch + received_across(rank) * sizes.combine;
  }

  /// The assignments that a rank's experts compute.
  Index load(Index rank) const { return load_[rank]; }
  /// The largest load over the mean, which is 1 at best; 0 without assignments.
  double load_imbalance() const {
    return imbalance([this](Index r) { return load(r); });
  }
  /// The same of `arrived`.
  double arrived_imbalance() const {
    return imbalance([this](Index r) { return arrived(r); });
  }

  /// How many tokens have experts on n nodes, their own among them; n <= nodes.
  Index tokens_on_nodes(Index n) const { return on_nodes_[n]; }
  /// The most nodes that a token has experts on.
  Index most_nodes() const {
    Index most = nodes_.nodes();
    while (most > 0 && on_nodes_[most] == 0) --most;
    return most;
  }

 private:
  Index& row_count(Index from, Index to) { return rows_[from * ranks() + to]; }

  template <class Of>
  double imbalance(Of&& of) const {
    Index most = 0, sum = 0;
    for (Index r = 0; r < ranks(); ++r) {
      most = std::max(most, of(r));
      sum += of(r);
    }
    return sum == 0 ? 0.0
                    : static_cast<double>(most) * static_cast<double>(ranks()) /
                          static_cast<double>(sum);
  }

  RankNodes nodes_;
  TokenRoute route_;
  List<Index> rows_;      // [ranks, ranks]
  List<Index> load_;      // [ranks]
  List<Index> on_nodes_;  // [nodes + 1]
  List<Index> to_;        // The rank of each assignment of one token.
};

template <class Choices>
void Traffic::add(const Choices& routing, const Placement& placement,
                  FunctionRef<Index(Index token)> source_of) {
  if (placement.nodes() != nodes_) {
    throw_error<ConfigError>(
        "Traffic: the placement has ", placement.ranks(), " ranks on ", placement.nodes().nodes(),
        " nodes, expected those of the traffic: ", ranks(), " on ", nodes_.nodes());
  }
  for (const Index e : routing.expert) {
    if (e >= 0 && e < placement.experts()) continue;
    throw_error<ConfigError>("Traffic: a token has expert ", e, ", expected an expert < ",
                             placement.experts(), ", those of the placement");
  }
  for (Index t = 0; t < routing.tokens(); ++t) {
    nodes_.expect_rank("Traffic", "source", source_of(t));
  }

  for (Index t = 0; t < routing.tokens(); ++t) {
    const Index source = source_of(t);
    to_.clear();
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      if (routing.kept[a] == 0) continue;
      to_.push_back(placement.destination(routing.expert[a], source));
      ++load_[to_.back()];
    }
    ++on_nodes_[route_.visit(nodes_, source, to_,
                             [this](Index from, Index to) { ++row_count(from, to); })];
  }
}

inline Index Traffic::sent(Index rank) const {
  Index sum = 0;
  for (Index to = 0; to < ranks(); ++to) sum += to == rank ? 0 : rows(rank, to);
  return sum;
}

inline Index Traffic::sent_across(Index rank) const {
  Index sum = 0;
  for (Index to = 0; to < ranks(); ++to) sum += nodes_.share_node(rank, to) ? 0 : rows(rank, to);
  return sum;
}

inline Index Traffic::received(Index rank) const {
  Index sum = 0;
  for (Index from = 0; from < ranks(); ++from) sum += from == rank ? 0 : rows(from, rank);
  return sum;
}

inline Index Traffic::received_across(Index rank) const {
  Index sum = 0;
  for (Index from = 0; from < ranks(); ++from) {
    sum += nodes_.share_node(rank, from) ? 0 : rows(from, rank);
  }
  return sum;
}

inline Index Traffic::total() const {
  Index sum = 0;
  for (Index r = 0; r < ranks(); ++r) sum += sent(r);
  return sum;
}

inline Index Traffic::across() const {
  Index sum = 0;
  for (Index r = 0; r < ranks(); ++r) sum += sent_across(r);
  return sum;
}

}  // namespace weir
