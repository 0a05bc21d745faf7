// SPDX-License-Identifier: MIT
/// \file
/// How much travels between ranks when tokens go to their experts and back, by counting.
#pragma once

#include <algorithm>
#include <utility>

#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/error.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/parallel/placement.hpp>

namespace weir {

/// For what a token's row is sent once.
enum class RowsSent {
  kPerAssignment,  ///< For each of its experts, as ExpertParallel does.
  kPerRank,        ///< For each rank with experts of its, as DeepSeek-V2's losses have it.
  /// For each node with experts of its: to the rank there that has the source's place in its node,
  /// modulo the ranks there, and from this one to the ranks of the node that need it. DeepSeek-V3
  /// does so (arXiv:2412.19437, section 3.2.2).
  kPerNode,
};

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
        sent_(sent),
        rows_(ranks() * ranks(), 0),
        load_(ranks(), 0),
        on_nodes_(nodes_.nodes() + 1, 0),
        met_rank_(ranks(), 0),
        met_node_(nodes_.nodes(), 0) {
    List<Index> next(nodes_.nodes(), 0);
    for (Index r = 0; r < ranks(); ++r) place_.push_back(next[nodes_.node_of(r)]++);
    first_of_node_.assign(nodes_.nodes() + 1, 0);
    for (Index n = 0; n < nodes_.nodes(); ++n) {
      first_of_node_[n + 1] = first_of_node_[n] + nodes_.size(n);
    }
    by_node_.resize(ranks());
    for (Index r = 0; r < ranks(); ++r) {
      by_node_[first_of_node_[nodes_.node_of(r)] + place_[r]] = r;
    }
  }

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
  RowsSent rows_sent() const { return sent_; }

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

  /// The rank that rows for a node arrive at.
  Index relay(Index source, Index node) const {
    if (nodes_.node_of(source) == node) return source;
    return by_node_[first_of_node_[node] + place_[source] % nodes_.size(node)];
  }

  void add_token(Index source) {
    for (const Index to : to_rank_) {
      const Index node = nodes_.node_of(to);
      if (sent_ != RowsSent::kPerNode) {
        ++row_count(source, to);
        continue;
      }
      const Index arrival = relay(source, node);
      if (met_node_[node] != 2) {
        if (arrival != source) ++row_count(source, arrival);
        met_node_[node] = 2;
      }
      if (arrival != to || to == source) ++row_count(arrival, to);
    }
  }

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
  RowsSent sent_;
  List<Index> rows_;      // [ranks, ranks]
  List<Index> load_;      // [ranks]
  List<Index> on_nodes_;  // [nodes + 1]
  List<Index> place_;     // [ranks], in the node.
  List<Index> by_node_;   // [ranks], those of a node together.
  List<Index> first_of_node_;
  List<Index> to_rank_;  // Of one token; each once, unless rows are per assignment.
  List<char> met_rank_;  // Whether the token goes there.
  List<char> met_node_;  // The same; 2 if a row was sent.
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
  for (Index t = 0; t < routing.tokens(); ++t)
    nodes_.expect_rank("Traffic", "source", source_of(t));

  for (Index t = 0; t < routing.tokens(); ++t) {
    const Index source = source_of(t);
    to_rank_.clear();
    Index nodes_met = 0;
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      if (routing.kept[a] == 0) continue;
      const Index to = placement.destination(routing.expert[a], source);
      ++load_[to];
      if (sent_ == RowsSent::kPerAssignment || met_rank_[to] == 0) to_rank_.push_back(to);
      met_rank_[to] = 1;
      char& met = met_node_[nodes_.node_of(to)];
      nodes_met += met == 0 ? 1 : 0;
      met = 1;
    }
    add_token(source);
    ++on_nodes_[nodes_met];
    for (const Index to : to_rank_) {
      met_rank_[to] = 0;
      met_node_[nodes_.node_of(to)] = 0;
    }
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

/// The rank of each token where whole sequences go to the ranks in turn: sequence s to rank
/// s mod ranks.
/// \throws ConfigError  unless ranks >= 1.
inline List<Index> sources_by_sequence(const TracedTokens& tokens, Index ranks) {
  expect_at_least<Index>("sources_by_sequence", "ranks", ranks, 1);
  List<Index> source(tokens.tokens(), 0);
  for (Index s = 0; s < tokens.count(); ++s) {
    const TracedTokens::Sequence& sequence = tokens.sequences[static_cast<std::size_t>(s)];
    for (Index t = sequence.begin; t < sequence.end; ++t) source[t] = s % ranks;
  }
  return source;
}

}  // namespace weir
