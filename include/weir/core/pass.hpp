// SPDX-License-Identifier: MIT
/// \file
/// What a forward pass is told beside the token matrix.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/input_observer.hpp>
#include <weir/core/name_pattern.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/core/random.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// The circumstances of one forward pass. Everything is optional. Nothing is owned: whatever a
/// member points to has to live until the forward call returns.
struct Pass {
  /// Whether a backward pass may follow. In training, noise and jitter are on, capacity takes its
  /// training factor, auxiliary losses are computed and caches keep what `backward` needs. An
  /// inference pass does none of that, and `backward` refuses its cache.
  bool training = false;

  /// Which rows belong together. If null, all rows are one sequence.
  const Sequences* sequences = nullptr;

  /// One byte per token, 0 for padding, which is routed nowhere, counted nowhere and attended to by
  /// no one, and may hold anything (see PaddingRows). If empty, every token is real.
  std::span<const std::uint8_t> mask = {};

  /// The id of each token, for routers that use it. Empty if unknown; Decoder fills it in.
  std::span<const Index> token_ids = {};

  /// The place of each token in its sequence, where the pass has a part of the sequence's tokens
  /// only, as inside of a MixtureOfDepths. If empty, the tokens of each sequence have the places 0,
  /// 1, 2, ...
  std::span<const Index> places = {};

  /// Which experts tokens may go to, one byte each, 0 for a forbidden one: [experts], for all
  /// tokens (experts that failed or are switched off), or [tokens * experts], token by token
  /// (experts of a modality). If empty, all are allowed. See expert_mask.hpp and `Routing::begin`.
  std::span<const std::uint8_t> allowed = {};

  /// The share of all experts that each token goes without in each mixture: those of its largest
  /// logits, as many as the share rounded to whole experts makes. It is for measuring how well
  /// others can stand in for them, see loss_without_best. At least 0 and below 1.
  double without_best = 0.0;

  /// The generator for random decisions. Only mechanisms that draw need it, and they say so.
  Rng* rng = nullptr;

  /// The factor of auxiliary losses and of their gradients. With a batch split into micro-batches
  /// it is the micro-batch's share of the batch; with a loss scale it is multiplied by that. With 0
  /// there are no auxiliary losses.
  double aux_scale = 1.0;

  /// Where layers record their auxiliary losses and reports. It may be null; in training the losses
  /// are differentiated all the same.
  PassRecord* record = nullptr;

  /// Who sees the rows that weights are multiplied with; null for nobody.
  InputObserver* inputs = nullptr;

  /// Which adapters of the weights take part: those whose names match this pattern, see
  /// `matches_pattern`. By default all; with "" none, which is the model without adapters.
  std::string_view adapters = "*";

  /// Whether a training pass may be followed by `backward` where weights are stored for inference:
  /// they get no gradient, but what comes before them does, such as adapters of layers before.
  bool through_stored = false;

  bool adapts_by(std::string_view name) const { return matches_pattern(adapters, name); }

  bool is_padding(Index token) const { return !mask.empty() && element(mask, token) == 0; }

  /// Shows the rows that `weight` is multiplied with, if somebody wants to see them.
  template <class T>
  void show(const Parameter<T>& weight, MatrixIn<T> x) const {
    if (inputs == nullptr || weight.value.size() == 0) return;
    const bool masked = x.rows() == static_cast<Index>(mask.size());
    inputs->see(weight, x, masked ? mask : std::span<const std::uint8_t>());
  }

  /// Whether auxiliary losses are computed.
  bool has_aux_losses() const { return aux_scale != 0.0 && (training || record != nullptr); }

  /// The generator that `who` draws from.
  /// \throws ConfigError  if the pass came without a generator.
  Rng& generator(std::string_view who) const {
    if (rng == nullptr) {
      throw_error<ConfigError>(who, ": pass.rng = null, expected a generator",
                               training ? " in training" : "");
    }
    return *rng;
  }

  /// \throws ShapeError   if mask, token_ids, places or sequences do not cover exactly `tokens`
  /// rows.
  void check(std::string_view where, Index tokens) const {
    expect_one_each(where, "mask", static_cast<Index>(mask.size()), tokens);
    expect_one_each(where, "token_ids", static_cast<Index>(token_ids.size()), tokens);
    expect_one_each(where, "places", static_cast<Index>(places.size()), tokens);
    if (sequences != nullptr && sequences->tokens() != tokens) {
      throw_error<ShapeError>(where, ": pass.sequences cover ", sequences->tokens(),
                              " tokens, expected ", tokens);
    }
  }

 private:
  static void expect_one_each(std::string_view where, std::string_view name, Index size,
                              Index tokens) {
    if (size == 0 || size == tokens) return;
    throw_error<ShapeError>(where, ": pass.", name, " has ", size, " entries, expected ", tokens,
                            " (one per token)");
  }
};

/// A pass that trains and has no other circumstances.
inline constexpr Pass kTraining{.training = true};

}  // namespace weir
