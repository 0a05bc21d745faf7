// SPDX-License-Identifier: MIT
/// \file
/// From token ids to what a training step of a language model takes: ids, the tokens that follow
/// them, sequences and padding.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/token_ids.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Sequences of tokens, one after the other, each token with the one that follows it.
///
///     const TokenBatch batch = packed_batch(documents);
///     const Matrix<float>& logits = model.forward(batch.ids, batch.training(&rng), cache);
///     loss.forward(logits, batch.targets, loss_cache);
struct TokenBatch {
  std::vector<Index> ids;
  std::vector<Index> targets;      ///< One per id; `ignore_index` where the id is padding.
  std::vector<std::uint8_t> mask;  ///< One per id, 0 for padding; empty if there is none.
  Sequences sequences;

  /// A pass that trains on the batch, which has to outlive it.
  Pass training(Rng* rng = nullptr) const {
    return {.training = true, .sequences = &sequences, .mask = mask, .rng = rng};
  }

  /// A pass that only looks at the loss.
  Pass evaluation() const { return {.sequences = &sequences, .mask = mask}; }

  /// How many tokens are no padding.
  Index real_tokens() const {
    return mask.empty() ? static_cast<Index>(ids.size())
                        : static_cast<Index>(std::count(mask.begin(), mask.end(), 1));
  }
};

/// Settings of `padded_batch`.
struct PaddedBatchConfig {
  Index length = 0;   ///< Of each sequence; 0: that of the longest document without its last token.
  bool left = false;  ///< Whether padding comes first, as for generating from prompts.
  Index pad_id = 0;   ///< The id of padding, which nobody looks at.
  Index ignore_index = kNoTarget;  ///< The target of padding, see CrossEntropyConfig.
};

namespace detail {

inline void expect_document(std::string_view where, std::size_t index, TokenIds document) {
  if (document.count() >= 2) return;
  throw_error<ConfigError>(where, ": documents[", index, "] has ", document.count(),
                           " tokens, expected at least 2 (one follows another)");
}

/// Adds tokens `begin` to `begin + count` of `text`, which has one more, as a sequence.
inline void add_tokens(TokenIds text, Index begin, Index count, TokenBatch& batch) {
  for (Index i = begin; i < begin + count; ++i) {
    batch.ids.push_back(text[i]);
    batch.targets.push_back(text[i + 1]);
  }
}

}  // namespace detail

/// Windows of a long text, each a sequence: tokens [start, start + length) and what follows each.
/// \throws ConfigError  unless length >= 1 and each window and one token more are inside the text.
inline TokenBatch window_batch(TokenIds text, std::span<const Index> starts, Index length) {
  expect_at_least<Index>("window_batch", "length", length, 1);
  for (std::size_t i = 0; i < starts.size(); ++i) {
    if (starts[i] >= 0 && length < text.count() && starts[i] < text.count() - length) continue;
    throw_error<ConfigError>(
        "window_batch: starts[", i, "] = ", starts[i], " with length = ", length,
        ", expected a window and one token more inside ", text.count(), " tokens");
  }
  TokenBatch batch;
  for (const Index start : starts) {
    detail::add_tokens(text, start, length, batch);
    batch.sequences.append(length);
  }
  return batch;
}

/// The documents one after the other, each a sequence of its own length: no token is padding, and
/// none sees another document.
/// \throws ConfigError  if a document has fewer than two tokens.
inline TokenBatch packed_batch(std::span<const std::vector<Index>> documents) {
  for (std::size_t d = 0; d < documents.size(); ++d) {
    detail::expect_document("packed_batch", d, documents[d]);
  }
  TokenBatch batch;
  for (const std::vector<Index>& document : documents) {
    const auto count = static_cast<Index>(document.size()) - 1;
    detail::add_tokens(document, 0, count, batch);
    batch.sequences.append(count);
  }
  return batch;
}

/// The documents as sequences of one length, filled up with padding; what is longer is cut off.
/// \throws ConfigError  if a document has fewer than two tokens, or `length` is negative.
inline TokenBatch padded_batch(std::span<const std::vector<Index>> documents,
                               const PaddedBatchConfig& config = {}) {
  expect_at_least<Index>("padded_batch", "length", config.length, 0);
  Index length = config.length;
  for (std::size_t d = 0; d < documents.size(); ++d) {
    detail::expect_document("padded_batch", d, documents[d]);
    if (config.length == 0) length = std::max(length, static_cast<Index>(documents[d].size()) - 1);
  }
  TokenBatch batch;
  const auto pad = [&](Index count) {
    const auto more = static_cast<std::size_t>(count);
    batch.ids.insert(batch.ids.end(), more, config.pad_id);
    batch.targets.insert(batch.targets.end(), more, config.ignore_index);
    batch.mask.insert(batch.mask.end(), more, 0);
  };
  for (const std::vector<Index>& document : documents) {
    const Index count = std::min(length, static_cast<Index>(document.size()) - 1);
    if (config.left) pad(length - count);
    detail::add_tokens(document, 0, count, batch);
    batch.mask.insert(batch.mask.end(), static_cast<std::size_t>(count), 1);
    if (!config.left) pad(length - count);
    batch.sequences.append(length);
  }
  if (batch.real_tokens() == static_cast<Index>(batch.ids.size())) batch.mask.clear();
  return batch;
}

/// Divides items, such as documents, among bins of at most `capacity`, such as the tokens of a
/// batch: from the longest to the shortest (the earlier of equal ones first), each goes to the
/// first bin with room for it. (First-fit decreasing; at most 11/9 of the fewest possible bins and
/// one more, Dósa 2007.)
///
/// \param lengths  How much room each item takes, such as its number of tokens less one.
/// \return         The items of each bin, in ascending order; the bins in the order of their
///                 longest item.
/// \throws ConfigError  if a length is negative or above the capacity.
inline std::vector<std::vector<Index>> pack_items(std::span<const Index> lengths, Index capacity) {
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    expect_in<Index>("pack_items", "lengths[" + std::to_string(i) + "]", lengths[i], 0, capacity);
  }
  const auto length = [&](Index item) { return lengths[static_cast<std::size_t>(item)]; };
  std::vector<Index> order(lengths.size());
  std::iota(order.begin(), order.end(), Index{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](Index a, Index b) { return length(a) > length(b); });
  std::vector<std::vector<Index>> bins;
  std::vector<Index> room;
  for (const Index item : order) {
    std::size_t bin = 0;
    while (bin < bins.size() && room[bin] < length(item)) ++bin;
    if (bin == bins.size()) {
      bins.emplace_back();
      room.push_back(capacity);
    }
    bins[bin].push_back(item);
    room[bin] -= length(item);
  }
  for (std::vector<Index>& bin : bins) std::sort(bin.begin(), bin.end());
  return bins;
}

}  // namespace weir
