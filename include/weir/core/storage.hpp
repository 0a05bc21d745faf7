// SPDX-License-Identifier: MIT
/// \file
/// How the weights of a layer are stored for multiplication.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include <weir/core/enum_names.hpp>
#include <weir/core/error.hpp>

namespace weir {

/// How a layer keeps its weight matrices; see `set_storage`.
///
/// Where weights and tokens are normally distributed, the relative error of a product, as measured,
/// is 0.17 % for kBfloat16, and 0.24 % where tokens are rounded as well; 0.54 % for kInt8, 0.76 %
/// for kInt8Dot, 2.7 % for kFp8, 7.8 % for kInt4, 7.9 % for kInt4Dot, and 11.2 % for kMxFp4.
/// `storage_report` measures that for the weights of a model, and `calibrate` makes it less for 4
/// bits.
///
/// Where the processor has tiles (AMX) and the system lets the process use them, products with
/// codes are computed in tiles: for kInt8, kInt4, kFp8 and kMxFp4, tokens are then rounded to
/// bfloat16 on their way into a product, as for kBfloat16, which makes 0.56 % of the 0.54 % and no
/// difference to the others in these digits. Elsewhere, and after `kernels::use_tiles(false)`,
/// tokens are multiplied as they are.
enum class Storage : std::uint8_t {
  /// As parameters: trainable, and arranged for multiplication anew in every pass.
  kTrainable,
  /// Arranged once, for inference: forward passes are faster, above all with few tokens. The layer
  /// has no parameters and cannot be trained.
  kPacked,
  /// As `kPacked`, but rounded to bfloat16 (8 bits of significand): half the memory, and up to
  /// twice the speed. Products are summed in float. Where the processor multiplies bfloat16 numbers
  /// itself (AVX512_BF16), tokens are rounded to bfloat16 as well on their way into a product;
  /// elsewhere the weights are widened exactly and multiplied in float. Where it has tiles (AMX)
  /// and the system lets the process use them, products are computed in those, many times as fast
  /// for many tokens and with other last bits: see `kernels::use_tiles`. A layer in double, whose
  /// purpose is checking, keeps the rounded weights as doubles.
  kBfloat16,
  /// As `kPacked`, but rounded to 8 bits: 32 inputs of an output share a scale of 16 bits, which
  /// makes 8.5 bits for a weight. Each is off by at most 1/254 of the largest of its 32. Products
  /// are summed up in float.
  kInt8,
  /// As `kInt8`, but rounded to 4 bits between the smallest and the largest of the 32: 5 bits for a
  /// weight, which is off by at most 1/30 of the range that its 32 span.
  kInt4,
  /// As `kPacked`, but rounded to FP8 (E4M3, 4 bits of significand), with a scale for each 128 x
  /// 128 weights as DeepSeek-V3 has them, whose published weights stay as they are.
  /// (arXiv:2412.19437, section 3.3.2)
  kFp8,
  /// As `kPacked`, but rounded to MXFP4: 32 inputs of an output share a power of two and have one
  /// of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign. 4.25 bits for a weight; those of gpt-oss stay as
  /// they are. (Open Compute Project, "Microscaling Formats (MX)", version 1.0.)
  kMxFp4,
  /// The weights of `kInt8`, and tokens are rounded to 8 bits as well on their way into a product,
  /// 32 numbers of a token with a common scale. The processor multiplies and adds up integers, four
  /// of which it takes at once (AVX-512 VNNI, AVX2, NEON) or many (AMX), with the same result,
  /// which is faster. Each number of a token is off by at most 1/254 of the largest of its 32.
  kInt8Dot,
  /// The weights of `kInt4` with tokens as in `kInt8Dot`.
  kInt4Dot,
};

/// Short names of the storages, in the order of the enumeration.
inline constexpr std::array<std::string_view, 9> kStorageNames = {
    "plain", "packed", "bf16", "int8", "int4", "fp8", "mxfp4", "int8-dot", "int4-dot"};

constexpr std::string_view name_of(Storage storage) {
  return kStorageNames[static_cast<std::size_t>(storage)];
}

/// The storage of that name; nothing if there is none.
constexpr std::optional<Storage> storage_named(std::string_view name) {
  return value_named<Storage>(kStorageNames, name);
}

/// \throws StateError   unless `storage` is kTrainable; `who` is the function that needs that.
inline void expect_trainable(std::string_view who, Storage storage) {
  if (storage != Storage::kTrainable) {
    throw_error<StateError>(who,
                            ": the weights are stored for inference, expected Storage::kTrainable");
  }
}

}  // namespace weir
