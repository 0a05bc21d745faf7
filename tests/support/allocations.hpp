// SPDX-License-Identifier: MIT
/// \file
/// Counts how often a piece of code asks for memory.
#pragma once

#include <utility>

namespace weir::test {

/// Whether this program can count: with glibc, and without a sanitizer, which wants the functions
/// for itself.
bool allocations_are_counted();

/// How many blocks have been allocated since the program started, by any thread and by any means:
/// `new`, `malloc` and its relatives. 0 where they are not counted.
long allocations_so_far();

/// How many blocks `f()` allocates.
template <class F>
long count_allocations(F&& f) {
  const long before = allocations_so_far();
  std::forward<F>(f)();
  return allocations_so_far() - before;
}

}  // namespace weir::test
