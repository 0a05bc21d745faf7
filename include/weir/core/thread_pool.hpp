// SPDX-License-Identifier: MIT
/// \file
/// The threads behind `parallel_for`.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/core/types.hpp>

namespace weir::detail {

/// Threads that wait for a loop and take its iterations one by one, the caller taking part.
///
/// The caller waits for iterations, not for threads. A thread that the system keeps from running
/// only fails to help, so a busy machine slows a program down by its share and no more. OpenMP's
/// barriers wait for every thread. Mean microseconds of a loop on two threads (two virtual cores of
/// Zen 3, GCC 12; ranges over three runs, two of the busy ones):
///
///                                               weir     OpenMP      std::thread, joined
///     8 empty tasks                             0.4-0.7  0.9-2.5     51-68
///     8 tasks of 2 us, at best 8                8.6-10   9.5-12      48-61
///     8 empty tasks, beside two busy processes  2.6-2.8  100-32,000  197-220
///     8 tasks of 2 us, beside them              91-106   454-927     462-502
///
/// by `chrt -f 1 parts_bench --benchmark_filter=loop --benchmark_min_time=1`, and without chrt and
/// with 5 seconds while two `yes > /dev/null` ran and something was being compiled.
class ThreadPool {
 public:
  static ThreadPool& instance() {
    static ThreadPool pool;
    return pool;
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool() { resize(1); }

  /// How many threads work on a loop, the caller included.
  int size() const { return size_.load(std::memory_order_relaxed); }

  /// Starts or ends threads until there are `size`.
  /// \throws StateError   from inside a loop.
  void resize(int size) {
    if (inside()) throw_error<StateError>("set_threads: called from inside a parallel loop");
    const std::scoped_lock lock(mutex_);
    if (size == size_) return;
    stop_ = true;
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stop_ = false;
    size_ = size;
    const std::uint32_t generation = generation_.load();
    for (int i = 1; i < size; ++i) workers_.emplace_back([this, generation] { work(generation); });
  }

  /// Runs `body(i)` for each i in [0, count). Does nothing and returns false if there are no other
  /// threads to share with, they are busy with another caller's loop, or this is one of them.
  bool run(std::uint32_t count, const FunctionRef<void(Index)>& body) {
    if (inside()) return false;
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock() || workers_.empty()) return false;

    body_.store(&body, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    const std::uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
    claim_.store(pack(generation, count), std::memory_order_release);
    generation_.store(generation, std::memory_order_release);
    generation_.notify_all();

    inside() = true;
    take_iterations(generation);
    inside() = false;
    for (std::uint32_t done = finished_.load(std::memory_order_acquire); done != count;
         done = finished_.load(std::memory_order_acquire)) {
      if (!spin([&] { return finished_.load(std::memory_order_acquire) != done; })) {
        finished_.wait(done, std::memory_order_acquire);
      }
    }
    if (failed_.load(std::memory_order_acquire)) {
      const std::exception_ptr error = error_;
      error_ = nullptr;
      lock.unlock();
      std::rethrow_exception(error);
    }
    return true;
  }

 private:
  ThreadPool() = default;

  /// Whether this thread is in a loop already.
  static bool& inside() {
    thread_local bool value = false;
    return value;
  }

  static std::uint64_t pack(std::uint32_t generation, std::uint32_t remaining) {
    return (static_cast<std::uint64_t>(generation) << 32U) | remaining;
  }

  /// Waits some microseconds for `ready`, the usual time between two loops of a pass.
  template <class Ready>
  static bool spin(Ready&& ready) {
    constexpr int kSpins = 2000;
    for (int i = 0; i < kSpins; ++i) {
      if (ready()) return true;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
    return false;
  }

  void work(std::uint32_t seen) {
    inside() = true;
    for (;;) {
      const auto moved = [&] { return generation_.load(std::memory_order_acquire) != seen; };
      if (!spin(moved)) generation_.wait(seen, std::memory_order_acquire);
      seen = generation_.load(std::memory_order_acquire);
      if (stop_.load(std::memory_order_acquire)) return;
      take_iterations(seen);
    }
  }

  /// Claims and runs iterations of the loop `generation` until none is left. A thread that comes
  /// late may read members of the next loop; then its claim fails.
  void take_iterations(std::uint32_t generation) {
    std::uint64_t claim = claim_.load(std::memory_order_acquire);
    for (;;) {
      const auto remaining = static_cast<std::uint32_t>(claim);
      if (remaining == 0 || claim >> 32U != generation) return;
      const FunctionRef<void(Index)>* const body = body_.load(std::memory_order_relaxed);
      const std::uint32_t count = count_.load(std::memory_order_relaxed);
      if (!claim_.compare_exchange_weak(claim, claim - 1, std::memory_order_acq_rel,
                                        std::memory_order_acquire)) {
        continue;
      }
      if (!failed_.load(std::memory_order_relaxed)) {
        try {
          (*body)(static_cast<Index>(count - remaining));
        } catch (...) {
          if (!failed_.exchange(true, std::memory_order_acq_rel)) error_ = std::current_exception();
        }
      }
      if (finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) finished_.notify_one();
      claim = claim_.load(std::memory_order_acquire);
    }
  }

  std::mutex mutex_;  ///< Held while a loop runs or the number of threads changes.
  std::vector<std::thread> workers_;
  std::atomic<int> size_{1};
  std::atomic<bool> stop_{false};
  std::atomic<std::uint32_t> generation_{0};  ///< Counts loops; threads wait for it to change.

  std::atomic<std::uint64_t> claim_{0};  ///< [generation | iterations nobody has taken yet].
  std::atomic<const FunctionRef<void(Index)>*> body_{nullptr};
  std::atomic<std::uint32_t> count_{0};
  std::atomic<std::uint32_t> finished_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  ///< The exception of the first iteration that threw.
};

}  // namespace weir::detail
