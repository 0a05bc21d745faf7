// SPDX-License-Identifier: MIT
/// \file
/// Numbers of 16 bits with the range of a float.
#pragma once

#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include <weir/core/types.hpp>

namespace weir::kernels {

/// The upper half of a float: 8 bits of significand, the exponent of a float. A float becomes the
/// nearest number, ties to even; a NaN stays a NaN.
using BFloat16 = Eigen::bfloat16;

/// to[i] = from[i], rounded, for i in [0, count). Numbers below the normal range may become zero.
inline void round_to_bfloat16(Index count, const float* from, BFloat16* to) {
  Index i = 0;
#if defined(__AVX512BF16__)
  constexpr Index kLanes = 16;
  for (; i + kLanes <= count; i += kLanes) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
    std::memcpy(&to[i].value, &rounded, sizeof rounded);
  }
#endif
  for (; i < count; ++i) to[i] = BFloat16(from[i]);
}

}  // namespace weir::kernels
