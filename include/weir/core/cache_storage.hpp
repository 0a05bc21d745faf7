// SPDX-License-Identifier: MIT
/// \file
/// How decoding stores what it keeps of the tokens so far.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include <weir/core/enum_names.hpp>

namespace weir {

/// How a KvCache or a LatentCache stores its numbers; the state of a sequence is told when it is
/// made:
///
///     Decoder<float>::State state(CacheStorage::kBfloat16);
///
/// Attention reads the stored bytes, so that decoding behind a long context takes the less time the
/// fewer they are. The queries of a prompt attend to the rounded numbers, too: what a token gets
/// does not depend on the chunks in which a sequence is decoded, whatever the storage, but it
/// differs from what `forward` computes without a cache. `cache_report` tells by how much.
enum class CacheStorage : std::uint8_t {
  /// As numbers of the layer's own type: nothing is rounded.
  kFull,
  /// Rounded to bfloat16 (8 bits of significand): half the memory. A number is off by at most 1/256
  /// of itself.
  kBfloat16,
  /// Rounded to integers from -127 to 127 times a scale, a number of the layer's type. The numbers
  /// of a token in one key head share it, and so do up to 128 numbers of a latent. A number is off
  /// by at most 1/254 of the largest of them.
  kInt8,
  /// The same with integers from -31 to 31, in 6 bits each, which is what DeepSeek-V2 keeps on
  /// average (DeepSeek-AI 2024, arXiv:2405.04434, section 3.2.3; how it rounds is not published). A
  /// number is off by at most 1/62 of the largest that it shares the scale with.
  kInt6,
};

/// Short names of these storages, in the order of the enumeration.
inline constexpr std::array<std::string_view, 4> kCacheStorageNames = {"full", "bf16", "int8",
                                                                       "int6"};

constexpr std::string_view name_of(CacheStorage storage) {
  return kCacheStorageNames[static_cast<std::size_t>(storage)];
}

/// The storage of that name; nothing if there is none.
constexpr std::optional<CacheStorage> cache_storage_named(std::string_view name) {
  return value_named<CacheStorage>(kCacheStorageNames, name);
}

}  // namespace weir
