// SPDX-License-Identifier: MIT
// Parts that weir has of its own, beside what it could have used instead:
//
//     loop/tasks:8/empty|2us/weir|OpenMP|std::thread/threads:N
//         mean us, median us, p99 us   of a parallel loop, from call to return
//     function/exp|sincos|normal/fp32|fp64/threads:1
//         ns, ulp                               of a number; the worst error, in units in the last
//                                               place of the result (sincos: of the larger one)
//         std ns, std ulp, Eigen ns, Eigen ulp  of a loop over the standard library's function, and
//                                               of Eigen's where it has one for vectors
//     pages/threads:N
//         huge GB/s, small GB/s                 read front to back, from memory of weir's allocator
//         and
//                                               from the same with the system's usual pages
//     packing/fp32|bf16/threads:N
//         copies                                the rate, in bytes read and written, at which a
//                                               weight is packed, over that of a copy of it; both
//                                               go to memory that is new from the system
//         GB/s, copy GB/s
//
// Loops behave otherwise beside other work, such as a `yes > /dev/null &` on each core.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <numbers>
#include <numeric>
#include <string>
#include <string_view>
#include <sys/mman.h>
#include <thread>
#include <vector>

#include <Eigen/Core>
#include <benchmark/benchmark.h>

#include <weir/core/aligned.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/packed_weight.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/normal.hpp>
#include <weir/ops/trigonometry.hpp>

#include "support/clock.hpp"
#include "support/program.hpp"
#include "support/rows.hpp"

namespace {

namespace bench = weir::bench;
using weir::Index;
using weir::Lanes;

constexpr Index kTasks = 8;

/// Arithmetic that takes as long whoever else uses the processor: a chain of `steps` additions.
void work(Index steps) {
  double sum = 0.0;
  for (Index i = 0; i < steps; ++i) {
    sum += 1.0;
    benchmark::DoNotOptimize(sum);
  }
}

/// Steps of `work` in a microsecond on the idle processor.
Index steps_per_microsecond() {
  static const Index steps = [] {
    constexpr Index kMany = 100000;
    double least = 1.0;
    for (int i = 0; i < 20; ++i) {
      least = std::min(least, bench::seconds_of([] { work(kMany); }));
    }
    return static_cast<Index>(1e-6 / least * static_cast<double>(kMany));
  }();
  return steps;
}

void weir_loop(Index steps) {
  weir::parallel_for(kTasks, [=](Index /*task*/) { work(steps); });
}

/// Threads started for the loop, which take tasks one by one as weir's do.
void thread_loop(Index steps) {
  std::atomic<Index> next = 0;
  const auto take_tasks = [&] {
    while (next.fetch_add(1) < kTasks) work(steps);
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < weir::threads(); ++i) threads.emplace_back(take_tasks);
  take_tasks();
  for (std::thread& thread : threads) thread.join();
}

#if defined(WEIR_BENCH_OPENMP)
void openmp_loop(Index steps) {
#pragma omp parallel for num_threads(weir::threads()) schedule(dynamic)
  for (Index task = 0; task < kTasks; ++task) work(steps);
}
#endif

void add_loop_row(const std::string& name, void (*loop)(Index), int microseconds) {
  bench::add_row(name, weir::hardware_threads(), [=](benchmark::State& state) {
    constexpr double kMicro = 1e6;
    const Index steps = microseconds * steps_per_microsecond();
    for (int i = 0; i < 100; ++i) loop(steps);
    std::vector<double> times;
    const bench::Clock::time_point begin = bench::Clock::now();
    while (bench::seconds_since(begin) < bench::row_seconds()) {
      times.push_back(kMicro * bench::seconds_of([&] { loop(steps); }));
    }
    std::sort(times.begin(), times.end());
    const double mean =
        std::accumulate(times.begin(), times.end(), 0.0) / static_cast<double>(times.size());
    state.counters["mean us"] = mean;
    state.counters["median us"] = times[times.size() / 2];
    state.counters["p99 us"] = times[times.size() * 99 / 100];
    return mean / kMicro;
  });
}

/// A function of arrays, or two functions at once, whose results follow each other.
template <class T>
struct Function {
  using Run = void (*)(Index count, const T* in, T* out);
  using Exact = long double (*)(long double);

  std::string_view name;
  double lowest, highest;  ///< Arguments.
  Run weir, standard, eigen;
  Exact first, second;  ///< The second may be null.
};

/// |result - exact| in units in the last place of the number of type T nearest to `size`.
template <class T>
double error_in_units(T result, long double exact, long double size) {
  const auto rounded = static_cast<T>(std::abs(size));
  const T unit = std::nextafter(rounded, std::numeric_limits<T>::infinity()) - rounded;
  return static_cast<double>(std::abs(static_cast<long double>(result) - exact) / unit);
}

template <class T>
void add_function_row(const Function<T>& function) {
  const std::string name =
      "function/" + std::string(function.name) + (sizeof(T) == 8 ? "/fp64" : "/fp32");
  bench::add_row(name, 1, [=](benchmark::State& state) {
    constexpr Index kCount = 8192;
    constexpr double kNano = 1e9;
    weir::RowVector<T> in(kCount);
    weir::RowVector<T> out(2 * kCount);
    for (Index i = 0; i < kCount; ++i) {
      const double share = static_cast<double>(i) / static_cast<double>(kCount - 1);
      in[i] = static_cast<T>(function.lowest + share * (function.highest - function.lowest));
    }
    const auto worst = [&] {
      double error = 0.0;
      for (Index i = 0; i < kCount; ++i) {
        const long double first = function.first(in[i]);
        const long double second = function.second == nullptr ? 0.0L : function.second(in[i]);
        const long double size = std::max(std::abs(first), std::abs(second));
        error = std::max(error, error_in_units<T>(out[i], first, size));
        if (function.second == nullptr) continue;
        error = std::max(error, error_in_units<T>(out[kCount + i], second, size));
      }
      return error;
    };
    bench::Figures figures;
    const auto measure = [&](const std::string& whose, auto run) {
      if (run == nullptr) return;
      const double seconds = bench::seconds_of([&] {
        run(kCount, in.data(), out.data());
        benchmark::ClobberMemory();
      });
      figures.add(whose + "ns", kNano * seconds / static_cast<double>(kCount));
    };
    bench::repeat_rounds([&] {
      measure("", function.weir);
      measure("std ", function.standard);
      measure("Eigen ", function.eigen);
    });
    for (const auto& [whose, run] :
         {std::pair("ulp", function.weir), std::pair("std ulp", function.standard),
          std::pair("Eigen ulp", function.eigen)}) {
      if (run == nullptr) continue;
      run(kCount, in.data(), out.data());
      state.counters[whose] = worst();
    }
    figures.report(state);
    return figures.median("ns") * static_cast<double>(kCount) / kNano;
  });
}

/// out[i] = f(in[i]) with a function of one number.
template <class T, class F>
void loop_over(Index count, const T* in, T* out, F&& f) {
  for (Index i = 0; i < count; ++i) out[i] = f(in[i]);
}

template <class T>
Function<T> exp_function() {
  return {"exp",
          -80.0,
          80.0,
          [](Index count, const T* in, T* out) {
            weir::map_lanes<T>(
                count, [](const Lanes<T>& x) -> Lanes<T> { return weir::exp_lanes<T>(x); }, out,
                in);
          },
          [](Index count, const T* in, T* out) {
            loop_over(count, in, out, [](T x) { return std::exp(x); });
          },
          [](Index count, const T* in, T* out) {
            Eigen::Map<weir::RowVector<T>>(out, count) =
                Eigen::Map<const weir::RowVector<T>>(in, count).array().exp();
          },
          [](long double x) { return std::exp(x); },
          nullptr};
}

Function<double> sincos_function() {
  return {"sincos",
          -1e4,
          1e4,
          [](Index count, const double* in, double* out) {
            for (Index i = 0; i < count; i += weir::kLanes<double>) {
              const auto of_x = weir::sine_cosine_lanes(weir::load_lanes<double>(in + i));
              weir::store_lanes<double>(of_x.sine, out + i);
              weir::store_lanes<double>(of_x.cosine, out + count + i);
            }
          },
          [](Index count, const double* in, double* out) {
            for (Index i = 0; i < count; ++i) {
              out[i] = std::sin(in[i]);
              out[count + i] = std::cos(in[i]);
            }
          },
          nullptr,
          [](long double x) { return std::sin(x); },
          [](long double x) { return std::cos(x); }};
}

template <class T>
Function<T> normal_function() {
  return {
      "normal",
      -6.0,
      6.0,
      [](Index count, const T* in, T* out) {
        weir::map_as_double<T>(
            count,
            [](const Lanes<double>& z) -> Lanes<double> { return weir::normal_lanes<T>(z).cdf; },
            out, in);
      },
      [](Index count, const T* in, T* out) {
        constexpr T kRootHalf = T(1) / std::numbers::sqrt2_v<T>;
        loop_over(count, in, out, [](T z) { return T(0.5) * std::erfc(-kRootHalf * z); });
      },
      nullptr,
      [](long double z) { return 0.5L * std::erfc(-z / std::numbers::sqrt2_v<long double>); },
      nullptr};
}

/// Bytes per second that weir's threads read of `count` numbers, each thread an equal part.
double read_rate(const float* memory, Index count) {
  const Index share = count / weir::threads();
  const double seconds = bench::seconds_of([&] {
    weir::parallel_for(weir::threads(), [&](Index thread) {
      const float* const from = memory + thread * share;
      constexpr Index kSums = 4;
      Lanes<float> sum[kSums] = {};
      for (Index i = 0; i < share; i += kSums * weir::kLanes<float>) {
#pragma GCC unroll 4
        for (Index s = 0; s < kSums; ++s) {
          sum[s] += weir::load_lanes<float>(from + i + s * weir::kLanes<float>);
        }
      }
      for (Lanes<float>& part : sum) benchmark::DoNotOptimize(part);
    });
  });
  return static_cast<double>(count) * sizeof(float) / seconds;
}

void add_pages_row(int threads) {
  bench::add_row("pages", threads, [](benchmark::State& state) {
    constexpr Index kCount = Index{1} << 27;  // 512 MiB, which no cache holds.
    constexpr std::size_t kBytes = kCount * sizeof(float);
    constexpr double kGiga = 1e-9;
    weir::CacheLineAllocator<float> allocator;
    float* const huge = allocator.allocate(kCount);
    float* const small = allocator.allocate(kCount);
#if defined(__linux__)
    madvise(small, kBytes, MADV_NOHUGEPAGE);
#endif
    std::fill_n(huge, kCount, 1.0F);
    std::fill_n(small, kCount, 1.0F);
    bench::Figures figures;
    bench::repeat_rounds([&] {
      figures.add("huge GB/s", kGiga * read_rate(huge, kCount));
      figures.add("small GB/s", kGiga * read_rate(small, kCount));
    });
    allocator.deallocate(huge, kCount);
    allocator.deallocate(small, kCount);
    figures.report(state);
    return kGiga * static_cast<double>(kBytes) / figures.median("huge GB/s");
  });
}

/// Bytes per second, read and written, of weir's threads that copy `weight` to new memory.
double copy_rate(const weir::Matrix<float>& weight) {
  const auto count = static_cast<std::size_t>(weight.size());
  const double seconds = bench::seconds_of([&] {
    weir::SharedMemory memory(weir::SharedMemory::bytes_of<float>(count));
    const auto to = memory.take<float>(count);
    weir::parallel_for(weight.rows(), [&](Index row) {
      std::memcpy(to.get() + row * weight.cols(), &weight(row, 0),
                  static_cast<std::size_t>(weight.cols()) * sizeof(float));
    });
    benchmark::DoNotOptimize(to.get());
  });
  return 2.0 * sizeof(float) * static_cast<double>(count) / seconds;
}

void add_packing_row(weir::Storage storage, int threads) {
  const bool halves = storage == weir::Storage::kBfloat16;
  bench::add_row(
      std::string("packing/") + (halves ? "bf16" : "fp32"), threads, [=](benchmark::State& state) {
        constexpr double kGiga = 1e-9;
        const weir::Matrix<float> weight = weir::Matrix<float>::Constant(16384, 4096, 0.5F);
        const auto bytes =
            static_cast<double>(weight.size()) * (sizeof(float) + (halves ? 2.0 : 4.0));
        bench::Figures figures;
        bench::repeat_rounds([&] {
          const double copied = copy_rate(weight);
          const double seconds = bench::seconds_of([&] {
            const weir::kernels::PackedWeight<float> packed(weight, storage);
            benchmark::DoNotOptimize(packed);
          });
          figures.add("copies", bytes / seconds / copied);
          figures.add("GB/s", kGiga * bytes / seconds);
          figures.add("copy GB/s", kGiga * copied);
        });
        figures.report(state);
        return bytes / (figures.median("GB/s") / kGiga);
      });
}

}  // namespace

int main(int argc, char** argv) {
  for (const int microseconds : {0, 2}) {
    const std::string name =
        "loop/tasks:" + std::to_string(kTasks) + (microseconds == 0 ? "/empty" : "/2us");
    add_loop_row(name + "/weir", weir_loop, microseconds);
#if defined(WEIR_BENCH_OPENMP)
    add_loop_row(name + "/OpenMP", openmp_loop, microseconds);
#endif
    add_loop_row(name + "/std::thread", thread_loop, microseconds);
  }
  add_function_row(exp_function<float>());
  add_function_row(exp_function<double>());
  add_function_row(sincos_function());
  add_function_row(normal_function<float>());
  add_function_row(normal_function<double>());
  for (const int threads : bench::thread_counts()) add_pages_row(threads);
  for (const int threads : bench::thread_counts()) {
    add_packing_row(weir::Storage::kPacked, threads);
    add_packing_row(weir::Storage::kBfloat16, threads);
  }
  return bench::run_rows(argc, argv);
}
