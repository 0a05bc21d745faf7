// SPDX-License-Identifier: MIT
/// \file
/// The kinds of numbers of GGUF files, most of them blocks of small codes with common scales.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include <weir/core/types.hpp>

namespace weir::io {

/// The kinds of numbers of GGUF tensors that weir reads, under the format's own numbers.
/// (https://github.com/ggml-org/ggml, docs/gguf.md, enum ggml_type.)
enum class GgufType : std::uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ5_0 = 6,
  kQ8_0 = 8,
  kQ4K = 12,
  kQ6K = 14,
  kF64 = 28,
  kBF16 = 30,
  kMxfp4 = 39,
};

namespace detail {

struct GgufTypeInfo {
  std::string_view name;     // Empty where the number means nothing (any more).
  Index block = 0;           // Numbers of a block; 0 where weir does not read the kind.
  std::size_t bytes = 0;     // Bytes of a block.
  bool is_writable = false;  // Whether weir writes the kind.
};

/// By the format's numbers.
inline constexpr std::array<GgufTypeInfo, 43> kGgufTypes = {{
    {"F32", 1, 4, true},
    {"F16", 1, 2, true},
    {"Q4_0", 32, 18},
    {"Q4_1"},
    {""},
    {""},
    {"Q5_0", 32, 22},
    {"Q5_1"},
    {"Q8_0", 32, 34, true},
    {"Q8_1"},
    {"Q2_K"},
    {"Q3_K"},
    {"Q4_K", 256, 144},
    {"Q5_K"},
    {"Q6_K", 256, 210},
    {"Q8_K"},
    {"IQ2_XXS"},
    {"IQ2_XS"},
    {"IQ3_XXS"},
    {"IQ1_S"},
    {"IQ4_NL"},
    {"IQ3_S"},
    {"IQ2_S"},
    {"IQ4_XS"},
    {"I8"},
    {"I16"},
    {"I32"},
    {"I64"},
    {"F64", 1, 8},
    {"IQ1_M"},
    {"BF16", 1, 2, true},
    {""},
    {""},
    {""},
    {"TQ1_0"},
    {"TQ2_0"},
    {""},
    {""},
    {""},
    {"MXFP4", 32, 17},
    {"NVFP4"},
    {"Q1_0"},
    {"Q2_0"},
}};

inline constexpr const GgufTypeInfo& info(GgufType type) {
  return kGgufTypes[static_cast<std::size_t>(type)];
}

}  // namespace detail

/// The name of a kind, such as "Q4_K".
constexpr std::string_view name_of(GgufType type) {
  return detail::info(type).name;
}

/// How many numbers of one row make a block; 1 for kinds that store each number alone.
constexpr Index block_length(GgufType type) {
  return detail::info(type).block;
}

/// Bytes of one block.
constexpr std::size_t block_bytes(GgufType type) {
  return detail::info(type).bytes;
}

/// Whether `quantise` writes numbers of this kind: F32, F16, BF16 and Q8_0.
constexpr bool is_writable(GgufType type) {
  return detail::info(type).is_writable;
}

/// The kind with that number in a file; nothing if weir does not read it.
constexpr std::optional<GgufType> gguf_type_numbered(std::uint32_t number) {
  if (number >= detail::kGgufTypes.size() || detail::kGgufTypes[number].block == 0) {
    return std::nullopt;
  }
  return static_cast<GgufType>(number);
}

/// "Q2_K" for a kind that the format knows, otherwise the number as text: for messages.
inline std::string gguf_type_text(std::uint32_t number) {
  if (number < detail::kGgufTypes.size() && !detail::kGgufTypes[number].name.empty()) {
    return std::string(detail::kGgufTypes[number].name);
  }
  return std::to_string(number);
}

}  // namespace weir::io
