// SPDX-License-Identifier: MIT
/// \file
/// Numbers of 16 bits with the range of a float.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include <weir/core/types.hpp>

namespace weir::kernels {

/// The upper half of a float: 8 bits of significand, the exponent of a float.
struct BFloat16 {
  std::uint16_t bits = 0;

  BFloat16() = default;

  /// The nearest bfloat16, ties to even; a NaN stays a NaN.
  explicit BFloat16(float x) {
    const auto u = std::bit_cast<std::uint32_t>(x);
    const bool is_nan = (u & 0x7fffffffU) > 0x7f800000U;
    const std::uint32_t rounded = is_nan ? u | 0x400000U : u + 0x7fffU + ((u >> 16U) & 1U);
    bits = static_cast<std::uint16_t>(rounded >> 16U);
  }

  /// Exact.
  explicit operator float() const {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16U);
  }
};

/// to[i] = from[i], rounded, for i in [0, count). Numbers below the normal range may become zero.
inline void round_to_bfloat16(Index count, const float* from, BFloat16* to) {
  Index i = 0;
#if defined(__AVX512BF16__)
  constexpr Index kLanes = 16;
  for (; i + kLanes <= count; i += kLanes) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
    std::memcpy(&to[i].bits, &rounded, sizeof rounded);
  }
#endif
  for (; i < count; ++i) to[i] = BFloat16(from[i]);
}

}  // namespace weir::kernels
