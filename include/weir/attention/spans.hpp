// SPDX-License-Identifier: MIT
/// \file
/// The sequences of attention: rows of queries, rows of keys, positions.
#pragma once

#include <numeric>
#include <span>

#include <weir/core/list.hpp>
#include <weir/core/token_rows.hpp>
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

/// Sets `spans` to the sequences of a pass, each with its own tokens as keys. Padding before the
/// first real token of a sequence is left out, so that positions begin at that token.
inline void fill_spans(const TokenRows& rows, List<AttentionSpan>& spans) {
  spans.clear();
  for (Index s = 0; s < rows.sequences().count(); ++s) {
    const Index end = rows.sequences().end(s);
    Index begin = rows.sequences().begin(s);
    while (begin < end && rows.is_padding(begin)) ++begin;
    spans.push_back({begin, end - begin, begin, end - begin});
  }
}

/// Sets `positions` to those of the queries of all spans, and to 0 for rows outside of them.
/// \param tokens  How many queries there are in all.
inline void fill_positions(std::span<const AttentionSpan> spans, Index tokens,
                           List<Index>& positions) {
  positions.assign(tokens, 0);
  for (const AttentionSpan& s : spans) {
    const auto first = positions.begin() + s.query_begin;
    std::iota(first, first + s.queries, s.first_position());
  }
}

}  // namespace weir
