// SPDX-License-Identifier: MIT
/// \file
/// A step with a smooth middle and exactly flat ends, and its derivative.
#pragma once

namespace weir {

/// A cubic from 0 at -gamma/2 to 1 at gamma/2, with the slope 0 at both ends and beyond:
///
///     S(z) = -2 z^3 / gamma^3 + 3 z / (2 gamma) + 1/2
///
/// (Hazimeh et al. 2020, arXiv:2002.07772.)
template <class T>
T smooth_step(T z, T gamma) {
  const T u = z / gamma;
  if (u <= T(-0.5)) return T(0);
  if (u >= T(0.5)) return T(1);
  return u * (T(1.5) - T(2) * u * u) + T(0.5);
}

/// The derivative of `smooth_step` with respect to z.
template <class T>
T smooth_step_slope(T z, T gamma) {
  const T u = z / gamma;
  return u > T(-0.5) && u < T(0.5) ? (T(1.5) - T(6) * u * u) / gamma : T(0);
}

}  // namespace weir
