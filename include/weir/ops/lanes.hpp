// SPDX-License-Identifier: MIT
/// \file
/// Blocks of numbers as wide as a vector register.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <weir/core/types.hpp>

namespace weir {

namespace detail {

#if defined(__AVX512F__)
inline constexpr int kLaneBytes = 64;
#elif defined(__AVX__)
inline constexpr int kLaneBytes = 32;
#else
inline constexpr int kLaneBytes = 16;
#endif

/// A register of numbers of type T, one of integers of the same size, and half a register.
template <class T>
struct Register {
  using Integer = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;
  typedef T Lanes __attribute__((vector_size(kLaneBytes)));       // NOLINT(modernize-use-using)
  typedef Integer Bits __attribute__((vector_size(kLaneBytes)));  // NOLINT(modernize-use-using)
  typedef T Half __attribute__((vector_size(kLaneBytes / 2)));    // NOLINT(modernize-use-using)
};

}  // namespace detail

/// As many numbers as a vector register holds, in the compiler's vector extension: operators work
/// on all of them, also between `Lanes<T>` and `T`; `a < b ? c : d` chooses lane by lane; `v[i]` is
/// one lane, `Lanes<T>{}` zeros. An element gets the same bits wherever it lies in memory. Eigen's
/// expressions do not promise that, since they treat the ends of an unaligned array with other code
/// than its middle.
template <class T>
using Lanes = typename detail::Register<T>::Lanes;

/// Integers of the size of T, as many as `Lanes<T>` has numbers.
template <class T>
using LaneBits = typename detail::Register<T>::Bits;

/// How many numbers a block of lanes has.
template <class T>
inline constexpr Index kLanes = detail::kLaneBytes / static_cast<Index>(sizeof(T));

/// The kLanes numbers from `from` on, anywhere in memory.
template <class T>
Lanes<T> load_lanes(const T* from) {
  Lanes<T> lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

/// Writes all lanes to `to`.
template <class T>
void store_lanes(const Lanes<T>& lanes, T* to) {
  std::memcpy(to, &lanes, sizeof lanes);
}

#if defined(__AVX512F__)
namespace detail {

template <class T>
auto first_of(Index count) {
  using Mask = std::conditional_t<sizeof(T) == 8, __mmask8, __mmask16>;
  return static_cast<Mask>((1U << static_cast<unsigned>(count)) - 1U);
}

inline Lanes<float> load_part(const float* from, Index count, const Lanes<float>& rest) {
  return _mm512_mask_loadu_ps(rest, first_of<float>(count), from);
}
inline Lanes<double> load_part(const double* from, Index count, const Lanes<double>& rest) {
  return _mm512_mask_loadu_pd(rest, first_of<double>(count), from);
}
inline void store_part(const Lanes<float>& lanes, float* to, Index count) {
  _mm512_mask_storeu_ps(to, first_of<float>(count), lanes);
}
inline void store_part(const Lanes<double>& lanes, double* to, Index count) {
  _mm512_mask_storeu_pd(to, first_of<double>(count), lanes);
}

}  // namespace detail
#else
namespace detail {

/// Copies `count` < kLanes numbers in pieces of fixed size, which the compiler turns into moves.
template <class T>
void copy_part(const T* from, Index count, T* to) {
#pragma GCC unroll 8
  for (Index piece = kLanes<T> / 2; piece > 0; piece /= 2) {
    if ((count & piece) == 0) continue;
    std::memcpy(to, from, static_cast<std::size_t>(piece) * sizeof(T));
    from += piece;
    to += piece;
  }
}

template <class T>
Lanes<T> load_part(const T* from, Index count, const Lanes<T>& rest) {
  T part[kLanes<T>];
  store_lanes<T>(rest, part);
  copy_part(from, count, part);
  return load_lanes<T>(part);
}

template <class T>
void store_part(const Lanes<T>& lanes, T* to, Index count) {
  T part[kLanes<T>];
  store_lanes<T>(lanes, part);
  copy_part(part, count, to);
}

}  // namespace detail
#endif

/// The `count` <= kLanes numbers from `from` on, followed by the lanes of `rest`.
template <class T>
Lanes<T> load_lanes(const T* from, Index count, const Lanes<T>& rest = Lanes<T>{}) {
  return count >= kLanes<T> ? load_lanes<T>(from) : detail::load_part(from, count, rest);
}

/// Writes the first `count` <= kLanes lanes to `to`.
template <class T>
void store_lanes(const Lanes<T>& lanes, T* to, Index count) {
  if (count >= kLanes<T>) {
    store_lanes<T>(lanes, to);
  } else {
    detail::store_part(lanes, to, count);
  }
}

/// 0, 1, 2, ...
template <class T>
LaneBits<T> lane_numbers() {
  LaneBits<T> numbers{};
#pragma GCC unroll 64
  for (int lane = 0; lane < static_cast<int>(kLanes<T>); ++lane) numbers[lane] = lane;
  return numbers;
}

/// `lanes`, with zeros from lane `count` on.
template <class T>
Lanes<T> first_lanes(const Lanes<T>& lanes, Index count) {
  const auto end = static_cast<typename detail::Register<T>::Integer>(count);
  return lane_numbers<T>() < end ? lanes : Lanes<T>{};
}

/// The larger of two numbers in each lane; `a` where one of them is NaN.
template <class T>
Lanes<T> max_lanes(const Lanes<T>& a, const Lanes<T>& b) {
  return b > a ? b : a;
}

/// max(x, 0); a NaN stays a NaN.
template <class T>
Lanes<T> rectify_lanes(const Lanes<T>& x) {
  return x < T(0) ? Lanes<T>{} : x;
}

namespace detail {

template <class T, int... lane>
std::pair<Lanes<T>, Lanes<T>> unzip_lanes(const Lanes<T>& a, const Lanes<T>& b,
                                          std::integer_sequence<int, lane...>) {
  return {__builtin_shufflevector(a, b, (2 * lane)...),
          __builtin_shufflevector(a, b, (2 * lane + 1)...)};
}

template <class T, int... lane>
std::pair<Lanes<T>, Lanes<T>> zip_lanes(const Lanes<T>& a, const Lanes<T>& b,
                                        std::integer_sequence<int, lane...>) {
  constexpr int kCount = static_cast<int>(kLanes<T>);
  return {__builtin_shufflevector(a, b, (lane / 2 + lane % 2 * kCount)...),
          __builtin_shufflevector(a, b, ((kCount + lane) / 2 + lane % 2 * kCount)...)};
}

}  // namespace detail

/// Splits 2 kLanes numbers into those with an even index and those with an odd one.
template <class T>
auto unzip_lanes(const Lanes<T>& a, const Lanes<T>& b) {
  return detail::unzip_lanes<T>(a, b,
                                std::make_integer_sequence<int, static_cast<int>(kLanes<T>)>{});
}

/// The inverse of `unzip_lanes`: a[0], b[0], a[1], b[1] and so on.
template <class T>
auto zip_lanes(const Lanes<T>& a, const Lanes<T>& b) {
  return detail::zip_lanes<T>(a, b, std::make_integer_sequence<int, static_cast<int>(kLanes<T>)>{});
}

namespace detail {

/// Combines each lane with the one `half` lanes away, then with the one half as far away, and so
/// on. In the end every lane has the result of all.
template <int half, class V, class F, int... lane>
V fold(const V& v, F&& f, std::integer_sequence<int, lane...> lanes) {
  if constexpr (half == 0) {
    return v;
  } else {
    return fold<half / 2>(f(v, __builtin_shufflevector(v, v, (lane ^ half)...)), f, lanes);
  }
}

}  // namespace detail

/// Folds the lanes of `Lanes<T>` or `LaneBits<T>` into one number by `f`, which works on vectors.
template <class T, class V, class F>
auto fold_lanes(const V& lanes, F&& f) {
  constexpr int kCount = static_cast<int>(kLanes<T>);
  return detail::fold<kCount / 2>(lanes, f, std::make_integer_sequence<int, kCount>{})[0];
}

/// The sum of the lanes.
template <class T>
T sum_of(const Lanes<T>& lanes) {
  return fold_lanes<T>(lanes,
                       [](const Lanes<T>& a, const Lanes<T>& b) -> Lanes<T> { return a + b; });
}

/// The sum of each of kLanes<T> blocks of lanes. It overwrites the blocks.
template <class T>
Lanes<T> sums_of(Lanes<T> (&blocks)[kLanes<T>]) {
  // Two blocks become one, which has the sums of the pairs of both.
#pragma GCC unroll 4
  for (Index count = kLanes<T> / 2; count > 0; count /= 2) {
#pragma GCC unroll 8
    for (Index i = 0; i < count; ++i) {
      const auto [even, odd] = unzip_lanes<T>(blocks[2 * i], blocks[2 * i + 1]);
      blocks[i] = even + odd;
    }
  }
  return blocks[0];
}

/// Whether a comparison holds in any lane.
template <class T>
bool any_lane(const LaneBits<T>& holds) {
  const auto either = [](const LaneBits<T>& a, const LaneBits<T>& b) -> LaneBits<T> {
    return a | b;
  };
  return fold_lanes<T>(holds, either) != 0;
}

/// The largest lane; unspecified if one is NaN.
template <class T>
T max_of(const Lanes<T>& lanes) {
  return fold_lanes<T>(lanes, max_lanes<T>);
}

/// c[0] + c[1] x + c[2] x^2 + ...
template <class T, std::size_t n>
[[gnu::always_inline]] inline Lanes<T> polynomial(const Lanes<T>& x, const T (&c)[n]) {
  Lanes<T> sum = Lanes<T>{} + c[n - 1];
#pragma GCC unroll 32
  for (std::size_t i = n - 1; i > 0; --i) sum = sum * x + c[i - 1];
  return sum;
}

/// The `count` <= kLanes<double> numbers from `from` on as doubles, followed by zeros.
template <class T>
Lanes<double> load_as_double(const T* from, Index count) {
  if constexpr (std::is_same_v<T, double>) {
    return load_lanes<double>(from, count);
  } else {
    typename detail::Register<T>::Half half{};
    if (count >= kLanes<double>) {
      std::memcpy(&half, from, sizeof half);
    } else {
      for (Index lane = 0; lane < count; ++lane) half[lane] = from[lane];
    }
    return __builtin_convertvector(half, Lanes<double>);
  }
}

/// Writes the first `count` <= kLanes<double> lanes to `to`, rounded.
template <class T>
void store_rounded(const Lanes<double>& lanes, T* to, Index count) {
  if constexpr (std::is_same_v<T, double>) {
    store_lanes<double>(lanes, to, count);
  } else {
    using Half = typename detail::Register<T>::Half;
    const Half half = __builtin_convertvector(lanes, Half);
    if (count >= kLanes<double>) {
      std::memcpy(to, &half, sizeof half);
    } else {
      for (Index lane = 0; lane < count; ++lane) to[lane] = half[lane];
    }
  }
}

}  // namespace weir
