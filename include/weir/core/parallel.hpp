// SPDX-License-Identifier: MIT
/// \file
/// Threads: one setting for the whole library, and the one loop that uses it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <thread>

#include <weir/core/error.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/core/thread_pool.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// How many threads this machine can run at once.
inline int hardware_threads() {
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

/// How many threads weir uses: 1 until `set_threads` is called.
inline int threads() {
  return detail::ThreadPool::instance().size();
}

/// Lets weir use `count` threads from now on, in every call of every layer. It starts count - 1
/// threads, which sleep between calls. Results do not depend on the number, to the last bit. A
/// child process (`fork`) begins with one thread.
/// \throws ConfigError        if count < 1.
/// \throws StateError         from inside a parallel loop.
/// \throws std::system_error  if the system does not start that many threads, or std::bad_alloc;
///                            there are as many as before then.
inline void set_threads(int count) {
  expect_at_least("set_threads", "count", count, 1);
  detail::ThreadPool::instance().resize(count);
}

/// Calls `body(i)` for each i in [0, count), in any order, on up to `threads()` threads. Each i has
/// to write to places of its own, and its result must not depend on which thread runs it: then the
/// result is the same for any number of threads. An exception from `body` reaches the caller; if
/// there are several, one of them does. Called from inside another parallel loop, or while another
/// thread of the program is in one, it runs on the calling thread. One iteration may call
/// `std::exit`: no further one begins then. If `body` forks, the child has to call exec or exit
/// inside of it.
[[gnu::noinline]] inline void parallel_for(Index count, FunctionRef<void(Index)> body) {
  if (count > 1 && threads() > 1 && count <= std::numeric_limits<std::uint32_t>::max()) {
    if (detail::ThreadPool::instance().run(static_cast<std::uint32_t>(count), body)) return;
  }
  for (Index i = 0; i < count; ++i) body(i);
}

/// Calls `body(begin, end)` for consecutive ranges of [0, rows). `row_cost` is roughly how many
/// elementary operations one row takes: ranges are large enough to be worth sharing out, and do not
/// depend on the number of threads.
[[gnu::noinline]] inline void parallel_rows(Index rows, Index row_cost,
                                            FunctionRef<void(Index, Index)> body) {
  constexpr Index kWorthwhile = 16384;
  const Index chunk = std::max<Index>(1, kWorthwhile / std::max<Index>(1, row_cost));
  parallel_for((rows + chunk - 1) / chunk,
               [&](Index i) { body(i * chunk, std::min(rows, (i + 1) * chunk)); });
}

}  // namespace weir
