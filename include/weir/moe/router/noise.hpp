// SPDX-License-Identifier: MIT
/// \file
/// What routers draw their noise from.
#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>
#include <numbers>

#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Fills a matrix with noise, in training. It may throw, and must then leave pass.rng as it was.
template <class N, class T>
concept NoiseSource = requires(const N& noise, const Pass& pass, MatrixOut<T> out) {
  noise.fill(pass, out);
};

/// Sets element number n of `out`, row by row, to `draw(n)`, on all threads.
template <class T, class Draw>
void fill_elements(MatrixOut<T> out, Draw&& draw) {
  parallel_rows(out.rows(), 64 * out.cols(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      for (Index i = 0; i < out.cols(); ++i) {
        out(t, i) = static_cast<T>(draw(static_cast<std::uint64_t>(t * out.cols() + i)));
      }
    }
  });
}

/// The standard normal distribution (Box & Muller 1958), one draw per element; the draws do not
/// depend on the number of threads.
struct NormalNoise {
  /// \throws ConfigError  without a pass.rng.
  template <class T>
  void fill(const Pass& pass, MatrixOut<T> noise) const {
    const Rng draws = pass.generator("NormalNoise").split();
    fill_elements<T>(noise, [&](std::uint64_t n) {
      const double radius = std::sqrt(-2.0 * std::log(1.0 - unit_interval(draws.at(2 * n))));
      const double angle = 2.0 * std::numbers::pi * unit_interval(draws.at(2 * n + 1));
      return radius * std::cos(angle);
    });
  }
};

/// The standard Gumbel distribution, -log(-log(u)) with u ~ U(0, 1), one draw per element; the
/// draws do not depend on the number of threads.
struct GumbelNoise {
  /// \throws ConfigError  without a pass.rng.
  template <class T>
  void fill(const Pass& pass, MatrixOut<T> noise) const {
    constexpr double kHalfStep = 0x1.0p-54;  // Keeps u away from 0 and 1.
    const Rng draws = pass.generator("GumbelNoise").split();
    fill_elements<T>(noise, [&](std::uint64_t n) {
      const double u = unit_interval(draws.at(n)) * (1.0 - 2.0 * kHalfStep) + kHalfStep;
      return -std::log(-std::log(u));
    });
  }
};

}  // namespace weir
