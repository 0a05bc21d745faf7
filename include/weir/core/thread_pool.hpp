// SPDX-License-Identifier: MIT
/// \file
/// The threads behind `parallel_for`.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define WEIR_PROCESSES_FORK
#endif

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
///
/// The pool outlives every static object, because a loop may run until the very end of the program
/// (`std::exit` in the body of a loop, or a thread that still computes while main returns).
class ThreadPool {
 public:
  static ThreadPool& instance();

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// How many threads work on a loop, the caller included.
  int size() const { return size_.load(std::memory_order_relaxed); }

  /// Starts or ends threads until there are `size`. If that fails, there are as many as before.
  /// \throws StateError         from inside a loop.
  /// \throws std::system_error  if the system starts no more threads.
  void resize(int size);

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

    const std::uint32_t forks = forks_;
    inside() = true;
    take_iterations(generation);
    inside() = false;
    if (forks_ != forks) {
      static_cast<void>(lock.release());  // The child's mutex is another one.
      throw_error<StateError>(
          "parallel_for: the process was forked inside the loop, expected the child to call exec "
          "or exit there");
    }
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
  ~ThreadPool() = default;

  // A pool that is never destroyed. Its threads end with the program, unless they are in a loop.
  struct Immortal;

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

  // What thread number `index` does, the caller being number 0.
  void work(int index, std::uint32_t seen) {
    inside() = true;
    const std::uint32_t forks = forks_;
    while (forks_ == forks) {
      const auto moved = [&] { return generation_.load(std::memory_order_acquire) != seen; };
      if (!spin(moved)) generation_.wait(seen, std::memory_order_acquire);
      seen = generation_.load(std::memory_order_acquire);
      if (index >= size_.load(std::memory_order_acquire)) return;
      take_iterations(seen);
    }
  }

  // Ends the threads from number `size_` on.
  void end_surplus() {
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    const auto staying = static_cast<std::size_t>(size_ - 1);
    for (std::size_t i = staying; i < workers_.size(); ++i) workers_[i].join();
    workers_.erase(workers_.begin() + (size_ - 1), workers_.end());
  }

  // The end of the program. A loop whose body ends it begins no further iteration; threads in a
  // loop of somebody else are left to it.
  void leave() {
    if (inside()) return failed_.store(true, std::memory_order_relaxed);
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return;
    size_ = 1;
    end_surplus();
  }

  // Lets every child of this process begin with one thread.
  static void expect_forks() {
#ifdef WEIR_PROCESSES_FORK
    static const int error = pthread_atfork(nullptr, nullptr, [] { instance().begin_child(); });
    if (error != 0) throw std::bad_alloc();
#endif
  }

  // What fork does to the pool of the child: the threads are gone, and whatever they and the mutex
  // were about is over.
  void begin_child() {
    std::construct_at(&mutex_);
    for (std::thread& worker : workers_) std::construct_at(&worker);  // Nobody is there to join.
    workers_.clear();
    size_ = 1;
    claim_ = 0;
    failed_ = false;
    error_ = nullptr;
    inside() = false;
    ++forks_;
  }

  /// Claims and runs iterations of the loop `generation` until none is left. A thread that comes
  /// late may read members of the next loop; then its claim fails.
  void take_iterations(std::uint32_t generation) {
    const std::uint32_t forks = forks_;
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
      if (forks_ != forks) return;  // The body forked, and this is the child.
      if (finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) finished_.notify_one();
      claim = claim_.load(std::memory_order_acquire);
    }
  }

  std::mutex mutex_;  ///< Held while a loop runs or the number of threads changes.
  std::vector<std::thread> workers_;
  std::atomic<int> size_{1};
  std::atomic<std::uint32_t> generation_{0};  ///< Counts loops; threads wait for it to change.

  std::atomic<std::uint64_t> claim_{0};  ///< [generation | iterations nobody has taken yet].
  std::atomic<const FunctionRef<void(Index)>*> body_{nullptr};
  std::atomic<std::uint32_t> count_{0};
  std::atomic<std::uint32_t> finished_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  ///< The exception of the first iteration that threw.

  std::uint32_t forks_ = 0;  ///< How many forks lie between the first process and this one.
};

struct ThreadPool::Immortal {
  union {
    ThreadPool pool;
  };

  Immortal() : pool() {}
  Immortal(const Immortal&) = delete;
  Immortal& operator=(const Immortal&) = delete;
  ~Immortal() { pool.leave(); }
};

inline ThreadPool& ThreadPool::instance() {
  static Immortal immortal;
  return immortal.pool;
}

inline void ThreadPool::resize(int size) {
  if (inside()) throw_error<StateError>("set_threads: called from inside a parallel loop");
  if (size > 1) expect_forks();
  const std::scoped_lock lock(mutex_);
  if (size <= size_) {
    size_ = size;
    return end_surplus();
  }
  const std::uint32_t generation = generation_.load();
  try {
    for (int i = size_; i < size; ++i) {
      workers_.emplace_back([this, i, generation] { work(i, generation); });
    }
  } catch (...) {
    end_surplus();
    throw;
  }
  size_ = size;
}

}  // namespace weir::detail

#undef WEIR_PROCESSES_FORK
