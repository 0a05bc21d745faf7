// SPDX-License-Identifier: MIT
/// \file
/// Loops over contiguous numbers, a register at a time. Activations, softmax and norms consist of
/// them.
#pragma once

#include <limits>

#include <weir/core/types.hpp>
#include <weir/ops/lanes.hpp>

namespace weir {

/// out[i] = f(in[i]...) for i in [0, count); `f` takes and returns `Lanes<T>`. `out` may be one of
/// the inputs.
template <class T, class F, class... In>
void map_lanes(Index count, F&& f, T* out, const In*... in) {
  Index i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    store_lanes<T>(f(load_lanes<T>(in + i)...), out + i);
  }
  if (i < count) store_lanes<T>(f(load_lanes<T>(in + i, count - i)...), out + i, count - i);
}

/// out[i] = f(in[i]) for i in [0, count); `f` takes and returns `Lanes<double>`, whatever T is.
template <class T, class F>
void map_as_double(Index count, F&& f, T* out, const T* in) {
  Index i = 0;
  for (; i + kLanes<double> <= count; i += kLanes<double>) {
    store_rounded<T>(f(load_as_double<T>(in + i, kLanes<double>)), out + i, kLanes<double>);
  }
  if (i < count) store_rounded<T>(f(load_as_double<T>(in + i, count - i)), out + i, count - i);
}

namespace detail {

/// The sum of `count` numbers of type T. `block(i, lanes)` gives the `lanes` numbers from i on;
/// lanes behind them do not count.
template <class T, class Block>
T sum_blocks(Index count, Block&& block) {
  constexpr Index kSums = 4;  // Additions under way at once; none waits for another.
  Lanes<T> sum[kSums] = {};
  Index i = 0;
  for (; i + kSums * kLanes<T> <= count; i += kSums * kLanes<T>) {
#pragma GCC unroll 4
    for (Index s = 0; s < kSums; ++s) sum[s] += block(i + s * kLanes<T>, kLanes<T>);
  }
  for (; i + kLanes<T> <= count; i += kLanes<T>) sum[0] += block(i, kLanes<T>);
  if (i < count) sum[1] += first_lanes<T>(block(i, count - i), count - i);
  return sum_of<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

}  // namespace detail

/// The sum of f(in[i]...) for i in [0, count), in an order that depends on `count` alone.
template <class T, class F, class... In>
T sum_lanes(Index count, F&& f, const In*... in) {
  return detail::sum_blocks<T>(
      count, [&](Index i, Index lanes) -> Lanes<T> { return f(load_lanes<T>(in + i, lanes)...); });
}

/// Loops that have a name. Each runs over i in [0, count) and adds in an order that depends on
/// `count` alone. The output may be one of the inputs.
namespace loops {

/// out[i] = factor x[i].
template <class T>
void scale(Index count, T factor, const T* x, T* out) {
  map_lanes<T>(
      count, [factor](const Lanes<T>& v) -> Lanes<T> { return factor * v; }, out, x);
}

/// out[i] = a[i] + b[i].
template <class T>
void add(Index count, const T* a, const T* b, T* out) {
  const auto f = [](const Lanes<T>& v, const Lanes<T>& w) -> Lanes<T> { return v + w; };
  map_lanes<T>(count, f, out, a, b);
}

/// out[i] = a[i] b[i].
template <class T>
void multiply(Index count, const T* a, const T* b, T* out) {
  const auto f = [](const Lanes<T>& v, const Lanes<T>& w) -> Lanes<T> { return v * w; };
  map_lanes<T>(count, f, out, a, b);
}

/// sum[i] += factor x[i].
template <class T>
void add_scaled(Index count, T factor, const T* x, T* sum) {
  const auto f = [factor](const Lanes<T>& v, const Lanes<T>& w) -> Lanes<T> {
    return v + factor * w;
  };
  map_lanes<T>(count, f, sum, sum, x);
}

/// out[i] = of_a a[i] + of_b b[i].
template <class T>
void blend(Index count, T of_a, const T* a, T of_b, const T* b, T* out) {
  const auto f = [of_a, of_b](const Lanes<T>& v, const Lanes<T>& w) -> Lanes<T> {
    return of_a * v + of_b * w;
  };
  map_lanes<T>(count, f, out, a, b);
}

/// sum_i x[i].
template <class T>
T sum(Index count, const T* x) {
  return sum_lanes<T>(
      count, [](const Lanes<T>& v) -> Lanes<T> { return v; }, x);
}

/// sum_i x[i]^2.
template <class T>
T sum_of_squares(Index count, const T* x) {
  return sum_lanes<T>(
      count, [](const Lanes<T>& v) -> Lanes<T> { return v * v; }, x);
}

/// sum_i x[i]^2, computed in double.
template <class T>
double sum_of_squares_as_double(Index count, const T* x) {
  return detail::sum_blocks<double>(count, [x](Index i, Index lanes) -> Lanes<double> {
    const Lanes<double> v = load_as_double<T>(x + i, lanes);
    return v * v;
  });
}

/// sum_i a[i] b[i].
template <class T>
T dot(Index count, const T* a, const T* b) {
  const auto f = [](const Lanes<T>& v, const Lanes<T>& w) -> Lanes<T> { return v * w; };
  return sum_lanes<T>(count, f, a, b);
}

/// sum_i a[i] b[i] c[i].
template <class T>
T dot(Index count, const T* a, const T* b, const T* c) {
  const auto f = [](const Lanes<T>& u, const Lanes<T>& v, const Lanes<T>& w) -> Lanes<T> {
    return u * v * w;
  };
  return sum_lanes<T>(count, f, a, b, c);
}

/// The largest x[i]; -inf if there are none. NaNs are skipped.
template <class T>
T max(Index count, const T* x) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  Lanes<T> best = Lanes<T>{} + kLowest;
  Lanes<T> second = best;
  Index i = 0;
  for (; i + 2 * kLanes<T> <= count; i += 2 * kLanes<T>) {
    best = max_lanes<T>(best, load_lanes<T>(x + i));
    second = max_lanes<T>(second, load_lanes<T>(x + i + kLanes<T>));
  }
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    best = max_lanes<T>(best, load_lanes<T>(x + i));
  }
  if (i < count) second = max_lanes<T>(second, load_lanes<T>(x + i, count - i, second));
  return max_of<T>(max_lanes<T>(best, second));
}

}  // namespace loops

}  // namespace weir
