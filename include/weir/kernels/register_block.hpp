// SPDX-License-Identifier: MIT
/// \file
/// The innermost loop of all matrix products: a few rows times one panel of columns.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include <weir/core/types.hpp>
#include <weir/kernels/bfloat16.hpp>
#include <weir/ops/lanes.hpp>

namespace weir::kernels {

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kVectorRegisters = 32;
#else
inline constexpr int kVectorRegisters = 16;
#endif

/// Where factors are multiplied from memory, one more row fits the registers.
#if defined(__AVX512F__)
inline constexpr Index kExtraRows = 1;
#else
inline constexpr Index kExtraRows = 0;
#endif

/// A panel is `kCols` columns of a right operand, row after row of depth. The innermost loop reads
/// it from front to back. It is as wide as `kVectors` registers.
template <class T>
struct Block {
  static constexpr Index kVectors = kVectorRegisters == 32 ? 4 : 2;
  static constexpr Index kRows = 6;
  static constexpr Index kCols = kVectors * kLanes<T>;
};

/// An arithmetic says how numbers are multiplied. This one multiplies numbers of type T as they
/// are.
template <class T>
struct Native {
  using Left = T;
  using Right = T;
  using Sum = T;
  using Vector = Lanes<T>;
  using Column = Vector;
  using Factor = T;
  /// How many rows of the panel are multiplied in one step.
  static constexpr Index kDepth = 1;
  static constexpr Index kRows = Block<T>::kRows;  ///< The most rows of one of several tiles.
  static constexpr Index kMostRows = kRows + kExtraRows;  ///< The most rows of a single tile.

  static Column column(const Right* b) { return load_lanes<T>(b); }
  static Factor factor(const Left* a) { return *a; }
  static void multiply_add(Vector& sum, const Factor& a, const Column& b) { sum += a * b; }
};

namespace detail {

/// Two bfloat16 weights of a column in one 32-bit lane, the first in the lower half.
inline std::uint32_t load_pair(const BFloat16* from) {
  std::uint32_t pair = 0;
  std::memcpy(&pair, from, sizeof pair);
  return pair;
}

}  // namespace detail

/// bfloat16 weights that are widened to float, exactly, and multiplied with floats.
struct WidenedBFloat16 {
  using Left = float;
  using Right = BFloat16;
  using Sum = float;
  using Vector = Lanes<float>;
  struct Column {
    Vector first, second;
  };
  struct Factor {
    float first, second;
  };
  static constexpr Index kDepth = 2;
  static constexpr Index kRows = 4;  ///< Twice as many registers hold the columns.
  static constexpr Index kMostRows = kRows;

  static Column column(const Right* b) {
    typedef std::uint32_t Bits __attribute__((vector_size(sizeof(Vector))));  // NOLINT
    Bits pairs;
    std::memcpy(&pairs, b, sizeof pairs);
    return {std::bit_cast<Vector>(pairs << 16U), std::bit_cast<Vector>(pairs & 0xffff0000U)};
  }
  static Factor factor(const Left* a) { return {a[0], a[1]}; }
  static void multiply_add(Vector& sum, const Factor& a, const Column& b) {
    sum += a.first * b.first;
    sum += a.second * b.second;
  }
};

#if defined(__AVX512BF16__)
/// bfloat16 weights times bfloat16 tokens, by the processor's own instruction.
struct PairedBFloat16 {
  using Left = BFloat16;
  using Right = BFloat16;
  using Sum = float;
  using Vector = Lanes<float>;
  using Column = __m512i;
  using Factor = __m512i;
  static constexpr Index kDepth = 2;
  static constexpr Index kRows = Block<float>::kRows;
  static constexpr Index kMostRows = kRows + kExtraRows;

  static Column column(const Right* b) { return _mm512_loadu_si512(b); }
  static Factor factor(const Left* a) {
    return _mm512_set1_epi32(static_cast<int>(detail::load_pair(a)));
  }
  static void multiply_add(Vector& sum, const Factor& a, const Column& b) {
    sum = std::bit_cast<Vector>(_mm512_dpbf16_ps(
        std::bit_cast<__m512>(sum), std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b)));
  }
};
using BFloat16Arithmetic = PairedBFloat16;
#else
using BFloat16Arithmetic = WidenedBFloat16;
#endif

/// Cache lines to fetch while a block is computed, one in each step. The next step's line is `near`
/// bytes on, and the next group of `kGroup` steps begins `far` bytes on. There are none if `at` is
/// null.
struct ReadAhead {
  static constexpr Index kGroup = 16;
  const char* at = nullptr;
  Index near = 0;
  Index far = 0;
};

/// c[0..rows, 0..kCols] (+)= a times one panel.
///
/// \param a        a[i, step] at `a + i * a_row + step * a_step`.
/// \param b        The panel from the first step on.
/// \param steps    How many times Arithmetic::kDepth rows of the panel are multiplied.
template <class Arithmetic, Index rows>
void multiply_block(const typename Arithmetic::Left* a, Index a_row, Index a_step,
                    const typename Arithmetic::Right* b, Index steps, typename Arithmetic::Sum* c,
                    Index c_row, bool accumulate, ReadAhead ahead, ReadAhead also) {
  using Sum = typename Arithmetic::Sum;
  constexpr Index kVectors = Block<Sum>::kVectors;
  constexpr Index kColumn = kLanes<Sum> * Arithmetic::kDepth;
  Lanes<Sum> sum[rows][kVectors];
  if (accumulate) {
#pragma GCC unroll 8
    for (Index i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (Index j = 0; j < kVectors; ++j) {
        sum[i][j] = load_lanes<Sum>(c + i * c_row + j * kLanes<Sum>);
      }
    }
  } else {
#pragma GCC unroll 8
    for (Index i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (Index j = 0; j < kVectors; ++j) sum[i][j] = Lanes<Sum>{};
    }
  }
  const bool reads_ahead = ahead.at != nullptr;
  while (steps > 0) {
    const Index group = std::min(steps, ReadAhead::kGroup);
    steps -= group;
    const char* line = ahead.at;
    const char* other = also.at;
    ahead.at += ahead.far;
    also.at += also.far;
#pragma GCC unroll 1
    for (Index step = 0; step < group; ++step) {
      if (reads_ahead) {
        __builtin_prefetch(line, 0, 2);
        __builtin_prefetch(other, 0, 2);
        line += ahead.near;
        other += also.near;
      }
      typename Arithmetic::Column column[kVectors];
#pragma GCC unroll 8
      for (Index j = 0; j < kVectors; ++j) column[j] = Arithmetic::column(b + j * kColumn);
      b += kVectors * kColumn;
#pragma GCC unroll 8
      for (Index i = 0; i < rows; ++i) {
        const typename Arithmetic::Factor factor = Arithmetic::factor(a + i * a_row);
#pragma GCC unroll 8
        for (Index j = 0; j < kVectors; ++j) Arithmetic::multiply_add(sum[i][j], factor, column[j]);
      }
      a += a_step;
    }
  }
#pragma GCC unroll 8
  for (Index i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (Index j = 0; j < kVectors; ++j) {
      store_lanes<Sum>(sum[i][j], c + i * c_row + j * kLanes<Sum>);
    }
  }
}

/// `multiply_block` for few rows and `streams` panels side by side, each `panel_size` numbers
/// behind the other: a core that waits for memory gets more from it by reading at several places.
/// The sums of panel s go to `c + s * rows * kCols`. Towards the end, the first lines of as many
/// panels from `next` on are fetched, unless it is null, since reading at new places starts slowly.
template <class Arithmetic, Index rows, Index streams>
void multiply_streams(const typename Arithmetic::Left* a, Index a_row, Index a_step,
                      const typename Arithmetic::Right* b, Index panel_size, Index steps,
                      const typename Arithmetic::Right* next, typename Arithmetic::Sum* c) {
  constexpr Index kFirstLines = 32;
  constexpr Index kLine = 64;
  using Sum = typename Arithmetic::Sum;
  constexpr Index kVectors = Block<Sum>::kVectors;
  constexpr Index kColumn = kLanes<Sum> * Arithmetic::kDepth;
  Lanes<Sum> sum[streams][rows][kVectors] = {};
  const Index fetching = next == nullptr ? steps : std::max<Index>(0, steps - kFirstLines);
#pragma GCC unroll 1
  for (Index step = 0; step < steps; ++step) {
    if (step >= fetching) {
#pragma GCC unroll 8
      for (Index s = 0; s < streams; ++s) {
        __builtin_prefetch(
            reinterpret_cast<const char*>(next + s * panel_size) + (step - fetching) * kLine, 0, 2);
      }
    }
#pragma GCC unroll 8
    for (Index s = 0; s < streams; ++s) {
#pragma GCC unroll 8
      for (Index j = 0; j < kVectors; ++j) {
        const typename Arithmetic::Column column =
            Arithmetic::column(b + s * panel_size + j * kColumn);
#pragma GCC unroll 8
        for (Index i = 0; i < rows; ++i) {
          Arithmetic::multiply_add(sum[s][i][j], Arithmetic::factor(a + i * a_row), column);
        }
      }
    }
    b += kVectors * kColumn;
    a += a_step;
  }
#pragma GCC unroll 8
  for (Index s = 0; s < streams; ++s) {
#pragma GCC unroll 8
    for (Index i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (Index j = 0; j < kVectors; ++j) {
        store_lanes<Sum>(sum[s][i][j], c + ((s * rows + i) * kVectors + j) * kLanes<Sum>);
      }
    }
  }
}

/// `multiply_block` for a number of rows known at run time, 1 to Arithmetic::kMostRows.
template <class Arithmetic, Index rows = Arithmetic::kMostRows>
void multiply_rows(Index count, const typename Arithmetic::Left* a, Index a_row, Index a_step,
                   const typename Arithmetic::Right* b, Index steps, typename Arithmetic::Sum* c,
                   Index c_row, bool accumulate, ReadAhead ahead, ReadAhead also) {
  if constexpr (rows > 1) {
    if (count < rows) {
      return multiply_rows<Arithmetic, rows - 1>(count, a, a_row, a_step, b, steps, c, c_row,
                                                 accumulate, ahead, also);
    }
  }
  multiply_block<Arithmetic, rows>(a, a_row, a_step, b, steps, c, c_row, accumulate, ahead, also);
}

}  // namespace weir::kernels
