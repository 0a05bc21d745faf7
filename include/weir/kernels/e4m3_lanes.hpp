// SPDX-License-Identifier: MIT
/// \file
/// FP8 numbers (E4M3) in registers, and the scales of tiles.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include <weir/core/types.hpp>
#include <weir/kernels/block_codes.hpp>
#include <weir/ops/lanes.hpp>

namespace weir::kernels {

/// Rows, columns or both that share a scale (arXiv:2412.19437, section 3.3.2).
inline constexpr Index kTile = 128;

/// The nearest E4M3 numbers as floats, which have 4 bits of significand: ties to even, magnitudes
/// beyond 448 become 448, a NaN stays a NaN.
inline Lanes<float> nearest_e4m3(const Lanes<float>& x) {
  using Bits = LaneBits<float>;
  constexpr int kSign = static_cast<int>(0x80000000U);
  constexpr int kLeastNormal = 0x3C800000;  // 2^-6
  constexpr int kMost = 0x43E00000;         // 448
  constexpr float kShift = 0x1p14F;         // Its last bit is worth the least number, 2^-9.
  const auto bits = std::bit_cast<Bits>(x);
  const Bits magnitude = bits & ~kSign;
  const Lanes<float> small = (std::bit_cast<Lanes<float>>(magnitude) + kShift) - kShift;
  const Bits normal = (magnitude + 0x0007FFFF + ((magnitude >> 20) & 1)) & ~0x000FFFFF;
  const Bits most = normal > kMost ? Bits{} + kMost : normal;
  const Bits rounded = magnitude < kLeastNormal ? std::bit_cast<Bits>(small) : most;
  return x != x ? x : std::bit_cast<Lanes<float>>(rounded | (bits & kSign));  // NOLINT: NaN
}

/// Codes of E4M3, one for each lane of a float.
typedef std::uint8_t E4M3Codes __attribute__((vector_size(sizeof(Lanes<float>) / 4)));  // NOLINT

/// The codes of numbers that `nearest_e4m3` returned. The numbers below the normal range of E4M3
/// are multiples of 2^-9: they are read off the last bits of a sum, so that no float lies below the
/// normal range of floats, which a processor may be told to take for zero.
inline E4M3Codes e4m3_codes_of(const Lanes<float>& x) {
  using Bits = LaneBits<float>;
  constexpr int kLeastNormal = 0x3C800000;  // 2^-6
  constexpr float kShift = 0x1p14F;         // Its last bit is worth 2^-9.
  const auto bits = std::bit_cast<Bits>(x);
  const Bits magnitude = bits & 0x7FFFFFFF;
  const Bits small = std::bit_cast<Bits>(std::bit_cast<Lanes<float>>(magnitude) + kShift);
  const Bits normal = (magnitude >> 20) - (120 << 3);  // Exponents of floats begin 120 lower.
  // NaN keeps bits that are all ones in E4M3.
  const Bits finite = magnitude < kLeastNormal ? small & 0x7F : normal;
  const Bits code = magnitude > 0x7F800000 ? Bits{} + 0x7F : finite;
  return __builtin_convertvector(((bits >> 24) & 0x80) | code, E4M3Codes);
}

/// The numbers of codes.
inline Lanes<float> e4m3_numbers_of(const E4M3Codes& codes) {
  using Bits = LaneBits<float>;
  const Bits words = __builtin_convertvector(codes, Bits);
  const Bits magnitude = words & 0x7F;
  const Bits normal = (magnitude << 20) + (120 << 23);
  const Lanes<float> small = __builtin_convertvector(magnitude, Lanes<float>) * 0x1p-9F;
  const Bits finite = magnitude < 8 ? std::bit_cast<Bits>(small) : normal;
  const Bits number = magnitude == 0x7F ? Bits{} + 0x7FC00000 : finite;
  return std::bit_cast<Lanes<float>>(number | ((words & 0x80) << 24));
}

/// The larger magnitudes of `most`, which has magnitudes, and x, as bits of floats. They are in the
/// order of integers, what is not finite being the largest.
inline LaneBits<float> larger_magnitude(const LaneBits<float>& most, const Lanes<float>& x) {
  const LaneBits<float> magnitude = std::bit_cast<LaneBits<float>>(x) & 0x7FFFFFFF;
  return magnitude > most ? magnitude : most;
}

/// The largest magnitude of [rows, cols]; NaN unless all are finite.
template <class T>
float largest_magnitude(const T* from, Index stride, Index rows, Index cols) {
  LaneBits<float> most{};
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < cols; j += kLanes<float>) {
      const Index count = std::min(kLanes<float>, cols - j);
      Lanes<float> x{};
      if constexpr (std::is_same_v<T, float>) {
        x = load_lanes<float>(from + i * stride + j, count);
      } else {
        for (Index lane = 0; lane < count; ++lane) {
          x[lane] = static_cast<float>(from[i * stride + j + lane]);
        }
      }
      most = larger_magnitude(most, x);
    }
  }
  const auto larger = [](const LaneBits<float>& a, const LaneBits<float>& b) -> LaneBits<float> {
    return b > a ? b : a;
  };
  const auto result = std::bit_cast<float>(fold_lanes<float>(most, larger));
  return std::isfinite(result) ? result : std::numeric_limits<float>::quiet_NaN();
}

/// The scale with which a tile [rows, cols] fits E4M3, see `e4m3_scale`. A tile with a NaN or an
/// infinity has the scale NaN, which makes all of its numbers NaN.
template <class T>
float e4m3_tile_scale(const T* from, Index stride, Index rows, Index cols,
                      bool power_of_two = false) {
  return e4m3_scale(largest_magnitude(from, stride, rows, cols), power_of_two);
}

/// `e4m3_scale` of the magnitudes whose bits are `most`, lane by lane; NaN for what is not finite.
inline Lanes<float> e4m3_scales(const LaneBits<float>& most, bool power_of_two) {
  using Bits = LaneBits<float>;
  constexpr int kInfinity = 0x7F800000;
  constexpr int kLeast = 0x00800000;  // The least normal float; the order is that of integers.
  const Lanes<float> quotient = std::bit_cast<Lanes<float>>(most) / kMostE4M3;
  Bits scale = std::bit_cast<Bits>(quotient);
  scale = scale < kLeast ? Bits{} + kLeast : scale;
  if (power_of_two) scale = (scale + 0x007FFFFF) & kInfinity;
  const Bits one = Bits{} + std::bit_cast<int>(1.0F);
  scale = most == 0 ? one : scale;
  return std::bit_cast<Lanes<float>>(most >= kInfinity ? Bits{} + 0x7FC00000 : scale);
}

/// Writes a row as E4M3 codes, 1 x 128 of them with a power of two as their scale.
inline void encode_e4m3_row(Index cols, const float* from, std::uint8_t* codes, float* scales) {
  for (Index begin = 0; begin < cols; begin += kTile) {
    const Index end = std::min(begin + kTile, cols);
    const float scale = e4m3_tile_scale(from + begin, 0, 1, end - begin, true);
    scales[begin / kTile] = scale;
    for (Index j = begin; j < end; j += kLanes<float>) {
      const Index count = std::min(kLanes<float>, end - j);
      const E4M3Codes some =
          e4m3_codes_of(nearest_e4m3(load_lanes<float>(from + j, count) / scale));
      std::memcpy(codes + j, &some, static_cast<std::size_t>(count));
    }
  }
}

/// The numbers of such a row.
inline void decode_e4m3_row(Index cols, const std::uint8_t* codes, const float* scales, float* to) {
  for (Index j = 0; j < cols; j += kLanes<float>) {
    const Index count = std::min(kLanes<float>, cols - j);
    E4M3Codes some{};
    std::memcpy(&some, codes + j, static_cast<std::size_t>(count));
    store_lanes<float>(e4m3_numbers_of(some) * scales[j / kTile], to + j, count);
  }
}

}  // namespace weir::kernels
