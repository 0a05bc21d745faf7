// SPDX-License-Identifier: MIT
/// \file
/// Blocks of numbers as codes of few bits with common scales.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include <weir/core/types.hpp>
#include <weir/kernels/small_float.hpp>

namespace weir::kernels {

/// What a block of numbers is rounded to. Blocks follow one another along the inputs of an output.
enum class Code : std::uint8_t {
  kInt8,   ///< 32 codes c from -127 to 127 and a scale s of 16 bits: x = s c. 8.5 bits per number.
  kInt4,   ///< 32 codes c from 0 to 15, a scale s and a minimum m of 16 bits: x = s c + m. 5 bits.
  kMxFp4,  ///< 32 codes E2M1 and a scale E8M0: x = s v(c). 4.25 bits. (OCP MX 1.0, section 5.)
  kFp8,    ///< 128 codes E4M3 and a scale s of 32 bits, which 128 rows share: x = s v(c).
};

inline constexpr Index kMostBlock = 128;

/// How many numbers a block has.
constexpr Index block_length(Code code) {
  return code == Code::kFp8 ? 128 : 32;
}

/// How many bits a code has.
constexpr Index code_bits(Code code) {
  return code == Code::kInt8 || code == Code::kFp8 ? 8 : 4;
}

/// Bytes of the scale of a block and, for kInt4, of its minimum.
constexpr Index scale_bytes(Code code) {
  return code == Code::kInt8 ? 2 : code == Code::kMxFp4 ? 1 : 4;
}

/// A block of numbers: x_i = scale * (the number of codes[i]) + minimum. Scale and minimum are
/// numbers that the stored form holds exactly.
struct CodedBlock {
  float scale = 0.0F;
  float minimum = 0.0F;
  std::array<std::uint8_t, kMostBlock> codes{};
};

/// The number that a code stands for, before it is multiplied by the scale.
inline float code_value(Code kind, std::uint8_t code) {
  switch (kind) {
    case Code::kInt8:
      return static_cast<float>(static_cast<std::int8_t>(code));
    case Code::kInt4:
      return static_cast<float>(code);
    case Code::kMxFp4:
      return E2M1::values()[code];
    case Code::kFp8:
      return E4M3::values()[code];
  }
  return 0.0F;
}

namespace detail {

/// The nearest integer, ties to even, for magnitudes below 2^22.
inline float nearest_integer(float x) {
  constexpr float kShift = 12582912.0F;  // 1.5 * 2^23, whose last bit is worth 1.
  return (x + kShift) - kShift;
}

/// The nearest number of 16 bits, at most the largest one.
inline float nearest_half(float x) {
  constexpr float kMost = 65504.0F;
  return static_cast<float>(static_cast<Eigen::half>(std::clamp(x, -kMost, kMost)));
}

/// The next number of 16 bits below or above `x`, which is one and not the last.
inline float next_half(float x, int step) {
  auto bits = Eigen::numext::bit_cast<std::uint16_t>(static_cast<Eigen::half>(x));
  if ((bits & 0x7FFFU) == 0) bits = step > 0 ? 0 : 0x8000U;
  const int away = (bits & 0x8000U) != 0 ? -step : step;
  bits = static_cast<std::uint16_t>(bits + away);
  return static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(bits));
}

/// A scale of 16 bits such that `most` codes reach `range` >= 0: the nearest, or the next one where
/// the last code would be off by more than a half.
inline float half_scale(float range, float most) {
  const float scale = nearest_half(range / most);
  if (range <= (most + 0.5F) * scale || scale >= 65504.0F) return scale;
  return next_half(scale, 1);
}

/// The smallest and the largest of `count` numbers; NaN both unless all are finite.
struct Range {
  float least = 0.0F, most = 0.0F;
};

inline Range range_of(const float* x, Index count) {
  Range range = {x[0], x[0]};
  float sum = 0.0F;
  for (Index i = 0; i < count; ++i) {
    range.least = std::min(range.least, x[i]);
    range.most = std::max(range.most, x[i]);
    sum += x[i] * 0.0F;  // NaN for what is not finite.
  }
  if (sum == 0.0F) return range;
  return {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::quiet_NaN()};
}

inline float largest_magnitude(const Range& range) {
  return std::max(-range.least, range.most);
}

inline void round_to_int8(const float* x, Index count, CodedBlock& to) {
  const Range range = range_of(x, count);
  to.scale = std::isnan(range.most) ? range.most : half_scale(largest_magnitude(range), 127.0F);
  for (Index i = 0; i < count; ++i) {
    const float code = to.scale > 0.0F ? std::clamp(x[i] / to.scale, -127.0F, 127.0F) : 0.0F;
    to.codes[static_cast<std::size_t>(i)] =
        static_cast<std::uint8_t>(static_cast<std::int8_t>(nearest_integer(code)));
  }
}

/// The nearest codes for a scale and a minimum that have been chosen.
inline void choose_int4(const float* x, Index count, CodedBlock& to) {
  for (Index i = 0; i < count; ++i) {
    const float code =
        to.scale > 0.0F ? std::clamp((x[i] - to.minimum) / to.scale, 0.0F, 15.0F) : 0.0F;
    to.codes[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(nearest_integer(code));
  }
}

/// Finds the scale and the minimum of numbers that have been rounded before. Of the steps that fit,
/// the largest one counts. Whether there is one; then everything is set.
inline bool find_int4_grid(const float* x, Index count, const Range& range, CodedBlock& to) {
  const float span = range.most - range.least;
  const float largest = largest_magnitude(range);
  for (int steps = 1; steps <= 15; ++steps) {
    const float scale = nearest_half(span / static_cast<float>(steps));
    if (!(std::abs(scale * static_cast<float>(steps) - span) <= 4e-7F * largest)) continue;
    const bool fits = std::all_of(x, x + count, [&](float number) {
      const float code = (number - range.least) / scale;
      return std::abs(code - nearest_integer(code)) <= 1e-3F;
    });
    for (int first = 0; fits && first + steps <= 15; ++first) {
      const float minimum = range.least - scale * static_cast<float>(first);
      to.minimum = nearest_half(minimum);
      if (!(std::abs(to.minimum - minimum) <= 4e-7F * largest)) continue;
      to.scale = scale;
      choose_int4(x, count, to);
      return true;
    }
  }
  return false;
}

inline void round_to_int4(const float* x, Index count, CodedBlock& to) {
  const Range range = range_of(x, count);
  if (range.most > range.least && find_int4_grid(x, count, range, to)) return;
  to.minimum = std::isnan(range.least) ? range.least : nearest_half(range.least);
  if (to.minimum > range.least && to.minimum > -65504.0F) to.minimum = next_half(to.minimum, -1);
  to.scale = std::isnan(range.most) ? range.most
                                    : half_scale(std::max(0.0F, range.most - to.minimum), 15.0F);
  choose_int4(x, count, to);
}

/// The sum of squared errors.
inline double round_to_mxfp4(const float* x, Index count, int exponent, CodedBlock& to) {
  to.scale = std::ldexp(1.0F, exponent);
  const float inverse = std::ldexp(1.0F, -exponent);
  double error = 0.0;
  for (Index i = 0; i < count; ++i) {
    const std::uint8_t code = E2M1::from(x[i] * inverse);
    to.codes[static_cast<std::size_t>(i)] = code;
    const double off = static_cast<double>(x[i] * inverse) - code_value(Code::kMxFp4, code);
    error += off * off;
  }
  return std::ldexp(error, 2 * exponent);
}

/// The scale is the power of two that takes the largest magnitude to [4, 8), as the MX
/// specification recommends, or twice that where the squared error is smaller.
inline void round_to_mxfp4(const float* x, Index count, CodedBlock& to) {
  const float most = largest_magnitude(range_of(x, count));
  to.scale = most;
  to.codes.fill(0);
  if (!(most > 0.0F)) return;  // Zero or NaN.
  const int exponent = std::clamp(std::ilogb(most) - 2, -126, 124);
  const double error = round_to_mxfp4(x, count, exponent, to);
  CodedBlock other;
  if (round_to_mxfp4(x, count, exponent + 1, other) < error) to = other;
}

}  // namespace detail

/// The largest number of E4M3.
inline constexpr float kMostE4M3 = 448.0F;

/// The scale with which numbers up to `most` >= 0 fit E4M3: most / 448 as a float, or the next
/// power of two. It is no smaller than the least normal float, and 1 for `most` = 0.
inline float e4m3_scale(float most, bool power_of_two = false) {
  if (most == 0.0F) return 1.0F;
  const float scale = std::max(most / kMostE4M3, std::numeric_limits<float>::min());
  if (!power_of_two || !std::isfinite(scale)) return scale;
  return std::bit_cast<float>((std::bit_cast<std::uint32_t>(scale) + 0x007FFFFFU) & 0xFF800000U);
}

/// The nearest E4M3 codes of `count` numbers, at most a block, for a scale.
inline void round_to_e4m3(const float* x, Index count, float scale, CodedBlock& to) {
  to.scale = scale;
  to.minimum = 0.0F;
  for (Index i = 0; i < count; ++i) {
    to.codes[static_cast<std::size_t>(i)] = E4M3::from(x[i] / scale);
  }
}

/// Rounds `count` > 0 numbers, at most a block. For finite numbers, the error is at most
///
///     kInt8:   s / 2 with s >= max |x| / 127 up to the rounding of s, s a multiple of 2^-24
///     kInt4:   s / 2 with s >= (max x - min x) / 15 in the same sense
///     kMxFp4:  max(s / 4, |x| / 4) with s = 2^(floor(log2(max |x|)) - 2), or twice that
///
/// Numbers beyond what the largest scale of 16 bits reaches become the largest that there is. A
/// block with a NaN or an infinity is NaN as a whole. Numbers that are rounded a second time stay
/// as they are, up to the rounding of `coded_value`.
/// \param kind  Any but kFp8, whose scale is not a matter of one block: see `round_to_e4m3`.
inline void round_block(Code kind, const float* x, Index count, CodedBlock& to) {
  to.minimum = 0.0F;
  if (kind == Code::kInt8) return detail::round_to_int8(x, count, to);
  if (kind == Code::kInt4) return detail::round_to_int4(x, count, to);
  detail::round_to_mxfp4(x, count, to);
}

/// The number of a block at place `i`.
inline float coded_value(Code kind, const CodedBlock& block, Index i) {
  return block.scale * code_value(kind, block.codes[static_cast<std::size_t>(i)]) + block.minimum;
}

}  // namespace weir::kernels
