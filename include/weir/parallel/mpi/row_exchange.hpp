// SPDX-License-Identifier: MIT
/// \file
/// Rows from all ranks to all ranks, directly or by way of a rank of the same node.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/parallel/mpi/exchange.hpp>
#include <weir/parallel/rank_nodes.hpp>

namespace weir {

/// The ranks of each node, in ascending order. All nodes have the same number.
class NodeRanks {
 public:
  /// \param setting  What asks for it, in the message.
  /// \throws ConfigError  unless all nodes have as many ranks as the first.
  NodeRanks(const RankNodes& nodes, Index me, std::string_view setting)
      : nodes_(nodes.nodes()), places_(nodes.size(0)) {
    for (Index n = 0; n < nodes_; ++n) {
      if (nodes.size(n) != places_) {
        throw_error<ConfigError>("ExpertParallel: ", setting, " with node ", n, " of ",
                                 nodes.size(n), " ranks, expected ", places_, " as on node 0");
      }
      for (Index r = 0; r < nodes.ranks(); ++r) {
        if (nodes.node_of(r) != n) continue;
        if (r == me) {
          node_ = n;
          place_ = rank_.count() - n * places_;
        }
        rank_.push_back(r);
      }
    }
  }

  Index nodes() const { return nodes_; }
  Index places() const { return places_; }  ///< The ranks of a node.
  Index node() const { return node_; }      ///< This rank's, and its place there.
  Index place() const { return place_; }
  Index rank(Index node, Index place) const { return rank_[node * places_ + place]; }

 private:
  Index nodes_, places_, node_ = 0, place_ = 0;
  List<Index> rank_;
};

/// How many rows go from where to where.
struct RowCounts {
  std::span<const Index> sent;      ///< [ranks + 1]: those to all ranks before rank d.
  std::span<const Index> received;  ///< [ranks + 1]: those from all ranks before rank s.
  /// [places, nodes]: those from the rank with place i in this node to the rank of node b that has
  /// this rank's place. Empty where rows go directly.
  std::span<const Index> relayed;
  Index bytes = 0;  ///< Of a row.

  Index sent_to(Index d) const { return element(sent, d + 1) - element(sent, d); }
  Index received_from(Index s) const { return element(received, s + 1) - element(received, s); }
};

/// One all-to-all-v of rows. Directly, a rank sends to each other one. In two levels, it sends the
/// rows for all ranks of place j to the rank of place j in its own node, which sends what all ranks
/// of the node have for a node to the rank there with its own place: nodes - 1 messages between
/// nodes instead of (nodes - 1) places, each `places` times as long, for one more way inside the
/// node. (The hierarchical all-to-all of Tutel: Hwang et al. 2022, arXiv:2206.03382, appendix A.)
/// Rows between nodes are as many as directly.
class RowExchange {
 public:
  /// \param counts   Lives until `finish`.
  /// \param nodes    Null where rows go directly.
  /// \param direct, across  For messages inside of a node, or all of them, and between nodes.
  void begin(Channel& direct, Channel& across, std::string_view what, const RowCounts& counts,
             const NodeRanks* nodes);

  /// The rows to be sent, those to rank d from counts.sent[d] on.
  std::byte* outgoing() { return nodes_ == nullptr ? inner_.outgoing() : outgoing_.data(); }
  /// The rows that have arrived, those of rank s from counts.received[s] on; the caller writes
  /// those of this rank.
  std::byte* incoming() { return nodes_ == nullptr ? inner_.incoming() : incoming_.data(); }

  /// The rows to rank d are in `outgoing`.
  void send(Index d) {
    if (nodes_ != nullptr) return;
    inner_.send(static_cast<int>(d), element(counts_.sent, d) * counts_.bytes,
                counts_.sent_to(d) * counts_.bytes);
  }
  /// So are those to all ranks.
  void sent();

  /// Lets rows travel, those of others as well.
  /// \param in_turn  Whether the exchanges before this one have passed on what they had to:
  /// messages
  ///                 to a rank are in the order of their exchanges.
  /// \return         Whether this one has, too.
  bool advance(bool in_turn) {
    inner_.advance();
    if (in_turn && inner_.has_arrived() && is_sent_ && !is_forwarded_) forward();
    outer_.advance();
    return in_turn && is_forwarded_;
  }

  void finish_receiving();
  void finish() {
    inner_.finish();
    outer_.finish();
  }

  Nanoseconds began() const { return inner_.began(); }
  Nanoseconds arrived() const { return std::max(inner_.arrived(), outer_.arrived()); }
  Index arriving_bytes() const { return inner_.arriving_bytes() + outer_.arriving_bytes(); }

 private:
  Index relayed(Index place, Index node) const {
    return element(counts_.relayed, place * nodes_->nodes() + node) * counts_.bytes;
  }
  std::byte* arrived_from(Index rank) {
    return incoming_.data() + element(counts_.received, rank) * counts_.bytes;
  }
  void forward();

  RowCounts counts_;
  const NodeRanks* nodes_ = nullptr;
  bool is_sent_ = false, is_forwarded_ = false;
  Exchange inner_, outer_;
  Scratch<std::byte> outgoing_, incoming_;
};

inline void RowExchange::begin(Channel& direct, Channel& across, std::string_view what,
                               const RowCounts& counts, const NodeRanks* nodes) {
  counts_ = counts;
  nodes_ = nodes;
  is_sent_ = is_forwarded_ = false;
  const Index ranks = direct.size(), me = direct.rank(), bytes = counts.bytes;
  const Index leaving = counts.sent.back() * bytes, arriving = counts.received.back() * bytes;
  if (nodes == nullptr) {
    inner_.begin(direct, what, leaving, arriving);
    for (Index s = 0; s < ranks; ++s) {
      if (s == me) continue;
      inner_.receive(static_cast<int>(s), element(counts.received, s) * bytes,
                     counts.received_from(s) * bytes);
    }
    is_forwarded_ = true;
    return;
  }
  outgoing_.reserve(leaving);
  incoming_.reserve(arriving);
  Index to_relay = 0;
  for (const Index rows : counts.relayed) to_relay += rows * bytes;
  inner_.begin(direct, what, leaving, to_relay);
  Index offset = 0;
  for (Index i = 0; i < nodes->places(); ++i) {
    Index size = 0;
    for (Index b = 0; b < nodes->nodes(); ++b) size += relayed(i, b);
    if (i == nodes->place()) continue;
    inner_.receive(static_cast<int>(nodes->rank(nodes->node(), i)), offset, size);
    offset += size;
  }
  outer_.begin(across, what, to_relay, arriving);
  offset = 0;
  for (Index a = 0; a < nodes->nodes(); ++a) {
    if (a == nodes->node()) continue;
    Index size = 0;
    for (Index i = 0; i < nodes->places(); ++i) {
      size += counts.received_from(nodes->rank(a, i)) * bytes;
    }
    outer_.receive(static_cast<int>(nodes->rank(a, nodes->place())), offset, size);
    offset += size;
  }
}

inline void RowExchange::sent() {
  is_sent_ = true;
  if (nodes_ == nullptr) return;
  Index offset = 0;
  for (Index j = 0; j < nodes_->places(); ++j) {
    if (j == nodes_->place()) continue;
    const Index first = offset;
    for (Index b = 0; b < nodes_->nodes(); ++b) {
      const Index d = nodes_->rank(b, j);
      const Index size = counts_.sent_to(d) * counts_.bytes;
      std::copy_n(outgoing_.data() + element(counts_.sent, d) * counts_.bytes, size,
                  inner_.outgoing() + offset);
      offset += size;
    }
    inner_.send(static_cast<int>(nodes_->rank(nodes_->node(), j)), first, offset - first);
  }
}

/// What this rank has for the ranks of its place, and what the ranks of its node have for them.
inline void RowExchange::forward() {
  is_forwarded_ = true;
  Index offset = 0;
  for (Index b = 0; b < nodes_->nodes(); ++b) {
    const Index first = offset;
    const std::byte* from = inner_.incoming();
    for (Index i = 0; i < nodes_->places(); ++i) {
      const bool own = i == nodes_->place();
      const std::byte* part =
          own ? outgoing_.data() +
                    element(counts_.sent, nodes_->rank(b, nodes_->place())) * counts_.bytes
              : from;
      for (Index before = 0; !own && before < b; ++before) part += relayed(i, before);
      if (b != nodes_->node()) {
        std::copy_n(part, relayed(i, b), outer_.outgoing() + offset);
        offset += relayed(i, b);
      } else if (!own) {
        std::copy_n(part, relayed(i, b), arrived_from(nodes_->rank(b, i)));
      }
      for (Index all = 0; !own && all < nodes_->nodes(); ++all) from += relayed(i, all);
    }
    if (b == nodes_->node()) continue;
    outer_.send(static_cast<int>(nodes_->rank(b, nodes_->place())), first, offset - first);
  }
}

inline void RowExchange::finish_receiving() {
  inner_.finish_receiving();
  if (nodes_ == nullptr) return;
  if (!is_forwarded_) forward();
  outer_.finish_receiving();
  const std::byte* from = outer_.incoming();
  for (Index a = 0; a < nodes_->nodes(); ++a) {
    for (Index i = 0; a != nodes_->node() && i < nodes_->places(); ++i) {
      const Index rank = nodes_->rank(a, i);
      const Index size = counts_.received_from(rank) * counts_.bytes;
      std::copy_n(from, size, arrived_from(rank));
      from += size;
    }
  }
}

}  // namespace weir
