// SPDX-License-Identifier: MIT
/// \file
/// The standard normal distribution, a register at a time.
#pragma once

#include <bit>
#include <numbers>

#include <weir/core/types.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>

namespace weir {

/// Phi(z) = erfc(-z / sqrt(2)) / 2 and its derivative, the density.
struct NormalLanes {
  Lanes<double> cdf, density;
};

namespace detail {

/// exp(z^2 / 2) (z + 5) Phi(-z) for z >= 0, as the polynomial of t = (z - 5) / (z + 5) with the
/// least relative error: 9e-9 for use in float and 1.3e-17 in double.
template <class T>
struct NormalTable;

template <>
struct NormalTable<float> {
  static constexpr double kCoefficients[] = {
      0.769193043662,   -0.665382460745, 0.495306297299,    -0.313534744662,   0.16500755688,
      -0.0691082483262, 0.0208805263787, -0.00298105246305, -0.00100020615897, 0.000393745544962};
};

template <>
struct NormalTable<double> {
  static constexpr double kCoefficients[] = {
      0.7691930497500629564,     -0.6653825028900566075,    0.4953056159699769292,
      -0.3135331566713149656,    0.1650203661703650205,     -0.06911863870597473183,
      0.0207950668001721339,     -0.002993376775395318039,  -0.000797869400731991984,
      0.0005448991037665958135,  -0.0000593757159940367531, -0.00004976300188654862389,
      0.00001668116330538877918, 3.98147237406003837e-6,    -2.769100667925279783e-6,
      -3.377215272968365065e-7,  4.327546379779744529e-7,   4.360706907331759254e-8,
      -6.537673651659533088e-8,  -1.022306591822453827e-8,  7.2021794767639144e-9,
      2.022581038364497504e-9};
};

}  // namespace detail

/// The distribution at z, computed in double with the digits that a number of type T holds. The
/// error, relative to the result however small, is little more than half a unit in the last place
/// in float and 1e-15 in double. The result is zero below the normal numbers. A NaN stays a NaN.
///
/// Nanoseconds for a number, and the worst error in units in the last place for z in [-6, 6]
/// (parts_bench on one virtual core of Zen 3, AVX2, GCC 12; ranges over four runs):
///
///                             float                double
///     this                    3.3-3.9 ns, 0.62     4.1-4.7 ns, 5.8
///     std::erfc(-z / sqrt 2)  15-23 ns, 43         15-24 ns, 57
///
/// One polynomial serves all z >= 0 after a change of variable, as in Shepherd & Laframboise 1981
/// (Math. Comp. 36, 249-253) for erfc. Phi(z) for z >= 0 is 1 - Phi(-z).
template <class T>
[[gnu::always_inline]] inline NormalLanes normal_lanes(const Lanes<double>& z) {
  constexpr double kCentre = 5.0;
  const Lanes<double> farthest = Lanes<double>{} + 38.0;
  constexpr double kPerRootTwoPi = std::numbers::inv_sqrtpi / std::numbers::sqrt2;
  Lanes<double> a = z < 0.0 ? -z : z;
  a = farthest < a ? farthest : a;

  // z^2 has more digits than a double. So z is split into s, whose square is exact, and a rest.
  constexpr double kRounder = 1.5 * 4294967296.0;  // Rounds to multiples of 2^-20.
  const Lanes<double> s = (a + kRounder) - kRounder;
  const detail::ExpParts<double> exp =
      detail::exp_parts<double>(-0.5 * (s * s), -0.5 * ((a - s) * (a + s)));

  const Lanes<double> inverse = 1.0 / (a + kCentre);
  const Lanes<double> t = (a - kCentre) * inverse;
  const Lanes<double> p =
      polynomial<double>(t, detail::NormalTable<T>::kCoefficients) * exp.mantissa;
  const Lanes<double> tail = p * inverse * exp.power;
  return {z < 0.0 ? tail : 1.0 - tail, kPerRootTwoPi * exp.mantissa * exp.power};
}

}  // namespace weir
