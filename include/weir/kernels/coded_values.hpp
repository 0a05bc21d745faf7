// SPDX-License-Identifier: MIT
/// \file
/// Codes of a panel and their scales in registers.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include <weir/core/types.hpp>
#include <weir/kernels/block_codes.hpp>
#include <weir/kernels/register_block.hpp>
#include <weir/ops/lanes.hpp>

namespace weir::kernels {

/// A panel of codes has kCols outputs. Its blocks follow one another along the inputs. A block
/// begins with the scales of all outputs and, for kInt4, their minima; then come words of 32 bits,
/// kCols of them for the first few inputs, kCols for the next few, and so on. A word has the codes
/// of one output for four inputs of eight bits, the first in the lowest bits, or for eight inputs
/// of four bits, see `code_shift`.
struct CodedLayout {
  static constexpr Index kCols = Block<float>::kCols;
  static constexpr Index kWord = 4;
  /// How many bytes before they are multiplied codes are fetched. The hardware does not look beyond
  /// a page of memory.
  static constexpr Index kAhead = 3072;

  Code code = Code::kInt8;

  constexpr Index block() const { return block_length(code); }
  constexpr Index scale_part() const { return scale_bytes(code) * kCols; }
  constexpr Index bytes() const { return scale_part() + code_bits(code) * block() / 8 * kCols; }
  constexpr Index per_word() const { return 32 / code_bits(code); }
  /// Where the word of an output with input `i` of the block begins.
  constexpr Index word(Index i, Index column) const {
    return scale_part() + (i / per_word() * kCols + column) * kWord;
  }
};

/// The place of code `i` in its word. Those of four bits lie such that the low halves of the bytes
/// are four neighbours, and the high halves, too.
constexpr int code_shift(int bits, int i) {
  if (bits == 8) return 8 * i;
  return i < 4 ? 8 * i : 8 * i - 28;
}

namespace detail {

using Words = LaneBits<float>;
typedef std::uint32_t UnsignedWords __attribute__((vector_size(sizeof(Lanes<float>))));    // NOLINT
typedef std::uint16_t HalfWords __attribute__((vector_size(sizeof(Lanes<float>) / 2)));    // NOLINT
typedef std::uint8_t QuarterWords __attribute__((vector_size(sizeof(Lanes<float>) / 4)));  // NOLINT

template <class Vector>
Vector load_vector(const std::byte* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline Words words_of(const std::byte* from) {
  return load_vector<Words>(from);
}

/// The values of kLanes numbers of 16 bits.
inline Lanes<float> halves_at(const std::byte* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(load_vector<__m256i>(from));
#elif defined(__F16C__) && defined(__AVX__)
  return _mm256_cvtph_ps(load_vector<__m128i>(from));
#else
  const auto bits = __builtin_convertvector(load_vector<HalfWords>(from), UnsignedWords);
  const UnsignedWords sign = (bits & 0x8000U) << 16U;
  const UnsignedWords magnitude = (bits & 0x7FFFU) << 13U;
  // The exponents of floats begin 112 lower.
  const Lanes<float> value = std::bit_cast<Lanes<float>>(magnitude) * 0x1p112F;
  const UnsignedWords special = magnitude | 0x7F800000U;
  const auto exact = std::bit_cast<UnsignedWords>(value);
  const UnsignedWords known = magnitude >= (0x7C00U << 13U) ? special : exact;
  return std::bit_cast<Lanes<float>>(known | sign);
#endif
}

/// The values of kLanes scales E8M0 from 1 on.
inline Lanes<float> powers_at(const std::byte* from) {
  const auto bits = __builtin_convertvector(load_vector<QuarterWords>(from), UnsignedWords);
  const UnsignedWords nan = UnsignedWords{} + 0x7FC00000U;
  const UnsignedWords power = bits << 23U;
  return std::bit_cast<Lanes<float>>(bits == 255U ? nan : power);
}

}  // namespace detail

/// Each kind of codes says how many inputs a word has, what the numbers of code `i` of each word
/// are, and what the scales of the lanes from `lane` on are.
struct Int8Codes {
  static constexpr Code kCode = Code::kInt8;
  static constexpr int kPerWord = 4;
  static constexpr bool kHasMinimum = false;

  [[gnu::always_inline]] static Lanes<float> value(const detail::Words& words, int i) {
    const detail::Words code = (words << (24 - 8 * i)) >> 24;
    return __builtin_convertvector(code, Lanes<float>);
  }
  static Lanes<float> scale(const std::byte* block, Index lane) {
    return detail::halves_at(block + 2 * lane);
  }
};

struct Int4Codes {
  static constexpr Code kCode = Code::kInt4;
  static constexpr int kPerWord = 8;
  static constexpr bool kHasMinimum = true;

  [[gnu::always_inline]] static Lanes<float> value(const detail::Words& words, int i) {
    const detail::Words code = (words >> code_shift(4, i)) & 15;
    return __builtin_convertvector(code, Lanes<float>);
  }
  static Lanes<float> scale(const std::byte* block, Index lane) {
    return detail::halves_at(block + 2 * lane);
  }
  static Lanes<float> minimum(const std::byte* block, Index lane) {
    return detail::halves_at(block + 2 * (CodedLayout::kCols + lane));
  }
};

struct MxFp4Codes {
  static constexpr Code kCode = Code::kMxFp4;
  static constexpr int kPerWord = 8;
  static constexpr bool kHasMinimum = false;

  [[gnu::always_inline]] static Lanes<float> value(const detail::Words& words, int i) {
    const int shift = code_shift(4, i);
#if defined(__AVX512F__)
    const __m512 table = _mm512_setr_ps(0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F, -0.0F,
                                        -0.5F, -1.0F, -1.5F, -2.0F, -3.0F, -4.0F, -6.0F);
    const detail::Words code = words >> shift;  // The lowest four bits count.
    return std::bit_cast<Lanes<float>>(_mm512_permutexvar_ps(std::bit_cast<__m512i>(code), table));
#else
    const detail::Words sign = (words << (28 - shift)) & INT32_MIN;
#if defined(__AVX2__)
    const __m256 table = _mm256_setr_ps(0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F);
    const detail::Words code = words >> shift;  // The lowest three bits count.
    const auto magnitude =
        std::bit_cast<detail::Words>(_mm256_permutevar8x32_ps(table, std::bit_cast<__m256i>(code)));
#else
    const detail::Words code = (words >> shift) & 7;
    const Lanes<float> small = __builtin_convertvector(code, Lanes<float>) * 0.5F;
    const detail::Words normal = (code << 22) + (126 << 23);
    const detail::Words magnitude = code < 2 ? std::bit_cast<detail::Words>(small) : normal;
#endif
    return std::bit_cast<Lanes<float>>(magnitude | sign);
#endif
  }
  static Lanes<float> scale(const std::byte* block, Index lane) {
    return detail::powers_at(block + lane);
  }
};

struct Fp8Codes {
  static constexpr Code kCode = Code::kFp8;
  static constexpr int kPerWord = 4;
  static constexpr bool kHasMinimum = false;

  /// 2^-8 times the value of a code, which the scale makes up for. The bits of its magnitude, moved
  /// to where a float has them, with an exponent 112 higher, are y = 2^-8 times the value in the
  /// normal range; below it, that is 2 y - 2^-14, which is larger everywhere else. No float lies
  /// below its own normal range, which a processor may be told to take for zero, and which takes
  /// many others hundreds of cycles. The code of NaN does not occur: the scale is NaN then.
  [[gnu::always_inline]] static Lanes<float> value(const detail::Words& words, int i) {
    const auto top = std::bit_cast<detail::UnsignedWords>(words)
                     << (24U - 8U * static_cast<unsigned>(i));
    const detail::UnsignedWords moved = (top >> 4U & 0x07F00000U) | 112U << 23U;
    const auto y = std::bit_cast<Lanes<float>>(moved);
    const Lanes<float> below = y * 2.0F - 0x1p-14F;
#if defined(__AVX512F__)
    const auto magnitude = std::bit_cast<Lanes<float>>(_mm512_min_ps(below, y));
#else
    const Lanes<float> magnitude = below < y ? below : y;
#endif
    const auto bits = std::bit_cast<detail::UnsignedWords>(magnitude);
    return std::bit_cast<Lanes<float>>(bits | (top & 0x80000000U));
  }
  static Lanes<float> scale(const std::byte* block, Index lane) {
    return detail::load_vector<Lanes<float>>(block + 4 * lane) * 0x1p8F;
  }
};

}  // namespace weir::kernels
