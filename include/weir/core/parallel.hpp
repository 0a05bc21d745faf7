// SPDX-License-Identifier: MIT
/// \file
/// Threads: one setting for the whole library, and the one loop that uses it.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace weir {

/// How many threads this machine runs at once; 1 when the program was compiled without OpenMP.
inline int hardware_threads() {
#ifdef _OPENMP
  return omp_get_num_procs();
#else
  return 1;
#endif
}

namespace detail {
inline std::atomic<int>& thread_setting() {
  static std::atomic<int> threads{1};
  return threads;
}
}  // namespace detail

/// How many threads weir uses: 1 until `set_threads` is called.
inline int threads() { return detail::thread_setting().load(std::memory_order_relaxed); }

/// Lets weir use `count` threads from now on, in every call of every layer. Results do not depend
/// on it, to the last bit.
/// \throws ConfigError  if count < 1, or count > 1 in a program compiled without OpenMP.
inline void set_threads(int count) {
  expect_at_least("set_threads", "count", count, 1);
#ifndef _OPENMP
  if (count > 1) {
    fail<ConfigError>("set_threads: count = ", count,
                      ", expected 1 in a program compiled without OpenMP (add -fopenmp)");
  }
#endif
  detail::thread_setting() = count;
}

/// Calls `body(i)` for each i in [0, count), in any order, on up to `threads()` threads. Each i has
/// to write to places of its own, and what it computes must not depend on who runs it: then the
/// result is the same for any number of threads. An exception from `body` reaches the caller.
/// Called from inside another parallel loop, it runs on the calling thread.
template <class Body>
void parallel_for(Index count, Body&& body) {
#ifdef _OPENMP
  const int team = static_cast<int>(std::min<Index>(threads(), count));
  if (team > 1 && omp_in_parallel() == 0) {
    std::exception_ptr error;
    std::atomic<bool> failed{false};
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
    for (Index i = 0; i < count; ++i) {
      if (failed.load(std::memory_order_relaxed)) continue;
      try {
        body(i);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
    if (error) std::rethrow_exception(error);
    return;
  }
#endif
  for (Index i = 0; i < count; ++i) body(i);
}

/// Calls `body(begin, end)` for consecutive ranges of [0, rows). `row_cost` is roughly how many
/// elementary operations one row takes: ranges are made large enough to be worth a thread's while,
/// and do not depend on the number of threads.
template <class Body>
void parallel_rows(Index rows, Index row_cost, Body&& body) {
  constexpr Index kWorthwhile = 16384;
  const Index chunk = std::max<Index>(1, kWorthwhile / std::max<Index>(1, row_cost));
  parallel_for((rows + chunk - 1) / chunk, [&](Index i) {
    body(i * chunk, std::min(rows, (i + 1) * chunk));
  });
}

}  // namespace weir
