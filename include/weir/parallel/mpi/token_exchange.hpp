// SPDX-License-Identifier: MIT
/// \file
/// Who sends how many rows to whom, in one pass of experts that are spread over ranks.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/parallel/mpi/exchange.hpp>
#include <weir/parallel/mpi/row_exchange.hpp>
#include <weir/parallel/placement.hpp>

namespace weir {

/// What all ranks have to agree on before rows travel; checked with each pass.
struct TokenExchangeTerms {
  static constexpr std::size_t kCount = 11;
  static constexpr std::array<std::string_view, kCount> kNames = {
      "version",        "d_in",      "d_out",        "experts",
      "chunks",         "training",  "placement",    "dispatch_format",
      "combine_format", "two_level", "once_per_node"};

  std::array<std::int64_t, kCount> values{};
};

/// The rows that travel in one pass, by rank, expert and chunk. Rank d gets the rows of its experts
/// in as many chunks as the program asks for; chunk c has those of the slots
///
///     floor(c slots / chunks)  to  floor((c + 1) slots / chunks)
///
/// of d, so that an expert's rows are all in one chunk, and are added up in the order in which one
/// process would add them. Rows come in the order of their ranks, then slots, then tokens.
class TokenCounts {
 public:
  /// Tells the other ranks how many rows they will get for each of their experts, and hears from
  /// them how many come. This is the only exchange of counts for a pass and its backward pass.
  /// \param nodes    Null unless rows go in two levels: then ranks of a node tell each other as
  /// well
  ///                 what they will have to pass on.
  /// \param rows_of  How many rows this rank sends to each expert.
  /// \throws RankError    if another rank has other terms, or says what cannot be.
  template <class RowsOf>
  void agree(Channel& channel, const Placement& placement, std::span<const Index> destination,
             const TokenExchangeTerms& terms, Index chunks, const NodeRanks* nodes,
             RowsOf&& rows_of);

  /// The rows of chunk c on their way out, and back; of `bytes` each.
  RowCounts out(Index c, Index bytes) const {
    return {of_chunk(sent_, c), of_chunk(received_, c), of_relays(relayed_out_, c), bytes};
  }
  RowCounts back(Index c, Index bytes) const {
    return {of_chunk(received_, c), of_chunk(sent_, c), of_relays(relayed_back_, c), bytes};
  }

  Index chunks() const { return chunks_; }

  /// How many rows of chunk c this rank sends to rank d, d < ranks, or to all ranks before d.
  Index sent(Index c, Index d) const { return sent_[place(c, d) + 1] - sent_[place(c, d)]; }
  Index sent_before(Index c, Index d) const { return sent_[place(c, d)]; }
  /// The same of what this rank receives.
  Index received(Index c, Index s) const { return received_[place(c, s) + 1] - sent_from(c, s); }
  Index received_before(Index c, Index s) const { return sent_from(c, s); }

  Index sent(Index c) const { return sent_before(c, ranks_); }
  Index received(Index c) const { return received_before(c, ranks_); }

  /// How many rows of rank s this rank's slot l gets.
  Index rows(Index s, Index l) const { return rows_[s * slots_ + l]; }
  /// The first slot of chunk c of a rank that has `slots`.
  Index first_slot(Index c, Index slots) const { return c * slots / chunks_; }

 private:
  static constexpr Index kMost = Index{1} << 40;  // No rank has more rows; bytes do not overflow.

  std::span<const Index> of_chunk(const List<Index>& counts, Index c) const {
    return span_of(counts.data() + place(c, 0), ranks_ + 1);
  }
  std::span<const Index> of_relays(const List<Index>& counts, Index c) const {
    const Index size = counts.count() / chunks_;
    return span_of(counts.data() + c * size, size);
  }
  void agree_on_relays(Channel& channel, const NodeRanks& nodes);

  Index place(Index c, Index rank) const { return c * (ranks_ + 1) + rank; }
  Index sent_from(Index c, Index s) const { return received_[place(c, s)]; }
  void read(const std::byte* from, Index s, const TokenExchangeTerms& terms, Index me);

  Index chunks_ = 1, ranks_ = 1, slots_ = 0;
  List<Index> rows_;                        // [ranks, slots of this rank]
  List<Index> sent_, received_;             // [chunks, ranks + 1], sums from the first rank on.
  List<Index> relayed_out_, relayed_back_;  // [chunks, places, nodes], or empty.
  Exchange exchange_;
};

template <class RowsOf>
void TokenCounts::agree(Channel& channel, const Placement& placement,
                        std::span<const Index> destination, const TokenExchangeTerms& terms,
                        Index chunks, const NodeRanks* nodes, RowsOf&& rows_of) {
  const Index me = channel.rank();
  chunks_ = chunks;
  ranks_ = channel.size();
  slots_ = placement.slots(me);
  constexpr Index kWord = sizeof(std::int64_t);
  constexpr auto kHead = static_cast<Index>(TokenExchangeTerms::kCount);
  Index words = 0;
  for (Index d = 0; d < ranks_; ++d) words += kHead + placement.slots(d);
  exchange_.begin(channel, "counts of tokens", words * kWord, ranks_ * (kHead + slots_) * kWord);

  for (Index s = 0; s < ranks_; ++s) {
    if (s == me) continue;
    exchange_.receive(static_cast<int>(s), s * (kHead + slots_) * kWord, (kHead + slots_) * kWord);
  }
  rows_.assign(ranks_ * slots_, 0);
  sent_.assign(chunks_ * (ranks_ + 1), 0);
  received_.assign(chunks_ * (ranks_ + 1), 0);
  auto* const outgoing = reinterpret_cast<std::int64_t*>(exchange_.outgoing());
  Index offset = 0;
  for (Index d = 0; d < ranks_; ++d) {
    std::int64_t* const message = outgoing + offset;
    std::copy(terms.values.begin(), terms.values.end(), message);
    const std::span<const Index> experts = placement.experts_on(d);
    const Index slots = placement.slots(d);
    for (Index c = 0; c < chunks_; ++c) {
      Index rows_of_chunk = 0;
      for (Index l = first_slot(c, slots); l < first_slot(c + 1, slots); ++l) {
        const Index e = element(experts, l);
        const Index rows = element(destination, e) == d ? rows_of(e) : 0;
        message[kHead + l] = rows;
        rows_of_chunk += rows;
        if (d == me) rows_[me * slots_ + l] = rows;
      }
      sent_[place(c, d) + 1] = sent_[place(c, d)] + rows_of_chunk;
    }
    if (d != me) exchange_.send(static_cast<int>(d), offset * kWord, (kHead + slots) * kWord);
    offset += kHead + slots;
  }
  exchange_.finish();

  for (Index s = 0; s < ranks_; ++s) {
    if (s != me) read(exchange_.incoming() + s * (kHead + slots_) * kWord, s, terms, me);
    for (Index c = 0; c < chunks_; ++c) {
      Index rows_of_chunk = 0;
      for (Index l = first_slot(c, slots_); l < first_slot(c + 1, slots_); ++l) {
        rows_of_chunk += rows(s, l);
      }
      received_[place(c, s) + 1] = received_[place(c, s)] + rows_of_chunk;
    }
  }
  relayed_out_.clear();
  relayed_back_.clear();
  if (nodes != nullptr) agree_on_relays(channel, *nodes);
}

inline void TokenCounts::agree_on_relays(Channel& channel, const NodeRanks& nodes) {
  const Index per_chunk = nodes.places() * nodes.nodes();
  const Index words = 2 * chunks_ * nodes.nodes();
  constexpr Index kWord = sizeof(std::int64_t);
  exchange_.begin(channel, "counts of relays", words * nodes.places() * kWord,
                  words * nodes.places() * kWord);
  auto* const outgoing = reinterpret_cast<std::int64_t*>(exchange_.outgoing());
  relayed_out_.assign(chunks_ * per_chunk, 0);
  relayed_back_.assign(chunks_ * per_chunk, 0);
  for (Index j = 0; j < nodes.places(); ++j) {
    const auto rank = static_cast<int>(nodes.rank(nodes.node(), j));
    if (j != nodes.place()) exchange_.receive(rank, j * words * kWord, words * kWord);
  }
  for (Index j = 0; j < nodes.places(); ++j) {
    std::int64_t* to = outgoing + j * words;
    for (Index c = 0; c < chunks_; ++c) {
      for (Index b = 0; b < nodes.nodes(); ++b) {
        *to++ = sent(c, nodes.rank(b, j));
        *to++ = received(c, nodes.rank(b, j));
      }
    }
    const auto rank = static_cast<int>(nodes.rank(nodes.node(), j));
    if (j != nodes.place()) exchange_.send(rank, j * words * kWord, words * kWord);
  }
  exchange_.finish();
  const auto* const incoming = reinterpret_cast<const std::int64_t*>(exchange_.incoming());
  for (Index i = 0; i < nodes.places(); ++i) {
    const std::int64_t* from = (i == nodes.place() ? outgoing : incoming) + i * words;
    for (Index c = 0; c < chunks_; ++c) {
      for (Index b = 0; b < nodes.nodes(); ++b) {
        for (List<Index>* const relayed : {&relayed_out_, &relayed_back_}) {
          const std::int64_t rows = *from++;
          if (rows < 0 || rows > kMost) {
            throw_error<RankError>("counts of relays: rank ", nodes.rank(nodes.node(), i), " of ",
                                   ranks_, " has ", rows, " rows, expected 0 <= rows <= ", kMost);
          }
          (*relayed)[c * per_chunk + i * nodes.nodes() + b] = rows;
        }
      }
    }
  }
}

inline void TokenCounts::read(const std::byte* from, Index s, const TokenExchangeTerms& terms,
                              Index me) {
  const auto* const message = reinterpret_cast<const std::int64_t*>(from);
  for (std::size_t i = 0; i < TokenExchangeTerms::kCount; ++i) {
    if (message[i] == terms.values[i]) continue;
    throw_error<RankError>("counts of tokens: rank ", s, " of ", ranks_, " has ",
                           TokenExchangeTerms::kNames[i], " = ", message[i], ", expected ",
                           terms.values[i], " as rank ", me);
  }
  for (Index l = 0; l < slots_; ++l) {
    const std::int64_t rows = message[static_cast<Index>(TokenExchangeTerms::kCount) + l];
    if (rows < 0 || rows > kMost) {
      throw_error<RankError>("counts of tokens: rank ", s, " of ", ranks_, " sends ", rows,
                             " rows to slot ", l, " of rank ", me,
                             ", expected 0 <= rows <= ", kMost);
    }
    rows_[s * slots_ + l] = rows;
  }
}

}  // namespace weir
