// SPDX-License-Identifier: MIT
/// \file
/// How a row is measured: in rounds, between which the machine's limits are looked at, so that what
/// slows the machine down for a while slows down both. Reported are medians over the rounds, of
/// ratios too.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include <weir/core/parallel.hpp>

#include "support/clock.hpp"
#include "support/limits.hpp"

namespace weir::bench {

/// For how long rounds of a row are begun, in seconds; `--benchmark_min_time`.
inline double& row_seconds() {
  static double seconds = 0.3;
  return seconds;
}

/// Calls `round()` until the time of the row is up, but not fewer times than a median wants.
template <class Round>
void repeat_rounds(Round&& round) {
  constexpr int kFewest = 5;  // Of which two may be disturbed.
  constexpr int kMost = 100;
  const Clock::time_point begin = Clock::now();
  for (int i = 0; i < kMost && (i < kFewest || seconds_since(begin) < row_seconds()); ++i) round();
}

/// Figures of a row by name, one value of each for a round.
class Figures {
 public:
  void add(const std::string& name, double value) { values_[name].push_back(value); }

  /// Of all rounds so far.
  double median(const std::string& name) const { return bench::median(values_.at(name)); }

  /// Makes the median of each a counter of the row.
  void report(benchmark::State& state) const {
    for (const auto& [name, values] : values_) state.counters[name] = bench::median(values);
  }

 private:
  std::map<std::string, std::vector<double>> values_;
};

/// What the machine can do at the moment, on as many threads as weir uses.
struct Limits {
  double flops = 0.0;      ///< FLOP/s
  double bandwidth = 0.0;  ///< Bytes per second.
};

/// Takes about `seconds`.
inline Limits measure_limits(Precision precision, double seconds) {
  constexpr double kArithmetic = 1.0 / 3.0;
  return {peak_flops(precision, kArithmetic * seconds),
          read_bandwidth((1.0 - kArithmetic) * seconds)};
}

/// The least that a piece of work has to do.
struct Cost {
  double tokens = 0.0;
  double flops = 0.0;
  double bytes = 0.0;  ///< To be read from memory.

  Cost& operator+=(const Cost& other) {
    tokens += other.tokens;
    flops += other.flops;
    bytes += other.bytes;
    return *this;
  }
};

/// Adds to `figures` what a round says in which work of that `cost` took `seconds`. The limit is
/// the larger of the times that arithmetic alone and reading alone would take.
inline void add_round(Figures& figures, const Cost& cost, const Limits& limits, double seconds) {
  constexpr double kGiga = 1e-9;
  constexpr double kPercent = 100.0;
  const double arithmetic = cost.flops / limits.flops;
  const double reading = cost.bytes / limits.bandwidth;
  figures.add("tokens/s", cost.tokens / seconds);
  figures.add("GFLOP/s", kGiga * cost.flops / seconds);
  figures.add("GB/s", kGiga * cost.bytes / seconds);
  figures.add("peak%", kPercent * arithmetic / seconds);
  figures.add("bandwidth%", kPercent * reading / seconds);
  figures.add("limit%", kPercent * std::max(arithmetic, reading) / seconds);
}

/// Rounds of `work`, which runs something, says what it costs, and returns how long it took:
/// `double work(Cost&)`. Each is set against the mean of the limits before and after it. They are
/// measured the longer, the longer the round is: in a few milliseconds of a busy machine it can
/// seem idle, or half its size. Returns the median of the times.
template <class Work>
double measure_against_limits(benchmark::State& state, Precision precision, Work&& work) {
  constexpr double kShare = 0.1;
  constexpr double kShortest = 0.012;
  constexpr double kLongest = 0.2;
  Figures figures;
  std::vector<double> times;
  Limits before = measure_limits(precision, kShortest);
  repeat_rounds([&] {
    Cost cost;
    const Clock::time_point begin = Clock::now();
    times.push_back(work(cost));
    const double seconds = std::clamp(kShare * seconds_since(begin), kShortest, kLongest);
    const Limits after = measure_limits(precision, seconds);
    const Limits mean = {0.5 * (before.flops + after.flops),
                         0.5 * (before.bandwidth + after.bandwidth)};
    add_round(figures, cost, mean, times.back());
    before = after;
  });
  figures.report(state);
  return median(times);
}

/// 1 and all, where they differ.
inline std::vector<int> thread_counts() {
  if (hardware_threads() == 1) return {1};
  return {1, hardware_threads()};
}

/// Registers the row `name` + "/threads:" + `threads`. `measure(state)` runs with that many threads
/// and returns the seconds to be shown as the row's time.
template <class Measure>
void add_row(const std::string& name, int threads, Measure measure) {
  const std::string full_name = name + "/threads:" + std::to_string(threads);
  benchmark::RegisterBenchmark(full_name.c_str(),
                               [threads, measure = std::move(measure)](benchmark::State& state) {
                                 set_threads(threads);
                                 for (auto _ : state) state.SetIterationTime(measure(state));
                               })
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

}  // namespace weir::bench
