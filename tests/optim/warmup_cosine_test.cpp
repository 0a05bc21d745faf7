// SPDX-License-Identifier: MIT
#include <cmath>

#include <weir/optim/warmup_cosine.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::warmup_cosine_test {

TEST_CASE("WarmupCosine passes through points worked out by hand", "[optim][schedule][golden]") {
  // Rise in 4 steps to 2; 8 steps of decay to 0.4: (2 - 0.4) * (1 + cos(pi x)) / 2 + 0.4 is
  // 0.4 + 0.8 = 1.2 half-way, and 1.2 +- 0.8 / sqrt(2) at the quarters.
  const WarmupCosine schedule{.peak = 2.0, .warmup_steps = 4, .total_steps = 12, .floor = 0.4};
  CHECK(schedule.at(0) == 0.5);
  CHECK(schedule.at(1) == 1.0);
  CHECK(schedule.at(3) == 2.0);
  CHECK(schedule.at(4) == 2.0);
  CHECK(schedule.at(6) == Approx(1.2 + 0.8 / std::sqrt(2.0)).epsilon(1e-14));
  CHECK(schedule.at(8) == Approx(1.2).epsilon(1e-14));
  CHECK(schedule.at(10) == Approx(1.2 - 0.8 / std::sqrt(2.0)).epsilon(1e-14));
  CHECK(schedule.at(12) == 0.4);
  CHECK(schedule.at(1000000) == 0.4);
}

TEST_CASE("WarmupCosine rises, then falls", "[optim][schedule]") {
  const WarmupCosine schedule{.peak = 3e-4, .warmup_steps = 10, .total_steps = 100};
  for (Index step = 1; step < 10; ++step) CHECK(schedule.at(step) > schedule.at(step - 1));
  for (Index step = 11; step <= 100; ++step) CHECK(schedule.at(step) < schedule.at(step - 1));
  CHECK(schedule.at(100) == 0.0);
}

TEST_CASE("WarmupCosine without warm-up starts at its peak", "[optim][schedule]") {
  const WarmupCosine schedule{.peak = 1.0, .warmup_steps = 0, .total_steps = 1};
  CHECK(schedule.at(0) == 1.0);
  CHECK(schedule.at(1) == 0.0);
}

TEST_CASE("WarmupCosine refuses impossible settings", "[optim][schedule]") {
  const auto message = [](const WarmupCosine& schedule, Index step = 0) {
    return test::message_of<ConfigError>([&] { schedule.at(step); });
  };
  CHECK(message({.peak = -1.0, .warmup_steps = 0, .total_steps = 1}) ==
        "WarmupCosine: peak = -1, expected a finite number >= 0");
  CHECK(message({.peak = 1.0, .warmup_steps = 0, .total_steps = 1, .floor = 2.0}) ==
        "WarmupCosine: floor = 2, expected 0 <= floor <= 1");
  CHECK(message({.peak = 1.0, .warmup_steps = -3, .total_steps = 1}) ==
        "WarmupCosine: warmup_steps = -3, expected >= 0");
  CHECK(message({.peak = 1.0, .warmup_steps = 8, .total_steps = 8}) ==
        "WarmupCosine: total_steps = 8, expected > warmup_steps = 8");
  CHECK(message({.peak = 1.0, .warmup_steps = 0, .total_steps = 1}, -1) ==
        "WarmupCosine::at: step = -1, expected >= 0");
}

}  // namespace weir::warmup_cosine_test
