// SPDX-License-Identifier: MIT
/// \file
/// A learning rate that stays high until the end is decided on.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A linear rise to `peak`, a plateau, and a decay to `floor`:
///
///     step < warmup_steps:                  peak * (step + 1) / warmup_steps
///     step < total_steps - decay_steps:     peak
///     step < total_steps:                   floor + (peak - floor) * f(x),
///                                           x = (step - (total_steps - decay_steps)) / decay_steps
///     later:                                floor
///
///     f(x) = 1 - x                          kLinear
///            1 - sqrt(x)                    kSquareRoot
///            (1 + cos(pi x)) / 2            kCosine
///
/// Until the decay begins, nothing depends on total_steps: a run can be continued for longer from
/// any point of its plateau. Steps count from 0, and even the first has a rate above zero.
/// (Hu et al. 2024, arXiv:2404.06395, whose decay is exponential; the shapes here, and 1 - sqrt(x)
/// as the best of them: Hägele et al. 2024, arXiv:2405.18392.)
struct WarmupStableDecay {
  enum class Decay : std::uint8_t { kLinear, kSquareRoot, kCosine };

  double peak = 0.0;       ///< The highest rate.
  Index warmup_steps = 0;  ///< How many steps the rise takes; 0 starts at the peak.
  Index decay_steps = 0;   ///< How many steps the decay takes; 0 stays at the peak to the end.
  Index total_steps = 0;   ///< How many steps there are in all.
  double floor = 0.0;      ///< The rate from `total_steps` on. The warm-up may be below it.
  Decay decay = Decay::kSquareRoot;

  /// The rate of `step`.
  /// \throws ConfigError  unless 0 <= floor <= peak, the numbers of steps are at least 0, rise and
  ///                      decay fit into total_steps > 0, and 0 <= step.
  double at(Index step) const {
    check();
    expect_at_least<Index>("WarmupStableDecay::at", "step", step, 0);
    if (step < warmup_steps) return peak * count(step + 1) / count(warmup_steps);
    const Index decayed = step - (total_steps - decay_steps);
    if (decayed <= 0 && step < total_steps) return peak;
    if (step >= total_steps) return floor;
    return floor + (peak - floor) * left(count(decayed) / count(decay_steps));
  }

 private:
  static double count(Index steps) { return static_cast<double>(steps); }

  /// f(x)
  double left(double x) const {
    switch (decay) {
      case Decay::kLinear:
        return 1.0 - x;
      case Decay::kSquareRoot:
        return 1.0 - std::sqrt(x);
      case Decay::kCosine:
        break;
    }
    return 0.5 * (1.0 + std::cos(std::numbers::pi * x));
  }

  void check() const {
    expect_at_least("WarmupStableDecay", "peak", peak, 0.0);
    expect_in("WarmupStableDecay", "floor", floor, 0.0, peak);
    expect_at_least<Index>("WarmupStableDecay", "total_steps", total_steps, 1);
    expect_in<Index>("WarmupStableDecay", "warmup_steps", warmup_steps, 0, total_steps);
    expect_in<Index>("WarmupStableDecay", "decay_steps", decay_steps, 0,
                     total_steps - warmup_steps);
  }
};

}  // namespace weir
