// SPDX-License-Identifier: MIT
/// \file
/// Rows of tokens on their way to experts, once to each node.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <weir/core/function_ref.hpp>
#include <weir/core/list.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/parallel/mpi/exchange.hpp>
#include <weir/parallel/mpi/row_exchange.hpp>
#include <weir/parallel/mpi/rows_once.hpp>

namespace weir {

/// Where the rows of one pass are that have arrived, of all chunks so far.
struct ArrivedRows {
  std::vector<List<const std::byte*>> of_rank;  ///< From each rank.
  std::vector<List<const std::byte*>> relayed;  ///< From each node, to be passed on.
  List<Index> assigned;  ///< From each rank: how many assignments have their rows.

  void begin(Index ranks, Index nodes) {
    of_rank.resize(static_cast<std::size_t>(ranks));
    relayed.resize(static_cast<std::size_t>(nodes));
    assigned.assign(ranks, 0);
    for (auto* const all : {&of_rank, &relayed}) {
      for (auto& rows : *all) rows.clear();
    }
  }
};

/// The rows of one chunk, where RowsOnce has agreed on them: inside of a node from rank to rank,
/// across to the rank of the same place, and on from there. Like RowExchange; the rows that have
/// arrived are in the order of assignments, as if each had been sent with a row of its own.
class OnceExchange {
 public:
  /// Writes the row of a slot.
  using Write = FunctionRef<void(Index slot, std::byte* to)>;

  /// Begins, and sends what sets out here.
  /// \param near, across, on  Inside of a node, between nodes, and from a relay on.
  /// \param counts   Lives until `finish`, as do `once`, `nodes` and `arrived`.
  void begin(Channel& near, Channel& across, Channel& on, const RowCounts& counts, Index chunk,
             const NodeRanks& nodes, const RowsOnce& once, ArrivedRows& arrived, Write write);

  /// The rows that have arrived, those of rank s from counts.received[s] on; the caller writes
  /// those of this rank.
  std::byte* incoming() { return incoming_.data(); }

  /// Lets rows travel, those of others as well; see RowExchange.
  bool advance(bool in_turn) {
    near_.advance();
    across_.advance();
    if (in_turn && across_.has_arrived() && !is_passed_on_) pass_on();
    on_.advance();
    return in_turn && is_passed_on_;
  }

  void finish_receiving();
  void finish() {
    near_.finish();
    across_.finish();
    on_.finish();
  }

  Nanoseconds began() const { return near_.began(); }
  Nanoseconds arrived() const {
    return std::max({near_.arrived(), across_.arrived(), on_.arrived()});
  }
  Index arriving_bytes() const {
    return near_.arriving_bytes() + across_.arriving_bytes() + on_.arriving_bytes();
  }

 private:
  static constexpr std::size_t at(Index i) { return static_cast<std::size_t>(i); }

  void pass_on();
  /// Calls `use(a)` for each other node.
  template <class Use>
  void for_each_other_node(Use&& use) const {
    for (Index a = 0; a < nodes_->nodes(); ++a) {
      if (a != nodes_->node()) use(a);
    }
  }
  /// The same for each other place of this node.
  template <class Use>
  void for_each_other_place(Use&& use) const {
    for (Index i = 0; i < nodes_->places(); ++i) {
      if (i != nodes_->place()) use(i);
    }
  }
  Index rank_here(Index place) const { return nodes_->rank(nodes_->node(), place); }
  /// Rows of this chunk that place i of this node passes on to this rank.
  Index passed_on_by(Index i) const {
    Index rows = 0;
    for_each_other_node(
        [&](Index a) { rows += once_->from_rank(nodes_->rank(a, i)).of_chunk(c_); });
    return rows;
  }

  RowCounts counts_;
  Index c_ = 0, me_ = 0;
  const NodeRanks* nodes_ = nullptr;
  const RowsOnce* once_ = nullptr;
  ArrivedRows* arrived_rows_ = nullptr;
  bool is_passed_on_ = false;
  Exchange near_, across_, on_;
  Scratch<std::byte> incoming_;
};

inline void OnceExchange::begin(Channel& near, Channel& across, Channel& on,
                                const RowCounts& counts, Index chunk, const NodeRanks& nodes,
                                const RowsOnce& once, ArrivedRows& arrived, Write write) {
  counts_ = counts;
  c_ = chunk;
  me_ = near.rank();
  nodes_ = &nodes;
  once_ = &once;
  arrived_rows_ = &arrived;
  is_passed_on_ = false;
  const Index bytes = counts.bytes;
  incoming_.reserve(counts.received.back() * bytes);

  Index leaving = 0, arriving = 0, passed_here = 0, passed_away = 0;
  for_each_other_place([&](Index j) {
    leaving += once.to_rank(rank_here(j)).of_chunk(c_);
    arriving += once.from_rank(rank_here(j)).of_chunk(c_);
    passed_here += passed_on_by(j);
    for_each_other_node([&](Index a) { passed_away += once.passed_on(a, j).of_chunk(c_); });
  });
  near_.begin(near, "dispatch", leaving * bytes, arriving * bytes);
  Index offset = 0;
  for_each_other_place([&](Index i) {
    const Index size = once.from_rank(rank_here(i)).of_chunk(c_) * bytes;
    near_.receive(static_cast<int>(rank_here(i)), offset, size);
    offset += size;
  });
  leaving = arriving = 0;
  for_each_other_node([&](Index b) {
    leaving += once.to_node(b).of_chunk(c_);
    arriving += once.relayed(b).of_chunk(c_);
  });
  across_.begin(across, "dispatch across", leaving * bytes, arriving * bytes);
  offset = 0;
  for_each_other_node([&](Index a) {
    const Index size = once.relayed(a).of_chunk(c_) * bytes;
    across_.receive(static_cast<int>(nodes.rank(a, nodes.place())), offset, size);
    offset += size;
  });
  on_.begin(on, "dispatch on", passed_away * bytes, passed_here * bytes);
  offset = 0;
  for_each_other_place([&](Index i) {
    const Index size = passed_on_by(i) * bytes;
    on_.receive(static_cast<int>(rank_here(i)), offset, size);
    offset += size;
  });

  const auto send = [&](Exchange& exchange, Index rank, const UniqueRows& rows, Index& at_byte) {
    const Index first = at_byte;
    for (Index i = rows.first[c_]; i < rows.first[c_ + 1]; ++i, at_byte += bytes) {
      write(rows.source[i], exchange.outgoing() + at_byte);
    }
    exchange.send(static_cast<int>(rank), first, at_byte - first);
  };
  offset = 0;
  for_each_other_node(
      [&](Index b) { send(across_, nodes.rank(b, nodes.place()), once.to_node(b), offset); });
  offset = 0;
  for_each_other_place(
      [&](Index j) { send(near_, rank_here(j), once.to_rank(rank_here(j)), offset); });
}

inline void OnceExchange::pass_on() {
  is_passed_on_ = true;
  const Index bytes = counts_.bytes;
  const std::byte* from = across_.incoming();
  for_each_other_node([&](Index a) {
    for (Index i = 0; i < once_->relayed(a).of_chunk(c_); ++i, from += bytes) {
      arrived_rows_->relayed[at(a)].push_back(from);
    }
  });
  const auto for_each_row = [&](Index a, Index j, auto&& use) {
    const UniqueRows& rows = once_->passed_on(a, j);
    for (Index i = rows.first[c_]; i < rows.first[c_ + 1]; ++i) {
      use(arrived_rows_->relayed[at(a)][rows.source[i]]);
    }
  };
  for_each_other_node([&](Index a) {
    const Index source = nodes_->rank(a, nodes_->place());
    for_each_row(a, nodes_->place(),
                 [&](const std::byte* row) { arrived_rows_->of_rank[at(source)].push_back(row); });
  });
  Index offset = 0;
  for_each_other_place([&](Index j) {
    const Index first = offset;
    for_each_other_node([&](Index a) {
      for_each_row(a, j, [&](const std::byte* row) {
        std::copy_n(row, bytes, on_.outgoing() + offset);
        offset += bytes;
      });
    });
    on_.send(static_cast<int>(rank_here(j)), first, offset - first);
  });
}

inline void OnceExchange::finish_receiving() {
  near_.finish_receiving();
  across_.finish_receiving();
  if (!is_passed_on_) pass_on();
  on_.finish_receiving();
  const Index bytes = counts_.bytes;
  const auto take = [&](Index source, const std::byte*& from) {
    for (Index i = 0; i < once_->from_rank(source).of_chunk(c_); ++i, from += bytes) {
      arrived_rows_->of_rank[at(source)].push_back(from);
    }
  };
  const std::byte* from_near = near_.incoming();
  const std::byte* passed = on_.incoming();
  for_each_other_place([&](Index i) {
    take(rank_here(i), from_near);
    for_each_other_node([&](Index a) { take(nodes_->rank(a, i), passed); });
  });
  const auto ranks = static_cast<Index>(counts_.received.size()) - 1;
  for (Index s = 0; s < ranks; ++s) {
    if (s == me_) continue;
    std::byte* to = incoming_.data() + element(counts_.received, s) * bytes;
    const auto& rows = arrived_rows_->of_rank[at(s)];
    const List<std::int32_t>& row_of = once_->row_of(s);
    Index& next = arrived_rows_->assigned[s];
    for (Index i = 0; i < counts_.received_from(s); ++i, to += bytes) {
      std::copy_n(rows[row_of[next++]], bytes, to);
    }
  }
}

}  // namespace weir
