// SPDX-License-Identifier: MIT
/// \file
/// Floating-point numbers of four and eight bits.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace weir::kernels {

/// Numbers of a sign, `exponent` and `mantissa` bits, the exponent biased as IEEE 754 does it, with
/// subnormal numbers. Codes above `largest`, the sign aside, are infinite or no numbers.
///
/// \tparam largest   The code of the largest number.
/// \tparam infinity  The code of infinity, 0 if there is none.
template <int exponent, int mantissa, int largest, int infinity>
struct SmallFloat {
  static constexpr int kBits = 1 + exponent + mantissa;
  static constexpr int kCodes = 1 << kBits;
  static constexpr int kSign = kCodes / 2;
  static constexpr int kBias = (1 << (exponent - 1)) - 1;
  static constexpr int kMantissa = mantissa;
  static constexpr bool kHasNan = largest < kSign - 1;

  /// The nearest number, ties to even. Magnitudes beyond the largest number become that number, and
  /// infinities do, too. A NaN becomes a NaN; where the format has none, the largest number.
  static std::uint8_t from(float x);

  /// The number that a code stands for.
  static float value(std::uint8_t code);

  /// The largest number.
  static float most() { return value(static_cast<std::uint8_t>(largest)); }

  /// The numbers of all codes.
  static const std::array<float, kCodes>& values();
};

/// The eight-bit numbers of arXiv:2209.05433 (Micikevicius et al. 2022), table 1. E4M3 reaches 448
/// and has no infinity; E5M2 reaches 57344.
using E4M3 = SmallFloat<4, 3, 0x7E, 0>;
using E5M2 = SmallFloat<5, 2, 0x7B, 0x7C>;

/// The four-bit numbers 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their opposites, of the Open Compute
/// Project's "Microscaling Formats (MX)", version 1.0, table 5.
using E2M1 = SmallFloat<2, 1, 7, 0>;

/// 2^(code - 127), the scales of the MX formats; NaN for 255.
inline float e8m0_value(std::uint8_t code) {
  constexpr std::uint32_t kLeast = 0x00400000U;  // 2^-127, which is no normal float.
  if (code == 255) return std::nanf("");
  return std::bit_cast<float>(code == 0 ? kLeast : std::uint32_t{code} << 23U);
}

template <int exponent, int mantissa, int largest, int infinity>
std::uint8_t SmallFloat<exponent, mantissa, largest, infinity>::from(float x) {
  constexpr std::uint32_t kInfinity = 0x7F800000U;
  constexpr unsigned kCut = 23 - mantissa;  // Bits of a float's significand that have no place.
  constexpr std::uint32_t kShift = 127 - kBias;
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const auto sign = static_cast<std::uint8_t>(bits >> 31U != 0 ? kSign : 0);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > kInfinity) {
    return static_cast<std::uint8_t>(sign | (kHasNan ? kSign - 1 : largest));
  }
  std::uint32_t code = 0;
  if (magnitude < (kShift + 1) << 23U) {
    // Below the normal range: added to a power of two whose last bit is worth what the code's last
    // bit is, a number leaves its code there.
    const auto power = std::bit_cast<float>((kShift + 1 + kCut) << 23U);
    const float sum = std::bit_cast<float>(magnitude) + power;
    code = std::bit_cast<std::uint32_t>(sum) - std::bit_cast<std::uint32_t>(power);
  } else {
    const std::uint32_t half = (1U << (kCut - 1)) - 1 + ((magnitude >> kCut) & 1U);
    code = ((magnitude + half) >> kCut) - (kShift << static_cast<unsigned>(mantissa));
  }
  if (code > largest) code = largest;
  return static_cast<std::uint8_t>(sign | code);
}

template <int exponent, int mantissa, int largest, int infinity>
float SmallFloat<exponent, mantissa, largest, infinity>::value(std::uint8_t code) {
  const int magnitude = code & (kSign - 1);
  const int power = magnitude >> mantissa;
  const int fraction = magnitude & ((1 << mantissa) - 1);
  float result = 0.0F;
  if (magnitude > largest) {
    result = magnitude == infinity ? HUGE_VALF : std::nanf("");
  } else if (power == 0) {
    result = std::ldexp(static_cast<float>(fraction), 1 - kBias - mantissa);
  } else {
    result = std::ldexp(static_cast<float>(fraction + (1 << mantissa)), power - kBias - mantissa);
  }
  return (code & kSign) != 0 ? -result : result;
}

template <int exponent, int mantissa, int largest, int infinity>
const std::array<float, SmallFloat<exponent, mantissa, largest, infinity>::kCodes>&
SmallFloat<exponent, mantissa, largest, infinity>::values() {
  static const std::array<float, kCodes> all = [] {
    std::array<float, kCodes> filled{};
    for (int code = 0; code < kCodes; ++code) {
      filled[static_cast<std::size_t>(code)] = value(static_cast<std::uint8_t>(code));
    }
    return filled;
  }();
  return all;
}

}  // namespace weir::kernels
