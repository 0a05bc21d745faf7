// SPDX-License-Identifier: MIT
/// \file
/// The innermost loops of products of codes with codes.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include <weir/core/types.hpp>
#include <weir/kernels/arranged_rows.hpp>
#include <weir/kernels/coded_block.hpp>
#include <weir/kernels/coded_values.hpp>
#include <weir/ops/lanes.hpp>

namespace weir::kernels {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
inline constexpr bool kHasVnni = true;
#else
inline constexpr bool kHasVnni = false;
#endif

namespace detail {

/// sum + a.0 b.0 + a.1 b.1 + a.2 b.2 + a.3 b.3 in each lane, for the four bytes of a word: `a` from
/// 0 to 255 with VNNI and from -127 to 127 elsewhere, `b` from -127 to 127. Exact in every form.
inline Words dot_of_bytes(const Words& sum, const Words& a, const Words& b) {
#if defined(__AVX512VNNI__)
  return std::bit_cast<Words>(_mm512_dpbusd_epi32(
      std::bit_cast<__m512i>(sum), std::bit_cast<__m512i>(a), std::bit_cast<__m512i>(b)));
#elif defined(__AVX512BW__)
  // Even and odd bytes as numbers of 16 bits.
  const auto x = std::bit_cast<__m512i>(a);
  const auto y = std::bit_cast<__m512i>(b);
  const auto low = [](__m512i v) { return _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8); };
  const auto high = [](__m512i v) { return _mm512_srai_epi16(v, 8); };
  const __m512i even = _mm512_madd_epi16(low(x), low(y));
  const __m512i odd = _mm512_madd_epi16(high(x), high(y));
  return sum + std::bit_cast<Words>(_mm512_add_epi32(even, odd));
#elif defined(__AVXVNNI__)
  return std::bit_cast<Words>(_mm256_dpbusd_avx_epi32(
      std::bit_cast<__m256i>(sum), std::bit_cast<__m256i>(a), std::bit_cast<__m256i>(b)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  // |a| times b with the sign of a: two products of bytes up to 127 fit 16 bits.
  const auto x = std::bit_cast<__m256i>(a);
  const auto y = _mm256_sign_epi8(std::bit_cast<__m256i>(b), x);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), y);
  return sum + std::bit_cast<Words>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__ARM_FEATURE_DOTPROD)
  return std::bit_cast<Words>(vdotq_s32(std::bit_cast<int32x4_t>(sum), std::bit_cast<int8x16_t>(a),
                                        std::bit_cast<int8x16_t>(b)));
#else
  Words result = sum;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int shift = 24 - 8 * i;
    result += ((a << shift) >> 24) * ((b << shift) >> 24);
  }
  return result;
#endif
}

}  // namespace detail

/// Each kind of codes says how many groups of four inputs a word has, and what the bytes of group
/// `n` are: the codes plus `kOffset`.
struct Int8Bytes : Int8Codes {
  static constexpr Index kGroups = 1;
  static constexpr std::int32_t kOffset = kHasVnni ? 128 : 0;

  static detail::Words bytes(const detail::Words& words, Index /*n*/) {
    return kHasVnni ? words ^ static_cast<std::int32_t>(0x80808080U) : words;
  }
};

struct Int4Bytes : Int4Codes {
  static constexpr Index kGroups = 2;
  static constexpr std::int32_t kOffset = 0;

  static detail::Words bytes(const detail::Words& words, Index n) {
    return (words >> (4 * static_cast<int>(n))) & 0x0F0F0F0F;
  }
};

/// c = a times the numbers of `streams` panels, where a row of a consists of blocks `Int8Inputs`.
/// Within each block, products of codes are summed up in integers; then
///
///     c += (scale of the weights) * ((scale of the inputs) * sum),
///     c += minimum * ((scale of the inputs) * (sum of the inputs' codes))
///
/// \param panels   Where the blocks of each panel begin.
/// \param c        Where the kCols sums of row i and panel s go: `c[s * rows + i]`.
template <class Codes, Index rows, Index streams>
void multiply_bytes(const std::byte* const* a, const std::byte* const* panels, Index blocks,
                    float* const* c) {
  constexpr CodedLayout kLayout = {Codes::kCode};
  constexpr Index kVectors = Block<float>::kVectors;
  constexpr Index kLane = kLanes<float>;
  static_assert(kLayout.block() == Int8Inputs::kCount);
  Lanes<float> total[streams][rows][kVectors] = {};
  for (Index block = 0; block < blocks; ++block) {
    const std::byte* row[rows];
    for (Index i = 0; i < rows; ++i) row[i] = a[i] + block * Index{sizeof(Int8Inputs)};
    detail::Words sum[streams][rows][kVectors];
#pragma GCC unroll 8
    for (Index i = 0; i < rows; ++i) {
      std::int32_t of_codes = 0;
      std::memcpy(&of_codes, row[i] + offsetof(Int8Inputs, sum), sizeof of_codes);
      const detail::Words begin = detail::Words{} - Codes::kOffset * of_codes;
#pragma GCC unroll 8
      for (Index s = 0; s < streams; ++s) {
#pragma GCC unroll 8
        for (Index j = 0; j < kVectors; ++j) sum[s][i][j] = begin;
      }
    }
    for (Index k = 0; k < kLayout.block(); k += 4 * Codes::kGroups) {
      const Index offset = block * kLayout.bytes() + kLayout.word(k, 0);
#pragma GCC unroll 8
      for (Index s = 0; s < streams; ++s) {
        detail::Words words[kVectors];
#pragma GCC unroll 8
        for (Index j = 0; j < kVectors; ++j) {
          const std::byte* const at = panels[s] + offset + j * kLane * CodedLayout::kWord;
          __builtin_prefetch(at + CodedLayout::kAhead, 0, 2);
          words[j] = detail::words_of(at);
        }
#pragma GCC unroll 2
        for (Index n = 0; n < Codes::kGroups; ++n) {
          detail::Words bytes[kVectors];
#pragma GCC unroll 8
          for (Index j = 0; j < kVectors; ++j) bytes[j] = Codes::bytes(words[j], n);
#pragma GCC unroll 8
          for (Index i = 0; i < rows; ++i) {
            std::int32_t four = 0;  // Codes come first in Int8Inputs.
            std::memcpy(&four, row[i] + k + 4 * n, sizeof four);
            const detail::Words inputs = detail::Words{} + four;
#pragma GCC unroll 8
            for (Index j = 0; j < kVectors; ++j) {
              sum[s][i][j] = detail::dot_of_bytes(sum[s][i][j], bytes[j], inputs);
            }
          }
        }
      }
    }
#pragma GCC unroll 8
    for (Index i = 0; i < rows; ++i) {
      Int8Inputs inputs = {};
      std::memcpy(&inputs, row[i], sizeof inputs);
      const float of_codes = inputs.scale * static_cast<float>(inputs.sum);
#pragma GCC unroll 8
      for (Index s = 0; s < streams; ++s) {
        const std::byte* const at = panels[s] + block * kLayout.bytes();
#pragma GCC unroll 8
        for (Index j = 0; j < kVectors; ++j) {
          const Lanes<float> scaled =
              inputs.scale * __builtin_convertvector(sum[s][i][j], Lanes<float>);
          total[s][i][j] += Codes::scale(at, j * kLane) * scaled;
          if constexpr (Codes::kHasMinimum) {
            total[s][i][j] += Codes::minimum(at, j * kLane) * of_codes;
          }
        }
      }
    }
  }
  for (Index s = 0; s < streams; ++s) {
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < kVectors; ++j) {
        store_lanes<float>(total[s][i][j], c[s * rows + i] + j * kLane);
      }
    }
  }
}

}  // namespace weir::kernels
