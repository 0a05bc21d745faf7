// SPDX-License-Identifier: MIT
// What the machine can do at best, at the vector width this program is compiled for: the figures
// that the other benchmarks set their own against. A run shows how steady they are, too.
#include <algorithm>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

#include "support/clock.hpp"
#include "support/limits.hpp"
#include "support/program.hpp"
#include "support/rows.hpp"

namespace {

namespace bench = weir::bench;

/// A row of median, smallest and largest of what `measure(seconds)` yields per second.
template <class Measure>
void add_limit(const std::string& name, const std::string& unit, int threads, Measure measure) {
  bench::add_row("limits/" + name, threads, [=](benchmark::State& state) {
    constexpr double kSeconds = 0.01;
    constexpr double kGiga = 1e-9;
    std::vector<double> values;
    bench::repeat_rounds([&] { values.push_back(kGiga * measure(kSeconds)); });
    state.counters[unit] = bench::median(values);
    state.counters["least"] = *std::min_element(values.begin(), values.end());
    state.counters["most"] = *std::max_element(values.begin(), values.end());
    return kSeconds;
  });
}

}  // namespace

int main(int argc, char** argv) {
  for (const int threads : bench::thread_counts()) {
    add_limit("fp32", "GFLOP/s", threads, [](double seconds) {
      return bench::peak_flops(bench::Precision::kFloat32, seconds);
    });
    add_limit("bf16", "GFLOP/s", threads, [](double seconds) {
      return bench::peak_flops(bench::Precision::kBfloat16, seconds);
    });
    add_limit("int8", "GOP/s", threads,
              [](double seconds) { return bench::peak_flops(bench::Precision::kInt8, seconds); });
    add_limit("read/streams:1", "GB/s", threads, bench::read_one_stream);
    add_limit("read/streams:4", "GB/s", threads, bench::read_four_streams);
  }
  return bench::run_rows(argc, argv);
}
