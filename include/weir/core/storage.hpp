// SPDX-License-Identifier: MIT
/// \file
/// How the weights of a layer are stored for multiplication.
#pragma once

#include <cstdint>
#include <string_view>

#include <weir/core/error.hpp>

namespace weir {

/// How a layer keeps its weight matrices; see `set_storage`.
enum class Storage : std::uint8_t {
  /// As parameters: trainable, and arranged for multiplication anew in every pass.
  kTrainable,
  /// Arranged once, for inference: forward passes are faster, above all with few tokens. The layer
  /// has no parameters and cannot be trained.
  kPacked,
  /// As `kPacked`, but rounded to bfloat16 (8 bits of significand): half the memory, and up to
  /// twice the speed. Products are summed in float. Where the processor multiplies bfloat16 numbers
  /// itself (AVX512_BF16), tokens are rounded to bfloat16 as well on their way into a product;
  /// elsewhere the weights are widened exactly and multiplied in float. A layer in double, whose
  /// purpose is checking, keeps the rounded weights as doubles.
  kBfloat16,
};

/// \throws StateError   unless `storage` is kTrainable; `who` is the function that needs that.
inline void expect_trainable(std::string_view who, Storage storage) {
  if (storage != Storage::kTrainable) {
    throw_error<StateError>(who,
                            ": the weights are stored for inference, expected Storage::kTrainable");
  }
}

}  // namespace weir
