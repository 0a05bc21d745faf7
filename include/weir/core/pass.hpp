// SPDX-License-Identifier: MIT
/// \file
/// What a forward pass knows beside the token matrix.
#pragma once

#include <cstdint>
#include <span>

#include <weir/core/error.hpp>
#include <weir/core/random.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// The circumstances of one forward pass. Everything is optional, and nothing is owned: what it
/// points to has to live until the forward call returns.
struct Pass {
  /// Training: input jitter is on and capacity takes its training factor. Off for evaluation.
  bool training = false;

  /// Which rows belong together. Null: all rows are one sequence.
  const Sequences* sequences = nullptr;

  /// One byte a token, 0 for padding, which is routed nowhere, counted nowhere and attended to by
  /// no one. Empty: every token is real.
  std::span<const std::uint8_t> mask = {};

  /// The id of each token, for what routes by it. Empty: not known. Decoder::forward gives its own.
  std::span<const Index> token_ids = {};

  /// Which experts tokens may go to, one byte each, 0 for a forbidden one: [experts], for all
  /// tokens (experts that failed or are switched off), or [tokens * experts], token by token
  /// (experts of a modality). Empty: all. See expert_mask.hpp; what becomes of it,
  /// `Routing::begin`.
  std::span<const std::uint8_t> allowed = {};

  /// Where random decisions come from. Only mechanisms that draw need it, and they say so.
  Rng* rng = nullptr;

  /// What auxiliary losses, and their gradients, are multiplied by. With a batch split into
  /// micro-batches, the micro-batch's share of it; times the loss scale, if there is one.
  double aux_scale = 1.0;

  bool is_padding(Index token) const {
    return !mask.empty() && mask[static_cast<std::size_t>(token)] == 0;
  }

  /// \throws ShapeError   if mask, token_ids or sequences do not cover exactly `tokens` rows.
  void check(std::string_view where, Index tokens) const {
    if (!mask.empty() && static_cast<Index>(mask.size()) != tokens) {
      fail<ShapeError>(where, ": pass.mask has ", mask.size(), " entries, expected ", tokens,
                       " (one per token)");
    }
    if (!token_ids.empty() && static_cast<Index>(token_ids.size()) != tokens) {
      fail<ShapeError>(where, ": pass.token_ids has ", token_ids.size(), " entries, expected ",
                       tokens, " (one per token)");
    }
    if (sequences != nullptr && sequences->tokens() != tokens) {
      fail<ShapeError>(where, ": pass.sequences cover ", sequences->tokens(), " tokens, expected ",
                       tokens);
    }
  }
};

}  // namespace weir
