// SPDX-License-Identifier: MIT
/// \file
/// What a Decoder is told, and what it remembers.
#pragma once

#include <concepts>
#include <vector>

#include <weir/core/cache_storage.hpp>
#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/model/block.hpp>

namespace weir {

/// Settings of `Decoder`.
struct DecoderConfig {
  double embedding_multiplier = 1.0;  ///< e; Grok-1: sqrt(d_model).
  double logit_multiplier = 1.0;      ///< m of LogitScale.
  double logit_softcap = 0.0;         ///< c of LogitScale; 0 stands for none.
  bool recompute = false;             ///< Whether training trades time for memory: BlockStack.
};

/// What decoding remembers about one sequence. A copy continues on its own.
template <std::floating_point T>
struct DecoderState {
  std::vector<typename Block<T>::State> layers;
  Index length = 0;  ///< Tokens so far.

  DecoderState() = default;
  /// \param storage  How attention layers keep their keys and values. Sequences of one pass may
  ///                 differ in that.
  explicit DecoderState(CacheStorage storage) : storage_(storage) {}

  CacheStorage storage() const { return storage_; }

  /// What all layers keep of a token; 0 before the first one.
  Index bytes_per_token() const {
    Index sum = 0;
    for (const auto& layer : layers) {
      for (const auto& branch : layer.branches) sum += branch.bytes_per_token();
    }
    return sum;
  }

  /// Forgets all tokens but the first `to`, as after a draft that was not accepted.
  /// \throws ConfigError  unless 0 <= to <= length.
  /// \throws StateError   if a layer has already forgotten what would then be needed, such as
  ///                      keys that had left a window. The state cannot be continued then.
  void truncate(Index to) {
    expect_in<Index>("Decoder::State::truncate", "length", to, 0, length);
    for (auto& layer : layers) layer.truncate(to);
    length = to;
  }

 private:
  CacheStorage storage_ = CacheStorage::kFull;
};

/// The gradient that h gets from elsewhere than the logits; null, or alive while `backward` runs.
template <std::floating_point T>
struct HiddenGradient {
  const Matrix<T>* hidden = nullptr;  ///< The gradient of `hidden`, [tokens, d_model].
  const Matrix<T>* normed = nullptr;  ///< The gradient of `normed`, [tokens, d_model].
};

}  // namespace weir
