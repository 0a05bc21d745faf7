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
#include <weir/ops/lanes.hpp>

namespace weir::kernels {

/// The upper half of a float: 8 bits of significand, the exponent of a float. A float becomes the
/// nearest number, ties to even; a NaN stays a NaN.
using BFloat16 = Eigen::bfloat16;

/// The nearest numbers of 16 bits as floats, ties to even; a NaN stays a NaN.
inline Lanes<float> nearest_bfloat16(const Lanes<float>& x) {
  using Bits = LaneBits<float>;
  constexpr int kUpper = static_cast<int>(0xFFFF0000U);
  const auto bits = std::bit_cast<Bits>(x);
  const Bits rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & kUpper;
  const Bits nan = (bits | 0x00400000) & kUpper;
  return std::bit_cast<Lanes<float>>(x != x ? nan : rounded);  // NOLINT: x is NaN
}

/// to[i] = from[i], rounded, for i in [0, count). Numbers below the normal range may become zero.
/// (As integers: half a unit of what stays is added, or a little less where what stays is even.)
inline void round_to_bfloat16(Index count, const float* from, BFloat16* to) {
  Index i = 0;
#if defined(__AVX512BF16__)
  constexpr Index kLanes = 16;
  for (; i + kLanes <= count; i += kLanes) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
    std::memcpy(&to[i].value, &rounded, sizeof rounded);
  }
#else
  typedef std::uint32_t Bits __attribute__((vector_size(sizeof(Lanes<float>))));        // NOLINT
  typedef std::uint16_t Halves __attribute__((vector_size(sizeof(Lanes<float>) / 2)));  // NOLINT
  constexpr Index kLanes = weir::kLanes<float>;
  for (; i + kLanes <= count; i += kLanes) {
    Bits bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const Bits rounded = (bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U;
    const Bits nan = (bits >> 16U & 0x8000U) | 0x7FC0U;
    const auto is_nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;
    const Halves halves = __builtin_convertvector(is_nan ? nan : rounded, Halves);
    std::memcpy(&to[i].value, &halves, sizeof halves);
  }
#endif
  for (; i < count; ++i) to[i] = BFloat16(from[i]);
}

}  // namespace weir::kernels
