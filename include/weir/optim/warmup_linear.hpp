// SPDX-License-Identifier: MIT
/// \file
/// A learning rate that falls in a straight line.
#pragma once

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A linear rise to `peak`, then a linear fall to `floor`:
///
///     step < warmup_steps:     peak * (step + 1) / warmup_steps
///     step < total_steps:      floor + (peak - floor) * (1 - x),
///                              x = (step - warmup_steps) / (total_steps - warmup_steps)
///     later:                   floor
///
/// Steps count from 0, and even the first has a rate above zero; see WarmupCosine. (Hugging Face's
/// `get_linear_schedule_with_warmup`, whose rise starts one step earlier, at zero.)
struct WarmupLinear {
  double peak = 0.0;       ///< The highest rate.
  Index warmup_steps = 0;  ///< How many steps the rise takes; 0 starts at the peak.
  Index total_steps = 0;   ///< How many steps rise and fall take together.
  double floor = 0.0;      ///< The rate from `total_steps` on. The warm-up may be below it.

  /// The rate of `step`.
  /// \throws ConfigError  unless 0 <= floor <= peak, 0 <= warmup_steps < total_steps, 0 <= step.
  double at(Index step) const {
    check();
    expect_at_least<Index>("WarmupLinear::at", "step", step, 0);
    if (step < warmup_steps) return peak * count(step + 1) / count(warmup_steps);
    if (step >= total_steps) return floor;
    return floor + (peak - floor) * count(total_steps - step) / count(total_steps - warmup_steps);
  }

 private:
  static double count(Index steps) { return static_cast<double>(steps); }

  void check() const {
    expect_at_least("WarmupLinear", "peak", peak, 0.0);
    expect_in("WarmupLinear", "floor", floor, 0.0, peak);
    expect_at_least<Index>("WarmupLinear", "warmup_steps", warmup_steps, 0);
    if (total_steps <= warmup_steps) {
      throw_error<ConfigError>("WarmupLinear: total_steps = ", total_steps,
                               ", expected > warmup_steps = ", warmup_steps);
    }
  }
};

}  // namespace weir
