// SPDX-License-Identifier: MIT
/// \file
/// What routers draw their noise from.
#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>
#include <numbers>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Fills a matrix with noise, in training. It may throw, and must then leave pass.rng as it was.
template <class N, class T>
concept NoiseSource = requires(const N& noise, const Pass& pass, MatrixOut<T> out) {
  noise.fill(pass, out);
};

/// The standard normal distribution (Box & Muller 1958), one draw per element; the draws do not
/// depend on the number of threads.
struct NormalNoise {
  /// \throws ConfigError  without a pass.rng.
  template <class T>
  void fill(const Pass& pass, MatrixOut<T> noise) const {
    if (pass.rng == nullptr) {
      fail<ConfigError>("NormalNoise: pass.rng = null, expected a generator in training");
    }
    const Rng draws = pass.rng->split();
    parallel_rows(noise.rows(), 64 * noise.cols(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        for (Index e = 0; e < noise.cols(); ++e) {
          const auto n = 2 * static_cast<std::uint64_t>(t * noise.cols() + e);
          const double radius = std::sqrt(-2.0 * std::log(1.0 - unit_interval(draws.at(n))));
          const double angle = 2.0 * std::numbers::pi * unit_interval(draws.at(n + 1));
          noise(t, e) = static_cast<T>(radius * std::cos(angle));
        }
      }
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
    if (pass.rng == nullptr) {
      fail<ConfigError>("GumbelNoise: pass.rng = null, expected a generator in training");
    }
    const Rng draws = pass.rng->split();
    parallel_rows(noise.rows(), 64 * noise.cols(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        for (Index e = 0; e < noise.cols(); ++e) {
          const auto n = static_cast<std::uint64_t>(t * noise.cols() + e);
          const double u = unit_interval(draws.at(n)) * (1.0 - 2.0 * kHalfStep) + kHalfStep;
          noise(t, e) = static_cast<T>(-std::log(-std::log(u)));
        }
      }
    });
  }
};

}  // namespace weir
