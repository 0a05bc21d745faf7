// SPDX-License-Identifier: MIT
/// \file
/// Conversion between numbers and the blocks of codes that GGUF files hold.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/dtype.hpp>
#include <weir/io/gguf_type.hpp>
#include <weir/kernels/small_float.hpp>

namespace weir::io {

namespace detail {

/// The 16-bit number at `bytes`, which need not be aligned.
template <class T>
T half_at(const std::uint8_t* bytes) {
  Eigen::half value;
  std::memcpy(static_cast<void*>(&value), bytes, sizeof value);
  return static_cast<T>(value);
}

inline int low(std::uint8_t byte) {
  return byte & 15;
}

inline int high(std::uint8_t byte) {
  return byte >> 4;
}

/// 32 numbers in 18 bytes, a scale d and codes q of four bits:
///
///     x_j = d (low(q_j) - 8),   x_{j+16} = d (high(q_j) - 8)     0 <= j < 16
template <class T>
void read_q4_0(const std::uint8_t* block, T* to) {
  const T d = half_at<T>(block);
  const std::uint8_t* const q = block + 2;
  for (int j = 0; j < 16; ++j) {
    to[j] = d * static_cast<T>(low(q[j]) - 8);
    to[j + 16] = d * static_cast<T>(high(q[j]) - 8);
  }
}

/// 32 numbers in 22 bytes, a scale d, a fifth bit h_j of each code, and four bits of it as in Q4_0:
///
///     x_j = d (low(q_j) + 16 h_j - 16),   x_{j+16} = d (high(q_j) + 16 h_{j+16} - 16)
template <class T>
void read_q5_0(const std::uint8_t* block, T* to) {
  const T d = half_at<T>(block);
  const std::uint8_t* const h = block + 2;
  const std::uint8_t* const q = block + 6;
  const auto fifth = [&](int j) { return ((h[j / 8] >> (j % 8)) & 1) << 4; };
  for (int j = 0; j < 16; ++j) {
    to[j] = d * static_cast<T>(low(q[j]) + fifth(j) - 16);
    to[j + 16] = d * static_cast<T>(high(q[j]) + fifth(j + 16) - 16);
  }
}

/// 32 numbers in 34 bytes, a scale d and signed codes q of eight bits: x_j = d q_j.
template <class T>
void read_q8_0(const std::uint8_t* block, T* to) {
  const T d = half_at<T>(block);
  for (int j = 0; j < 32; ++j) to[j] = d * static_cast<T>(static_cast<std::int8_t>(block[j + 2]));
}

/// 256 numbers in 144 bytes: two scales d and m; for each of eight groups of 32 numbers a scale s_g
/// and an offset o_g of six bits; and codes q of four bits. Groups 2 p and 2 p + 1 share 32 bytes:
///
///     x_{64 p + l}      = d s_{2p}   low(q_{32 p + l})  - m o_{2p}       0 <= p < 4, 0 <= l < 32
///     x_{64 p + 32 + l} = d s_{2p+1} high(q_{32 p + l}) - m o_{2p+1}
///
/// Twelve bytes b hold the scales and offsets: the low six bits of b_g and b_{g+4} are s_g and o_g
/// for g < 4; the low and the high half of b_{g+4} are the low four bits of s_g and o_g for g >= 4,
/// whose high two bits are those of b_{g-4} and b_g.
template <class T>
void read_q4_k(const std::uint8_t* block, T* to) {
  const T d = half_at<T>(block);
  const T m = half_at<T>(block + 2);
  const std::uint8_t* const b = block + 4;
  const std::uint8_t* q = block + 16;
  for (int g = 0; g < 8; ++g) {
    const int s = g < 4 ? b[g] & 63 : low(b[g + 4]) | ((b[g - 4] >> 6) << 4);
    const int o = g < 4 ? b[g + 4] & 63 : high(b[g + 4]) | ((b[g] >> 6) << 4);
    const T scale = d * static_cast<T>(s);
    const T offset = m * static_cast<T>(o);
    for (int l = 0; l < 32; ++l) {
      const int code = g % 2 == 0 ? low(q[l]) : high(q[l]);
      to[32 * g + l] = scale * static_cast<T>(code) - offset;
    }
    if (g % 2 == 1) q += 32;
  }
}

/// 256 numbers in 210 bytes: 128 bytes with the low four bits of codes, 64 bytes with the high two,
/// a signed scale s of eight bits for each 16 numbers, and a scale d:
///
///     x_i = d s_{i/16} (code_i - 32),   i = 128 h + 32 p + l     h < 2, p < 4, l < 32
///
/// The low bits stand in byte 64 h + 32 (p mod 2) + l, in its low half for p < 2, the high bits in
/// bits 2 p and 2 p + 1 of byte 32 h + l.
template <class T>
void read_q6_k(const std::uint8_t* block, T* to) {
  const std::uint8_t* const s = block + 192;
  const T d = half_at<T>(block + 208);
  for (int part = 0; part < 8; ++part) {
    const Index h = part / 4;
    const Index p = part % 4;
    const std::uint8_t* const pairs = block + 64 * h + 32 * (p % 2);
    const std::uint8_t* const tops = block + 128 + 32 * h;
    for (int l = 0; l < 32; ++l) {
      const int code = (p < 2 ? low(pairs[l]) : high(pairs[l])) | (((tops[l] >> (2 * p)) & 3) << 4);
      const T scale = d * static_cast<T>(static_cast<std::int8_t>(s[2 * part + l / 16]));
      to[32 * part + l] = scale * static_cast<T>(code - 32);
    }
  }
}

/// 32 numbers in 17 bytes, an exponent e and four-bit numbers, v their values:
///
///     x_j = 2^(e - 127) v(low(q_j)),   x_{j+16} = 2^(e - 127) v(high(q_j))     0 <= j < 16
///
/// As in llama.cpp e = 255, which the MX formats reserve, is no exception.
template <class T>
void read_mxfp4(const std::uint8_t* block, T* to) {
  const T half_scale = std::ldexp(T(1), block[0] - 128);
  const auto& values = kernels::E2M1::values();
  const std::uint8_t* const q = block + 1;
  for (int j = 0; j < 16; ++j) {
    to[j] = half_scale * static_cast<T>(2.0F * values[static_cast<std::size_t>(low(q[j]))]);
    to[j + 16] = half_scale * static_cast<T>(2.0F * values[static_cast<std::size_t>(high(q[j]))]);
  }
}

template <class T>
void read_blocks(GgufType type, void (*read)(const std::uint8_t*, T*), const std::byte* from,
                 Index count, T* to) {
  const auto* block = reinterpret_cast<const std::uint8_t*>(from);
  for (Index i = 0; i < count; i += block_length(type)) {
    read(block, to + i);
    block += block_bytes(type);
  }
}

/// The inverse of `read_q8_0`, rounded as llama.cpp does it:
///
///     d = max_j |x_j| / 127,   q_j = round(x_j / d), halves away from zero
///
/// d is rounded to 16 bits after the division, and all codes are 0 where 1 / d is not a number of
/// 32 bits.
inline void write_q8_0(const float* from, std::uint8_t* block) {
  float most = 0.0F;
  for (int j = 0; j < 32; ++j) most = std::max(most, std::abs(from[j]));
  const float d = most / 127.0F;
  const float inverse = std::isfinite(1.0F / d) ? 1.0F / d : 0.0F;
  const auto stored = static_cast<Eigen::half>(d);
  std::memcpy(block, &stored, sizeof stored);
  for (int j = 0; j < 32; ++j) {
    block[j + 2] =
        static_cast<std::uint8_t>(static_cast<std::int8_t>(std::round(from[j] * inverse)));
  }
}

/// \throws ConfigError  for NaN, and for numbers for whose scale 16 bits do not suffice.
template <class T>
void write_q8_0_blocks(std::string_view name, const T* from, Index count, std::byte* to) {
  constexpr float kMost = 127.0F * 65504.0F;
  auto* block = reinterpret_cast<std::uint8_t*>(to);
  std::array<float, 32> numbers{};
  for (Index i = 0; i < count; i += 32) {
    for (Index j = 0; j < 32; ++j) {
      const auto number = static_cast<float>(from[i + j]);
      if (!(std::abs(number) <= kMost)) {
        throw_error<ConfigError>(name, ": has the number ", number, ", expected magnitudes up to ",
                                 kMost, " for Q8_0");
      }
      numbers[static_cast<std::size_t>(j)] = number;
    }
    write_q8_0(numbers.data(), block);
    block += block_bytes(GgufType::kQ8_0);
  }
}

}  // namespace detail

/// Converts whole blocks of a file to `count` numbers. Each is the value that its code stands for,
/// rounded once to T. (The layouts of blocks: https://github.com/ggml-org/llama.cpp,
/// ggml/src/ggml-common.h; their values: ggml/src/ggml-quants.c, dequantize_row_*.)
/// \param from   The first byte of a block; need not be aligned.
/// \param count  A multiple of `block_length(type)`.
/// \tparam T     float or double.
template <class T>
void dequantise(GgufType type, const std::byte* from, Index count, T* to) {
  switch (type) {
    case GgufType::kF32:
      return convert(Dtype::kF32, from, count, to);
    case GgufType::kF16:
      return convert(Dtype::kF16, from, count, to);
    case GgufType::kBF16:
      return convert(Dtype::kBF16, from, count, to);
    case GgufType::kF64:
      return convert(Dtype::kF64, from, count, to);
    case GgufType::kQ4_0:
      return detail::read_blocks(type, detail::read_q4_0<T>, from, count, to);
    case GgufType::kQ5_0:
      return detail::read_blocks(type, detail::read_q5_0<T>, from, count, to);
    case GgufType::kQ8_0:
      return detail::read_blocks(type, detail::read_q8_0<T>, from, count, to);
    case GgufType::kQ4K:
      return detail::read_blocks(type, detail::read_q4_k<T>, from, count, to);
    case GgufType::kQ6K:
      return detail::read_blocks(type, detail::read_q6_k<T>, from, count, to);
    case GgufType::kMxfp4:
      return detail::read_blocks(type, detail::read_mxfp4<T>, from, count, to);
  }
}

/// The opposite of `dequantise`, for the kinds that are `is_writable`; others are left out. Numbers
/// are rounded to the nearest; for Q8_0 as llama.cpp's quantize_row_q8_0_ref does it.
/// \param name          What the numbers are, for the message.
/// \param count         A multiple of `block_length(type)`.
/// \throws ConfigError  for Q8_0, if a number is NaN or larger than its scale can be.
template <class T>
void quantise(std::string_view name, GgufType type, const T* from, Index count, std::byte* to) {
  switch (type) {
    case GgufType::kF32:
      return store(Dtype::kF32, from, count, to);
    case GgufType::kF16:
      return store(Dtype::kF16, from, count, to);
    case GgufType::kBF16:
      return store(Dtype::kBF16, from, count, to);
    case GgufType::kQ8_0:
      return detail::write_q8_0_blocks(name, from, count, to);
    default:
      return;
  }
}

}  // namespace weir::io
