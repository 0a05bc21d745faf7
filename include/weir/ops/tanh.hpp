// SPDX-License-Identifier: MIT
/// \file
/// Hyperbolic tangents, a register at a time.
#pragma once

#include <weir/core/types.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

namespace detail {

/// (tanh(x) - x) / x^3 for |x| < 0.625 as a function of z = x^2: the polynomial and the rational
/// function of Moshier's Cephes library (1989).
inline Lanes<float> tanh_remainder(const Lanes<float>& z) {
  constexpr float kCoefficients[] = {-3.33332819422E-1F, 1.33314422036E-1F, -5.37397155531E-2F,
                                     2.06390887954E-2F, -5.70498872745E-3F};
  return polynomial<float>(z, kCoefficients);
}
inline Lanes<double> tanh_remainder(const Lanes<double>& z) {
  constexpr double kAbove[] = {-1.61468768441708447952E3, -9.92877231001918586564E1,
                               -9.64399179425052238628E-1};
  constexpr double kBelow[] = {4.84406305325125486048E3, 2.23548839060100448583E3,
                               1.12811678491632931402E2, 1.0};
  return polynomial<double>(z, kAbove) / polynomial<double>(z, kBelow);
}

}  // namespace detail

/// tanh(x) to 3 units in the last place, also near zero; +-1 for large x. A NaN stays a NaN.
template <class T>
[[gnu::always_inline]] inline Lanes<T> tanh_lanes(const Lanes<T>& x) {
  constexpr T kSmall = T(0.625);
  const Lanes<T> z = x * x;
  const Lanes<T> near = x + x * z * detail::tanh_remainder(z);
  const Lanes<T> size = x < T(0) ? -x : x;
  const Lanes<T> far = T(1) - T(2) / (exp_lanes<T>(T(2) * size) + T(1));
  const Lanes<T> of_size = x < T(0) ? -far : far;
  return size < kSmall ? near : of_size;
}

namespace loops {

/// out[i] = factor tanh(x[i]).
template <class T>
void scaled_tanh(Index count, T factor, const T* x, T* out) {
  const auto f = [factor](const Lanes<T>& v) -> Lanes<T> { return factor * tanh_lanes<T>(v); };
  map_lanes<T>(count, f, out, x);
}

}  // namespace loops

}  // namespace weir
