// SPDX-License-Identifier: MIT
/// \file
/// The learning rate over the course of training.
#pragma once

#include <cmath>
#include <numbers>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A linear rise to `peak`, then half a cosine down to `floor`:
///
///     step < warmup_steps:     peak * (step + 1) / warmup_steps
///     step < total_steps:      floor + (peak - floor) * (1 + cos(pi * x)) / 2,
///                              x = (step - warmup_steps) / (total_steps - warmup_steps)
///     later:                   floor
///
/// Steps count from 0, and even the first has a rate above zero. The last step of the warm-up and
/// the first one after it both have the peak.
/// (Loshchilov & Hutter 2016, arXiv:1608.03983, eq. 5, without restarts.)
///
///     optimizer.set_learning_rate(schedule.at(optimizer.steps()));
///     optimizer.step(model);
struct WarmupCosine {
  double peak = 0.0;       ///< The highest rate.
  Index warmup_steps = 0;  ///< How many steps the rise takes; 0 starts at the peak.
  Index total_steps = 0;   ///< How many steps rise and decay take together.
  double floor = 0.0;      ///< The rate from `total_steps` on. The warm-up may be below it.

  /// The rate of `step`.
  /// \throws ConfigError  unless 0 <= floor <= peak, 0 <= warmup_steps < total_steps, 0 <= step.
  double at(Index step) const {
    check();
    expect_at_least<Index>("WarmupCosine::at", "step", step, 0);
    if (step < warmup_steps) return peak * count(step + 1) / count(warmup_steps);
    if (step >= total_steps) return floor;
    const double x = count(step - warmup_steps) / count(total_steps - warmup_steps);
    return floor + (peak - floor) * 0.5 * (1.0 + std::cos(std::numbers::pi * x));
  }

 private:
  static double count(Index steps) { return static_cast<double>(steps); }

  void check() const {
    expect_at_least("WarmupCosine", "peak", peak, 0.0);
    expect_in("WarmupCosine", "floor", floor, 0.0, peak);
    expect_at_least<Index>("WarmupCosine", "warmup_steps", warmup_steps, 0);
    if (total_steps <= warmup_steps) {
      throw_error<ConfigError>("WarmupCosine: total_steps = ", total_steps,
                               ", expected > warmup_steps = ", warmup_steps);
    }
  }
};

}  // namespace weir
