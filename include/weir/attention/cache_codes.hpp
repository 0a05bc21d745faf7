// SPDX-License-Identifier: MIT
/// \file
/// The numbers of a cache as codes of few bits.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <weir/core/cache_storage.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/bfloat16.hpp>
#include <weir/ops/lanes.hpp>

namespace weir {

namespace detail {

/// Registers, or parts of one, with kLanes<T> codes and what they become.
template <class T>
struct CodeVectors;
template <>
struct CodeVectors<float> {
  typedef std::int8_t Bytes __attribute__((vector_size(kLaneBytes / 4)));     // NOLINT
  typedef std::uint16_t Halves __attribute__((vector_size(kLaneBytes / 2)));  // NOLINT
  typedef std::uint32_t Words __attribute__((vector_size(kLaneBytes)));       // NOLINT
  typedef std::int32_t Integers __attribute__((vector_size(kLaneBytes)));     // NOLINT
  typedef float Floats __attribute__((vector_size(kLaneBytes)));              // NOLINT
};
template <>
struct CodeVectors<double> {
  typedef std::int8_t Bytes __attribute__((vector_size(kLaneBytes / 8)));      // NOLINT
  typedef std::uint16_t Halves __attribute__((vector_size(kLaneBytes / 4)));   // NOLINT
  typedef std::uint32_t Words __attribute__((vector_size(kLaneBytes / 2)));    // NOLINT
  typedef std::int32_t Integers __attribute__((vector_size(kLaneBytes / 2)));  // NOLINT
  typedef float Floats __attribute__((vector_size(kLaneBytes / 2)));           // NOLINT
};

}  // namespace detail

/// The numbers that the kLanes<T> codes from `from` on stand for. Codes are numbers of type T,
/// BFloat16, or integers of eight bits.
template <class T, class Code>
[[gnu::always_inline]] inline Lanes<T> load_codes(const Code* from) {
  using Vectors = detail::CodeVectors<T>;
  if constexpr (std::is_same_v<Code, T>) {
    return load_lanes<T>(from);
  } else if constexpr (std::is_same_v<Code, kernels::BFloat16>) {
    typename Vectors::Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    using Words = typename Vectors::Words;
    const Words words = __builtin_convertvector(halves, Words) << 16U;
    return __builtin_convertvector(std::bit_cast<typename Vectors::Floats>(words), Lanes<T>);
  } else {
    typename Vectors::Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    using Integers = typename Vectors::Integers;
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) {
      const __m512i wide = _mm512_cvtepi8_epi32(std::bit_cast<__m128i>(bytes));
      return __builtin_convertvector(std::bit_cast<Integers>(wide), Lanes<T>);
    }
#endif
    return __builtin_convertvector(__builtin_convertvector(bytes, Integers), Lanes<T>);
  }
}

/// A matrix of codes, a row behind the other. Its numbers have been divided by their scales.
///
/// Codes of six bits lie in two parts of a row: first the lower four bits, those of the first half
/// in the lower halves of the bytes and those of the second half in the upper ones, then the upper
/// two bits, a quarter of the row in each pair of bits of the bytes.
template <class T>
struct CodeMatrix {
  /// The columns are rounded up to a multiple of this.
  static constexpr Index kColumns = std::max<Index>(4, kLanes<T>);

  CacheStorage storage = CacheStorage::kFull;
  Index cols = 0;  ///< A multiple of kColumns, unless the storage is kFull.

  static Index padded(Index cols) { return (cols + kColumns - 1) / kColumns * kColumns; }

  Index row_bytes() const {
    switch (storage) {
      case CacheStorage::kFull:
        return cols * static_cast<Index>(sizeof(T));
      case CacheStorage::kBfloat16:
        return 2 * cols;
      case CacheStorage::kInt8:
        return cols;
      case CacheStorage::kInt6:
        return cols / 4 * 3;
    }
    return 0;
  }

  /// The largest integer of a code; 0 if there are no scales.
  Index most() const {
    return storage == CacheStorage::kInt8 ? 127 : storage == CacheStorage::kInt6 ? 31 : 0;
  }
  bool has_scales() const { return most() > 0; }

  /// The scale of `count` numbers: the largest magnitude over `most()`, no smaller than the least
  /// normal number. NaN, if one of them is NaN or infinite.
  T scale_of(const T* x, Index count) const;

  /// Writes x[0], x[1] ... over `scale` to row `row` from column `col` on, or down column `col`.
  void put_row(std::byte* at, Index row, Index col, const T* x, Index count, T scale) const {
    std::byte* const to = at + row * row_bytes();
    for (Index i = 0; i < count; ++i) put(to, col + i, x[i], scale);
  }
  void put_column(std::byte* at, Index col, const T* x, Index count, T scale) const {
    const Index bytes = row_bytes();
    for (Index i = 0; i < count; ++i) put(at + i * bytes, col, x[i], scale);
  }

  /// The number of a code, times its scale.
  T value(const std::byte* at, Index row, Index col, T scale) const;

  /// Writes the numbers of `rows` rows to `to` [rows, cols]; `cols` is a multiple of kColumns.
  void unpack(const std::byte* at, Index rows, T* to) const;

 private:
  void put(std::byte* row, Index i, T x, T scale) const;

  static unsigned byte_at(const std::byte* at, Index i) { return static_cast<unsigned>(at[i]); }

  /// Replaces the bits of `mask`, moved by `shift`.
  static void set_bits(std::byte& byte, unsigned mask, Index shift, unsigned bits) {
    const auto by = static_cast<unsigned>(shift);
    const unsigned rest = static_cast<unsigned>(byte) & ~(mask << by);
    byte = static_cast<std::byte>(rest | (bits & mask) << by);
  }

  void unpack_six(const std::byte* row, T* to) const;

  template <class Code>
  void unpack_as(const std::byte* at, Index count, T* to) const {
    const auto* const from = reinterpret_cast<const Code*>(at);
    for (Index i = 0; i < count; i += kLanes<T>) store_lanes<T>(load_codes<T>(from + i), to + i);
  }

  static constexpr int kSixOffset = 32;  // Added to codes of six bits.
};

template <class T>
T CodeMatrix<T>::scale_of(const T* x, Index count) const {
  if (!has_scales()) return T(1);
  T largest = 0;
  T sound = 0;
  for (Index i = 0; i < count; ++i) {
    largest = std::max(largest, std::abs(x[i]));
    sound += x[i] * T(0);  // NaN for what is not finite.
  }
  if (sound != T(0)) return std::numeric_limits<T>::quiet_NaN();
  // The largest code times the scale has to be finite.
  constexpr T kLargest = std::numeric_limits<T>::max();
  const auto levels = static_cast<T>(most());
  return std::clamp(largest / levels, std::numeric_limits<T>::min(),
                    kLargest / levels * (T(1) - std::numeric_limits<T>::epsilon()));
}

template <class T>
void CodeMatrix<T>::put(std::byte* row, Index i, T x, T scale) const {
  if (storage == CacheStorage::kFull) {
    reinterpret_cast<T*>(row)[i] = x;
  } else if (storage == CacheStorage::kBfloat16) {
    reinterpret_cast<kernels::BFloat16*>(row)[i] = kernels::BFloat16(static_cast<float>(x));
  } else {
    // To the nearest integer, ties to even: behind this number, the last bit is worth 1.
    constexpr T kShift = T(std::uint64_t{3} << (std::numeric_limits<T>::digits - 2));
    const auto levels = static_cast<T>(most());
    const T number = std::isnan(scale) ? T(0) : std::clamp(x / scale, -levels, levels);
    const int code = static_cast<int>((number + kShift) - kShift);
    if (storage == CacheStorage::kInt8) {
      reinterpret_cast<std::int8_t*>(row)[i] = static_cast<std::int8_t>(code);
    } else {
      const auto bits = static_cast<unsigned>(code + kSixOffset);
      const Index half = cols / 2;
      const Index quarter = cols / 4;
      set_bits(row[i % half], 15U, 4 * (i / half), bits);
      set_bits(row[half + i % quarter], 3U, 2 * (i / quarter), bits >> 4U);
    }
  }
}

template <class T>
T CodeMatrix<T>::value(const std::byte* at, Index row, Index col, T scale) const {
  const std::byte* const from = at + row * row_bytes();
  switch (storage) {
    case CacheStorage::kFull:
      return reinterpret_cast<const T*>(from)[col];
    case CacheStorage::kBfloat16:
      return static_cast<T>(
          static_cast<float>(reinterpret_cast<const kernels::BFloat16*>(from)[col]));
    case CacheStorage::kInt8:
      return scale * static_cast<T>(reinterpret_cast<const std::int8_t*>(from)[col]);
    case CacheStorage::kInt6:
      break;
  }
  const Index half = cols / 2;
  const Index quarter = cols / 4;
  const unsigned low = byte_at(from, col % half) >> static_cast<unsigned>(4 * (col / half)) & 15U;
  const unsigned high =
      byte_at(from, half + col % quarter) >> static_cast<unsigned>(2 * (col / quarter)) & 3U;
  return scale * static_cast<T>(static_cast<int>(low | high << 4U) - kSixOffset);
}

template <class T>
void CodeMatrix<T>::unpack(const std::byte* at, Index rows, T* to) const {
  if (storage == CacheStorage::kFull) return unpack_as<T>(at, rows * cols, to);
  if (storage == CacheStorage::kBfloat16) {
    return unpack_as<kernels::BFloat16>(at, rows * cols, to);
  }
  if (storage == CacheStorage::kInt8) return unpack_as<std::int8_t>(at, rows * cols, to);
  for (Index r = 0; r < rows; ++r) unpack_six(at + r * row_bytes(), to + r * cols);
}

template <class T>
void CodeMatrix<T>::unpack_six(const std::byte* row, T* to) const {
  const Index quarter = cols / 4;
  const std::byte* const high = row + cols / 2;
  for (Index part = 0; part < 4; ++part) {
    const std::byte* const low = row + part % 2 * quarter;
    const auto low_shift = static_cast<unsigned>(part / 2 * 4);
    const auto high_shift = static_cast<unsigned>(2 * part);
    T* const out = to + part * quarter;
    for (Index i = 0; i < quarter; ++i) {
      const unsigned bits =
          (byte_at(low, i) >> low_shift & 15U) | (byte_at(high, i) >> high_shift & 3U) << 4U;
      out[i] = static_cast<T>(static_cast<int>(bits) - kSixOffset);
    }
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template struct weir::CodeMatrix<float>;
extern template struct weir::CodeMatrix<double>;
#endif
