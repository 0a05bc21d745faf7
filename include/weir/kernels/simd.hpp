// SPDX-License-Identifier: MIT
/// \file
/// The widest vector the target has, in the compiler's portable vector extensions.
#pragma once

#include <cstring>
#include <utility>

#include <weir/core/types.hpp>

namespace weir::kernels {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kVectorRegisters = 32;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
inline constexpr int kVectorBytes = 16;
inline constexpr int kVectorRegisters = 32;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kVectorRegisters = 16;
#endif

/// `lanes` numbers that are computed with at once. Arithmetic operators work on `Vector` and
/// between `Vector` and `T`.
template <class T>
struct Simd {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));  // NOLINT(modernize-use-using)
  static constexpr Index kLanes = kVectorBytes / static_cast<Index>(sizeof(T));

  /// `kLanes` numbers from anywhere in memory.
  static Vector load(const T* from) {
    Vector v;
    std::memcpy(&v, from, sizeof(Vector));
    return v;
  }

  static void store(const Vector& v, T* to) { std::memcpy(to, &v, sizeof(Vector)); }

  /// The sum of the lanes, halves added to each other: a fixed order.
  static T sum(const Vector& v) {
    T part[kLanes];
    store(v, part);
    for (Index half = kLanes / 2; half > 0; half /= 2) {
      for (Index lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
    }
    return part[0];
  }

  /// to[j * to_row + i] = from[i * from_row + j] for a square of `kLanes` rows and columns.
  static void transpose(const T* from, Index from_row, T* to, Index to_row) {
    Vector rows[kLanes];
    for (Index i = 0; i < kLanes; ++i) rows[i] = load(from + i * from_row);
    exchange<1>(rows);
    for (Index i = 0; i < kLanes; ++i) store(rows[i], to + i * to_row);
  }

 private:
  /// Swaps the off-diagonal quarters of all squares of 2 * `half` rows and columns, then those of
  /// the larger ones.
  template <Index half>
  static void exchange(Vector (&rows)[kLanes]) {
    if constexpr (half < kLanes) {
#pragma GCC unroll 16
      for (Index i = 0; i < kLanes; ++i) {
        if ((i & half) == 0) exchange_pair<half>(rows[i], rows[i + half], Lanes{});
      }
      exchange<2 * half>(rows);
    }
  }

  using Lanes = std::make_integer_sequence<int, static_cast<int>(kLanes)>;

  template <Index half, int... lane>
  static void exchange_pair(Vector& upper, Vector& lower, std::integer_sequence<int, lane...>) {
    constexpr int kHalf = static_cast<int>(half);
    constexpr int kSecond = static_cast<int>(kLanes);
    const Vector a = upper;
    const Vector b = lower;
    upper = __builtin_shufflevector(a, b, ((lane & kHalf) == 0 ? lane : kSecond + lane - kHalf)...);
    lower = __builtin_shufflevector(a, b, ((lane & kHalf) == 0 ? lane + kHalf : kSecond + lane)...);
  }
};

}  // namespace weir::kernels
