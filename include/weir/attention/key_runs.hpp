// SPDX-License-Identifier: MIT
/// \file
/// How the sums of softmax attention over runs of keys are put together.
#pragma once

#include <algorithm>

#include <weir/attention/pages.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// The keys of a query are read in blocks of kBlock, the sums over each kRun of them are made
/// apart, and the runs are added up in their order. Both begin at positions that are multiples of
/// their sizes, whatever a query sees and whichever queries are computed beside it. So a query has
/// the same bits in a prompt, in a part of it, and alone.
struct KeyRuns {
  static constexpr Index kBlock = 96;
  static constexpr Index kRun = 5 * kBlock;
  static_assert(Pages::kRows % kBlock == 0);
};

/// The factors `keep` and `add` with which two sums, relative to the scores `top` and `of_run`, are
/// added up, for each of `count` pairs of sums. Sets `top` to the larger score. A run of which a
/// query sees nothing has the lowest score and changes nothing.
template <class T>
[[gnu::noinline]] void merge_tops(Index count, const T* of_run, T* top, T* keep, T* add) {
  for (Index i = 0; i < count; i += kLanes<T>) {
    const Index lanes = std::min(kLanes<T>, count - i);
    const Lanes<T> old = load_lanes<T>(top + i, lanes);
    const Lanes<T> run = load_lanes<T>(of_run + i, lanes);
    const Lanes<T> larger = max_lanes<T>(old, run);
    store_lanes<T>(exp_lanes<T>(old - larger), keep + i, lanes);
    store_lanes<T>(exp_lanes<T>(run - larger), add + i, lanes);
    store_lanes<T>(larger, top + i, lanes);
  }
}

/// sums[i] *= keep[i], then sums[i] += add[i] * of_run[i]: in two loops, so that no compiler may
/// put together what another leaves apart.
template <class T>
[[gnu::noinline]] void merge_sums(Index count, const T* keep, const T* add, const T* of_run,
                                  T* sums) {
  loops::multiply<T>(count, sums, keep, sums);
  const auto f = [](const Lanes<T>& sum, const Lanes<T>& factor, const Lanes<T>& run) -> Lanes<T> {
    return sum + factor * run;
  };
  map_lanes<T>(count, f, sums, sums, add, of_run);
}

}  // namespace weir
