// SPDX-License-Identifier: MIT
/// \file
/// Initial weights. A weight is [out, in]; its fan-in is `in`, also for one expert of many. All
/// leave weights unset if the generator does, see `Rng::unset`.
#pragma once

#include <cmath>

#include <weir/core/error.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>

namespace weir {

namespace detail {

/// [rows, cols] of `draw()`, unless `rng` leaves weights unset.
template <class T, class Draw>
Matrix<T> drawn(Index rows, Index cols, const Rng& rng, Draw&& draw) {
  Matrix<T> weights;
  set_shape(weights, rows, cols);
  if (rng.leaves_unset()) return weights;
  for (Index i = 0; i < weights.size(); ++i) weights.data()[i] = static_cast<T>(draw());
  return weights;
}

}  // namespace detail

/// [rows, cols] drawn from U(-a, a), a = sqrt(3 / cols): unit-variance output for unit-variance
/// input.
template <class T>
Matrix<T> uniform_init(Index rows, Index cols, Rng& rng) {
  const double a = std::sqrt(3.0 / static_cast<double>(cols));
  return detail::drawn<T>(rows, cols, rng, [&] { return rng.uniform(-a, a); });
}

/// [rows, cols] drawn from N(0, stddev^2).
template <class T>
Matrix<T> normal_init(Index rows, Index cols, double stddev, Rng& rng) {
  return detail::drawn<T>(rows, cols, rng, [&] { return stddev * rng.normal(); });
}

/// [rows, cols] drawn from a normal distribution that is cut at two standard deviations. `scale`
/// lowers its variance, which keeps sparse models stable:
///
///     stddev = sqrt(scale / cols)
///
/// (Fedus et al. 2021, arXiv:2101.03961, section 2.4, with s = 0.1 for MoE models and 1.0 for
/// dense ones. stddev is that of the normal before it is cut.)
template <class T>
Matrix<T> switch_init(Index rows, Index cols, Rng& rng, double scale = 0.1) {
  expect_positive("switch_init", "scale", scale);
  const double stddev = std::sqrt(scale / static_cast<double>(cols));
  return detail::drawn<T>(rows, cols, rng, [&] { return stddev * rng.truncated_normal(); });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template weir::Matrix<float> weir::normal_init<float>(weir::Index, weir::Index, double,
                                                             weir::Rng&);
extern template weir::Matrix<double> weir::normal_init<double>(weir::Index, weir::Index, double,
                                                               weir::Rng&);
extern template weir::Matrix<float> weir::switch_init<float>(weir::Index, weir::Index, weir::Rng&,
                                                             double);
extern template weir::Matrix<double> weir::switch_init<double>(weir::Index, weir::Index, weir::Rng&,
                                                               double);
#endif
