// SPDX-License-Identifier: MIT
/// \file
/// The widest vector the target has, in the compiler's portable vector extensions.
#pragma once

#include <cstring>

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
};

}  // namespace weir::kernels
