// SPDX-License-Identifier: MIT
/// \file
/// The sequences of attention: rows of queries, rows of keys, positions.
#pragma once

#include <numeric>
#include <span>

#include <weir/core/list.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// One sequence. Its queries are its last tokens; its keys are all tokens, or all that have not
/// been forgotten. Query i sees the keys up to its own, number `prefix() + i`.
struct AttentionSpan {
  Index query_begin, queries;  ///< Rows of q.
  Index key_begin, keys;       ///< Rows of k and v; keys >= queries.
  Index first_key = 0;         ///< Position of the first key.

  /// How many keys come before that of the first query.
  Index prefix() const { return keys - queries; }
  /// The position of the first query.
  Index first_position() const { return first_key + prefix(); }
};

/// Sets `spans` to the sequences of a pass, each with its own tokens as keys.
inline void fill_spans(const Sequences& sequences, List<AttentionSpan>& spans) {
  spans.clear();
  for (Index s = 0; s < sequences.count(); ++s) {
    const Index begin = sequences.begin(s);
    const Index length = sequences.length(s);
    spans.push_back({begin, length, begin, length});
  }
}

/// Sets `positions` to those of the queries of all spans.
/// \param tokens  How many queries there are in all.
inline void fill_positions(std::span<const AttentionSpan> spans, Index tokens,
                           List<Index>& positions) {
  positions.resize(tokens);
  for (const AttentionSpan& s : spans) {
    const auto first = positions.begin() + s.query_begin;
    std::iota(first, first + s.queries, s.first_position());
  }
}

}  // namespace weir
