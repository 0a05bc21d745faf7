// SPDX-License-Identifier: MIT
/// \file
/// What `main` of each benchmark does once its rows are registered.
#pragma once

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include <benchmark/benchmark.h>

#include <weir/core/parallel.hpp>
#include <weir/kernels/tiles.hpp>
#include <weir/ops/lanes.hpp>

#include "support/clock.hpp"
#include "support/limits.hpp"
#include "support/rows.hpp"

namespace weir::bench {

/// As the system calls it.
inline std::string cpu_model() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

/// Puts the machine into the head of the report: processor, what the program is compiled for, and
/// the limits.
inline void add_machine_context() {
  constexpr int kRounds = 5;
  constexpr double kSeconds = 0.01;
  constexpr double kGiga = 1e-9;
  benchmark::AddCustomContext("cpu", cpu_model());
  benchmark::AddCustomContext("vectors", std::to_string(8 * sizeof(Lanes<float>)) + " bits");
  benchmark::AddCustomContext("tiles", kernels::uses_tiles() ? "yes" : "no");
  const auto add = [](std::string_view name, std::string_view unit, auto measure) {
    std::vector<double> values;
    for (int i = 0; i < kRounds; ++i) values.push_back(kGiga * measure());
    std::ostringstream value;
    value.precision(4);
    value << median(values) << ' ' << unit;
    std::ostringstream key;
    key << "limits/" << name << "/threads:" << threads();
    benchmark::AddCustomContext(key.str(), value.str());
  };
  for (const int count : thread_counts()) {
    set_threads(count);
    add("fp32", "GFLOP/s", [] { return peak_flops(Precision::kFloat32, kSeconds); });
    add("bf16", "GFLOP/s", [] { return peak_flops(Precision::kBfloat16, kSeconds); });
    add("int8", "GOP/s", [] { return peak_flops(Precision::kInt8, kSeconds); });
    add("read", "GB/s", [] { return read_bandwidth(kSeconds); });
  }
}

/// Runs the registered rows as the command line says: Google Benchmark's options, of which
/// `--benchmark_min_time` means seconds of rounds for each row (`row_seconds`), and counters are
/// columns. Returns the exit code of the program.
inline int run_rows(int argc, char** argv) {
  std::vector<std::string> arguments(argv, argv + argc);
  constexpr std::string_view kMinTime = "--benchmark_min_time=";
  for (const std::string& argument : arguments) {
    if (argument.starts_with(kMinTime)) {
      row_seconds() = std::strtod(argument.c_str() + kMinTime.size(), nullptr);
    }
  }
  arguments.insert(arguments.begin() + 1, "--benchmark_counters_tabular=true");
  // Rounds are ours: Google Benchmark calls each row once, and has its minimum with that.
  arguments.push_back(std::string(kMinTime) + "1e-9");

  std::vector<char*> pointers;
  for (std::string& argument : arguments) pointers.push_back(argument.data());
  auto count = static_cast<int>(pointers.size());
  pointers.push_back(nullptr);
  benchmark::Initialize(&count, pointers.data());
  if (benchmark::ReportUnrecognizedArguments(count, pointers.data())) return 1;
  add_machine_context();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace weir::bench
