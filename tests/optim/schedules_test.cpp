// SPDX-License-Identifier: MIT
#include <cmath>

#include <weir/optim/warmup_linear.hpp>
#include <weir/optim/warmup_stable_decay.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::schedules_test {

using Decay = WarmupStableDecay::Decay;

TEST_CASE("WarmupLinear passes through points worked out by hand", "[optim][schedule][golden]") {
  // Rise in 4 steps to 2, then 8 steps down to 0.4: 0.2 a step.
  const WarmupLinear schedule{.peak = 2.0, .warmup_steps = 4, .total_steps = 12, .floor = 0.4};
  CHECK(schedule.at(0) == 0.5);
  CHECK(schedule.at(3) == 2.0);
  CHECK(schedule.at(4) == 2.0);
  CHECK(schedule.at(5) == Approx(1.8).epsilon(1e-14));
  CHECK(schedule.at(8) == Approx(1.2).epsilon(1e-14));
  CHECK(schedule.at(11) == Approx(0.6).epsilon(1e-14));
  CHECK(schedule.at(12) == 0.4);
  CHECK(schedule.at(1'000'000) == 0.4);
  CHECK((WarmupLinear{.peak = 1.0, .total_steps = 1}).at(0) == 1.0);
}

TEST_CASE("WarmupStableDecay passes through points worked out by hand",
          "[optim][schedule][golden]") {
  // Rise in 4 steps to 2, stay for 6, fall to 0.4 in 4: at a quarter of the way,
  // 0.4 + 1.6 * (3/4, 1 - 1/2, (1 + cos(pi / 4)) / 2).
  WarmupStableDecay schedule{
      .peak = 2.0, .warmup_steps = 4, .decay_steps = 4, .total_steps = 14, .floor = 0.4};
  for (const Decay decay : {Decay::kLinear, Decay::kSquareRoot, Decay::kCosine}) {
    schedule.decay = decay;
    CHECK(schedule.at(0) == 0.5);
    for (Index step = 3; step <= 10; ++step) CHECK(schedule.at(step) == 2.0);
    for (Index step = 11; step <= 14; ++step) CHECK(schedule.at(step) < schedule.at(step - 1));
    CHECK(schedule.at(14) == 0.4);
    CHECK(schedule.at(1000) == 0.4);
  }
  schedule.decay = Decay::kLinear;
  CHECK(schedule.at(11) == Approx(1.6).epsilon(1e-14));
  CHECK(schedule.at(12) == Approx(1.2).epsilon(1e-14));
  schedule.decay = Decay::kSquareRoot;
  CHECK(schedule.at(11) == Approx(1.2).epsilon(1e-14));
  CHECK(schedule.at(13) == Approx(0.4 + 1.6 * (1.0 - std::sqrt(0.75))).epsilon(1e-14));
  schedule.decay = Decay::kCosine;
  CHECK(schedule.at(11) == Approx(1.2 + 0.8 * std::sqrt(0.5)).epsilon(1e-14));
  CHECK(schedule.at(12) == Approx(1.2).epsilon(1e-14));
}

TEST_CASE("A longer run has the same plateau", "[optim][schedule]") {
  const WarmupStableDecay shorter{
      .peak = 1.0, .warmup_steps = 5, .decay_steps = 10, .total_steps = 40};
  WarmupStableDecay longer = shorter;
  longer.total_steps = 400;
  for (Index step = 0; step <= 30; ++step) CHECK(shorter.at(step) == longer.at(step));
  const WarmupStableDecay no_decay{.peak = 1.0, .total_steps = 3, .floor = 0.5};
  CHECK(no_decay.at(2) == 1.0);
  CHECK(no_decay.at(3) == 0.5);
}

TEST_CASE("The schedules refuse impossible settings", "[optim][schedule]") {
  const auto linear = [](const WarmupLinear& schedule, Index step = 0) {
    return test::message_of<ConfigError>([&] { schedule.at(step); });
  };
  CHECK(linear({.peak = -1.0, .total_steps = 1}) ==
        "WarmupLinear: peak = -1, expected a finite number >= 0");
  CHECK(linear({.peak = 1.0, .total_steps = 1, .floor = 2.0}) ==
        "WarmupLinear: floor = 2, expected 0 <= floor <= 1");
  CHECK(linear({.peak = 1.0, .warmup_steps = 3, .total_steps = 3}) ==
        "WarmupLinear: total_steps = 3, expected > warmup_steps = 3");
  CHECK(linear({.peak = 1.0, .total_steps = 3}, -1) ==
        "WarmupLinear::at: step = -1, expected >= 0");
  CHECK(linear({.peak = 1.0, .warmup_steps = -1, .total_steps = 3}) ==
        "WarmupLinear: warmup_steps = -1, expected >= 0");
  const auto stable = [](const WarmupStableDecay& schedule, Index step = 0) {
    return test::message_of<ConfigError>([&] { schedule.at(step); });
  };
  CHECK(stable({.peak = 1.0}) == "WarmupStableDecay: total_steps = 0, expected >= 1");
  CHECK(stable({.peak = 1.0, .warmup_steps = 6, .total_steps = 5}) ==
        "WarmupStableDecay: warmup_steps = 6, expected 0 <= warmup_steps <= 5");
  CHECK(stable({.peak = 1.0, .warmup_steps = 3, .decay_steps = 3, .total_steps = 5}) ==
        "WarmupStableDecay: decay_steps = 3, expected 0 <= decay_steps <= 2");
  CHECK(stable({.peak = 1.0, .total_steps = 5}, -1) ==
        "WarmupStableDecay::at: step = -1, expected >= 0");
  CHECK(stable({.peak = -1.0, .total_steps = 5}) ==
        "WarmupStableDecay: peak = -1, expected a finite number >= 0");
  CHECK(stable({.peak = 1.0, .total_steps = 5, .floor = 2.0}) ==
        "WarmupStableDecay: floor = 2, expected 0 <= floor <= 1");
}

}  // namespace weir::schedules_test
