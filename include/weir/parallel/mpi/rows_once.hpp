// SPDX-License-Identifier: MIT
/// \file
/// Which rows of tokens go to which rank and node once, for all of a token's experts there.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/parallel/mpi/exchange.hpp>
#include <weir/parallel/mpi/mpi_error.hpp>
#include <weir/parallel/mpi/row_exchange.hpp>
#include <weir/parallel/mpi/token_exchange.hpp>

namespace weir {

/// Some rows that go from one place to another, in the order of the chunks that need them first.
struct UniqueRows {
  List<Index> first;          ///< [chunks + 1]: those of all chunks before chunk c.
  List<std::int32_t> source;  ///< Of each: where it comes from, as the owner of this says.

  Index count() const { return first.back(); }
  Index of_chunk(Index c) const { return first[c + 1] - first[c]; }
  void begin(Index chunks) {
    first.assign(chunks + 1, 0);
    source.clear();
  }
};

/// What a rank sends, receives and passes on in one pass where each token's row goes once to each
/// rank with experts of its, and between nodes once to each node: to the rank there that has the
/// source's place, which passes it on inside of its node. (DeepSeek-AI 2024, arXiv:2412.19437,
/// section 3.2.2.) `source` of the rows to a rank are slots, if it shares the node, or else places
/// in the rows to its node; those of rows to a node are slots.
class RowsOnce {
 public:
  /// Tells all ranks what they will get and pass on. After the counts of the pass are known.
  /// \param token_of     The token of a slot.
  /// \param for_each_slot  `for_each_slot(c, d, use)` calls `use(slot)` for the rows to rank d in
  ///                     chunk c, in their order.
  /// \throws RankError    if a rank says what cannot be.
  template <class TokenOf, class ForEachSlot>
  void agree(Channel& channel, const NodeRanks& nodes, const TokenCounts& counts, Index tokens,
             TokenOf&& token_of, ForEachSlot&& for_each_slot);

  Index chunks() const { return chunks_; }

  const UniqueRows& to_rank(Index d) const { return to_rank_[at(d)]; }
  const UniqueRows& to_node(Index b) const { return to_node_[at(b)]; }
  /// Rows from rank s; where each of its assignments finds its row among them.
  const UniqueRows& from_rank(Index s) const { return from_rank_[at(s)]; }
  const List<std::int32_t>& row_of(Index s) const { return row_of_[at(s)]; }
  /// Rows that this rank gets from the rank of node a that has its place, to pass them on; and
  /// those of them that it passes on to place j here, whose `source` are places in them.
  const UniqueRows& relayed(Index a) const { return relayed_[at(a)]; }
  const UniqueRows& passed_on(Index a, Index j) const { return passed_on_[at(a * places_ + j)]; }

 private:
  static constexpr Index kMost = Index{1} << 30;  // Rows of one rank.
  static constexpr std::size_t at(Index i) { return static_cast<std::size_t>(i); }

  template <class TokenOf, class ForEachSlot>
  void choose(const NodeRanks& nodes, Index tokens, TokenOf&& token_of,
              ForEachSlot&& for_each_slot);
  void agree_on_counts(Channel& channel, const NodeRanks& nodes);
  void agree_on_places(Channel& channel, const NodeRanks& nodes, const TokenCounts& counts);

  Index chunks_ = 1, ranks_ = 1, places_ = 1;
  std::vector<UniqueRows> to_rank_, to_node_, from_rank_, relayed_, passed_on_;
  std::vector<List<std::int32_t>> row_of_, found_;  // Of each rank: received, and to be sent.
  List<std::int32_t> in_node_, in_rank_;            // [tokens], or -1.
  Exchange exchange_;
};

template <class TokenOf, class ForEachSlot>
void RowsOnce::agree(Channel& channel, const NodeRanks& nodes, const TokenCounts& counts,
                     Index tokens, TokenOf&& token_of, ForEachSlot&& for_each_slot) {
  chunks_ = counts.chunks();
  ranks_ = channel.size();
  places_ = nodes.places();
  for (auto* const rows : {&to_rank_, &from_rank_}) rows->resize(at(ranks_));
  for (auto* const rows : {&to_node_, &relayed_}) rows->resize(at(nodes.nodes()));
  for (auto* const lists : {&row_of_, &found_}) lists->resize(at(ranks_));
  passed_on_.resize(at(nodes.nodes() * places_));
  choose(nodes, tokens, token_of, for_each_slot);
  agree_on_counts(channel, nodes);
  agree_on_places(channel, nodes, counts);
}

template <class TokenOf, class ForEachSlot>
void RowsOnce::choose(const NodeRanks& nodes, Index tokens, TokenOf&& token_of,
                      ForEachSlot&& for_each_slot) {
  for (Index b = 0; b < nodes.nodes(); ++b) {
    UniqueRows& node = to_node_[at(b)];
    node.begin(chunks_);
    in_node_.assign(tokens, -1);
    for (Index c = 0; c < chunks_; ++c) {
      for (Index j = 0; j < places_; ++j) {
        for_each_slot(c, nodes.rank(b, j), [&](Index slot) {
          std::int32_t& place = in_node_[token_of(slot)];
          if (place >= 0) return;
          place = static_cast<std::int32_t>(node.source.count());
          node.source.push_back(static_cast<std::int32_t>(slot));
        });
      }
      node.first[c + 1] = node.source.count();
    }
    for (Index j = 0; j < places_; ++j) {
      const Index d = nodes.rank(b, j);
      UniqueRows& rank = to_rank_[at(d)];
      rank.begin(chunks_);
      found_[at(d)].clear();
      in_rank_.assign(tokens, -1);
      for (Index c = 0; c < chunks_; ++c) {
        for_each_slot(c, d, [&](Index slot) {
          const Index token = token_of(slot);
          std::int32_t& place = in_rank_[token];
          if (place < 0) {
            place = static_cast<std::int32_t>(rank.source.count());
            rank.source.push_back(b == nodes.node() ? static_cast<std::int32_t>(slot)
                                                    : in_node_[token]);
          }
          found_[at(d)].push_back(place);
        });
        rank.first[c + 1] = rank.source.count();
      }
    }
  }
}

/// To each rank how many rows come in each chunk; to one that relays, how many it gets for its
/// node, and for each place there.
inline void RowsOnce::agree_on_counts(Channel& channel, const NodeRanks& nodes) {
  const Index me = channel.rank(), long_words = chunks_ * (2 + places_);
  constexpr Index kWord = sizeof(std::int64_t);
  const auto words = [&](Index node, Index place, Index other) {
    return place == other && node != nodes.node() ? long_words : chunks_;
  };
  exchange_.begin(channel, "rows that go once", ranks_ * long_words * kWord,
                  ranks_ * long_words * kWord);
  auto* const outgoing = reinterpret_cast<std::int64_t*>(exchange_.outgoing());
  for (Index n = 0; n < nodes.nodes(); ++n) {
    for (Index j = 0; j < places_; ++j) {
      const Index r = nodes.rank(n, j);
      if (r == me) continue;
      exchange_.receive(static_cast<int>(r), r * long_words * kWord,
                        words(n, j, nodes.place()) * kWord);
    }
  }
  const auto put = [&](std::int64_t*& to, const UniqueRows& rows) {
    for (Index c = 0; c < chunks_; ++c) *to++ = rows.of_chunk(c);
  };
  for (Index n = 0; n < nodes.nodes(); ++n) {
    for (Index j = 0; j < places_; ++j) {
      const Index r = nodes.rank(n, j);
      std::int64_t* to = outgoing + r * long_words;
      put(to, to_rank_[at(r)]);
      if (words(n, j, nodes.place()) == long_words) {
        put(to, to_node_[at(n)]);
        for (Index i = 0; i < places_; ++i) put(to, to_rank_[at(nodes.rank(n, i))]);
      }
      if (r == me) continue;
      exchange_.send(static_cast<int>(r), r * long_words * kWord,
                     words(n, j, nodes.place()) * kWord);
    }
  }
  exchange_.finish();
  const auto* const incoming = reinterpret_cast<const std::int64_t*>(exchange_.incoming());
  for (Index n = 0; n < nodes.nodes(); ++n) {
    for (Index j = 0; j < places_; ++j) {
      const Index r = nodes.rank(n, j);
      const std::int64_t* from = (r == me ? outgoing : incoming) + r * long_words;
      const auto take = [&](UniqueRows& rows) {
        rows.begin(chunks_);
        for (Index c = 0; c < chunks_; ++c) {
          const std::int64_t count = *from++;
          if (count < 0 || count > kMost) {
            throw_error<RankError>("rows that go once: rank ", r, " of ", ranks_, " has ", count,
                                   " rows, expected 0 <= rows <= ", kMost);
          }
          rows.first[c + 1] = rows.first[c] + static_cast<Index>(count);
        }
      };
      take(from_rank_[at(r)]);
      if (words(n, j, nodes.place()) != long_words) continue;
      take(relayed_[at(n)]);
      for (Index i = 0; i < places_; ++i) take(passed_on_[at(n * places_ + i)]);
    }
  }
}

/// To each rank where its assignments find their rows; to one that relays, which of its rows go to
/// each place.
inline void RowsOnce::agree_on_places(Channel& channel, const NodeRanks& nodes,
                                      const TokenCounts& counts) {
  const Index me = channel.rank();
  constexpr Index kWord = sizeof(std::int32_t);
  const auto for_each_rank = [&](auto&& use) {
    for (Index n = 0; n < nodes.nodes(); ++n) {
      for (Index j = 0; j < places_; ++j) {
        const Index r = nodes.rank(n, j);
        if (r != me) use(r, n, n != nodes.node() && j == nodes.place());
      }
    }
  };
  Index leaving = 0, arriving = 0;
  for_each_rank([&](Index r, Index n, bool relays) {
    leaving += found_[at(r)].count();
    for (Index c = 0; c < chunks_; ++c) arriving += counts.received(c, r);
    for (Index i = 0; relays && i < places_; ++i) {
      leaving += to_rank_[at(nodes.rank(n, i))].count();
      arriving += passed_on_[at(n * places_ + i)].count();
    }
  });
  exchange_.begin(channel, "places of rows", leaving * kWord, arriving * kWord);
  Index offset = 0;
  for_each_rank([&](Index r, Index n, bool relays) {
    Index words = 0;
    for (Index c = 0; c < chunks_; ++c) words += counts.received(c, r);
    row_of_[at(r)].resize(words);
    for (Index i = 0; relays && i < places_; ++i) {
      words += passed_on_[at(n * places_ + i)].count();
    }
    exchange_.receive(static_cast<int>(r), offset * kWord, words * kWord);
    offset += words;
  });
  auto* to = reinterpret_cast<std::int32_t*>(exchange_.outgoing());
  const auto* const begin = to;
  for_each_rank([&](Index r, Index n, bool relays) {
    const Index first = to - begin;
    to = std::copy(found_[at(r)].begin(), found_[at(r)].end(), to);
    for (Index i = 0; relays && i < places_; ++i) {
      const List<std::int32_t>& source = to_rank_[at(nodes.rank(n, i))].source;
      to = std::copy(source.begin(), source.end(), to);
    }
    exchange_.send(static_cast<int>(r), first * kWord, (to - begin - first) * kWord);
  });
  exchange_.finish();
  const auto* from = reinterpret_cast<const std::int32_t*>(exchange_.incoming());
  for_each_rank([&](Index r, Index n, bool relays) {
    // A place among the rows that are there by then, from the last chunk backwards.
    const auto take = [&](List<std::int32_t>& places, const UniqueRows& among, auto&& end_of) {
      Index i = 0;
      for (Index c = 0; c < chunks_; ++c) {
        for (const Index end = end_of(c); i < end; ++i) {
          places[i] = *from++;
          if (places[i] >= 0 && places[i] < among.first[c + 1]) continue;
          throw_error<RankError>("places of rows: rank ", r, " of ", ranks_, " names row ",
                                 places[i], ", expected 0 <= row < ", among.first[c + 1]);
        }
      }
    };
    Index received = 0;
    take(row_of_[at(r)], from_rank_[at(r)],
         [&](Index c) { return received += counts.received(c, r); });
    for (Index i = 0; relays && i < places_; ++i) {
      UniqueRows& passed = passed_on_[at(n * places_ + i)];
      passed.source.resize(passed.count());
      take(passed.source, relayed_[at(n)], [&](Index c) { return passed.first[c + 1]; });
    }
  });
}

}  // namespace weir
