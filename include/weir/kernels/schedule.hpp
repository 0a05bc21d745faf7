// SPDX-License-Identifier: MIT
/// \file
/// Sharing out many small pieces of work of different sizes.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include <weir/core/function_ref.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>

namespace weir::kernels {

/// The pieces of work of a group. Each costs `cost` multiply-adds, and `together` of them in a row
/// are better done by one thread.
struct Pieces {
  Index count = 0;
  Index cost = 0;
  Index together = 1;
};

/// Tasks 0 to `tasks` - 1 in `shares` consecutive parts. A thread takes the tasks of its own share
/// from the front, so that one begins in memory where the last ended; when none is left, it takes
/// those of others from the back.
class SharedTasks {
 public:
  static constexpr Index kMostShares = 64;

  SharedTasks(Index tasks, Index shares) : shares_(shares) {
    for (Index i = 0; i < shares; ++i) {
      share(i).store(pack(tasks * i / shares, tasks * (i + 1) / shares), std::memory_order_relaxed);
    }
  }

  /// The next task for the thread of share `own`, or -1.
  Index take(Index own) {
    for (Index i = 0; i < shares_; ++i) {
      std::atomic<std::uint64_t>& from = share((own + i) % shares_);
      std::uint64_t left = from.load(std::memory_order_relaxed);
      while (begin(left) < end(left)) {
        const bool front = i == 0;
        const Index task = front ? begin(left) : end(left) - 1;
        const std::uint64_t rest = front ? pack(task + 1, end(left)) : pack(begin(left), task);
        if (from.compare_exchange_weak(left, rest, std::memory_order_relaxed)) return task;
      }
    }
    return -1;
  }

 private:
  static std::uint64_t pack(Index begin, Index end) {
    return (static_cast<std::uint64_t>(begin) << 32U) | static_cast<std::uint64_t>(end);
  }
  static Index begin(std::uint64_t range) { return static_cast<Index>(range >> 32U); }
  static Index end(std::uint64_t range) { return static_cast<Index>(range & 0xffffffffU); }

  std::atomic<std::uint64_t>& share(Index i) { return left_[static_cast<std::size_t>(i)]; }

  Index shares_;
  std::array<std::atomic<std::uint64_t>, kMostShares> left_ = {};
};

/// Calls `body(group, begin, end)` such that each piece of each group is in exactly one of the
/// ranges [begin, end). `pieces_of(group)` gives the group's `Pieces`. The work is cut by cost, not
/// by group: when one expert has most of the tokens, all threads work on that expert.
[[gnu::noinline]] inline void parallel_pieces_of(Index groups, FunctionRef<Pieces(Index)> pieces_of,
                                                 FunctionRef<void(Index, Index, Index)> body) {
  constexpr Index kWorthwhile = 100'000;  // Multiply-adds below which waking a thread costs more.
  constexpr Index kTasksPerThread = 16;
  constexpr Index kPiecesPerTask = 4;  // A thread can do several side by side.
  Index total = 0;
  Index count = 0;
  for (Index g = 0; g < groups; ++g) {
    const Pieces pieces = pieces_of(g);
    total += pieces.count * pieces.cost;
    count += pieces.count;
  }
  if (total == 0) return;
  const Index most_tasks = std::min<Index>(kTasksPerThread * threads(),
                                           std::max<Index>(threads(), count / kPiecesPerTask));
  const Index tasks = threads() == 1 ? 1 : std::clamp<Index>(total / kWorthwhile, 1, most_tasks);
  const auto run = [&](Index task) {
    // This task has the pieces that begin in [from, to) on the line of all work.
    const Index from = total / tasks * task + std::min(task, total % tasks);
    const Index to = total / tasks * (task + 1) + std::min(task + 1, total % tasks);
    Index start = 0;
    for (Index g = 0; g < groups && start < to; ++g) {
      const Pieces pieces = pieces_of(g);
      const Index end = start + pieces.count * pieces.cost;
      if (end > from && pieces.cost > 0) {
        const Index step = count >= tasks * pieces.together ? pieces.together : 1;
        const auto first_from = [&](Index position) {
          const Index steps = (position - start + step * pieces.cost - 1) / (step * pieces.cost);
          return std::clamp<Index>(step * steps, 0, pieces.count);
        };
        const Index first = from <= start ? 0 : first_from(from);
        const Index last = first_from(to);
        if (first < last) body(g, first, last);
      }
      start = end;
    }
  };
  const auto shares = std::min<Index>({tasks, threads(), SharedTasks::kMostShares});
  SharedTasks shared(tasks, shares);
  parallel_for(shares, [&](Index share) {
    for (Index task = shared.take(share); task >= 0; task = shared.take(share)) run(task);
  });
}

}  // namespace weir::kernels
