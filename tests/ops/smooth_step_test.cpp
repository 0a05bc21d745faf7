// SPDX-License-Identifier: MIT
#include <weir/ops/smooth_step.hpp>

#include "support/catch.hpp"

namespace weir::smooth_step_test {

TEST_CASE("The smooth step is a cubic between flat ends", "[ops][smooth_step]") {
  CHECK(smooth_step(-0.5, 1.0) == 0.0);
  CHECK(smooth_step(-9.0, 1.0) == 0.0);
  CHECK(smooth_step(0.5, 1.0) == 1.0);
  CHECK(smooth_step(0.0, 3.0) == 0.5);
  CHECK(smooth_step(0.5, 2.0) == Approx(0.84375));  // 3/8 - 1/32 + 1/2
  for (double z = -1.3; z < 1.3; z += 0.07) {
    const double numeric = (smooth_step(z + 1e-6, 2.0) - smooth_step(z - 1e-6, 2.0)) / 2e-6;
    CHECK(smooth_step_slope(z, 2.0) == Approx(numeric).margin(1e-6));
    CHECK(smooth_step(z, 2.0) + smooth_step(-z, 2.0) == Approx(1.0));
  }
}

}  // namespace weir::smooth_step_test
