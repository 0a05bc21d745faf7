// SPDX-License-Identifier: MIT
/// \file
/// The heads of softmax attention, and which keys a query sees.
#pragma once

#include <algorithm>
#include <limits>

#include <weir/core/types.hpp>

namespace weir {

/// How the columns of queries, keys and values divide into heads, and how the product of a query
/// and a key becomes a score. Query head h reads the keys and values of head h / (heads / kv_heads)
/// (Ainslie et al. 2023, arXiv:2305.13245).
struct AttentionHeads {
  Index heads = 0;      ///< Heads of the queries; a multiple of kv_heads.
  Index kv_heads = 0;   ///< Heads of the keys and values.
  Index head_dim = 0;   ///< Numbers in a query and in a key of one head.
  Index value_dim = 0;  ///< Numbers in a value of one head.
  double scale = 1.0;   ///< Multiplies the product of query and key, such as 1 / sqrt(head_dim).

  /// Above zero, a score becomes softcap * tanh(score / softcap), which keeps it in (-softcap,
  /// softcap). (Gemma Team 2024, arXiv:2408.00118; before it Grok-1's released code.)
  double softcap = 0.0;

  /// Above zero, a query sees the last `window` keys, its own included (Beltagy et al. 2020,
  /// arXiv:2004.05150; Jiang et al. 2023, arXiv:2310.06825).
  Index window = 0;

  /// Above zero, a query sees keys of its own chunk: those whose position / chunk, rounded down, is
  /// its own (Llama 4's released code).
  Index chunk = 0;

  Index group() const { return heads / kv_heads; }

  /// The lowest position that a query at `position` sees.
  Index first_visible(Index position) const {
    Index first = 0;
    if (window > 0) first = std::max<Index>(first, position - window + 1);
    if (chunk > 0) first = std::max(first, position / chunk * chunk);
    return first;
  }

  /// The highest position from which a key at `position` is seen.
  Index last_seeing(Index position) const {
    // The half leaves room for additions.
    constexpr Index kFar = std::numeric_limits<Index>::max() / 2;
    Index last = kFar;
    if (window > 0) last = std::min(last, position + std::min(window, kFar / 2) - 1);
    if (chunk > 0) last = std::min(last, position + (chunk - position % chunk) - 1);
    return last;
  }

  /// The most keys that one of the queries of `keys` tokens sees.
  Index most_visible(Index keys) const {
    if (window > 0) keys = std::min(keys, window);
    if (chunk > 0) keys = std::min(keys, chunk);
    return keys;
  }
};

}  // namespace weir
