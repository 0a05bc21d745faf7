// SPDX-License-Identifier: MIT
/// \file
/// Counts how often a piece of code asks for memory, and lets it run out.
#pragma once

#include <new>
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

/// How many bytes of blocks are in use; 0 where they are not counted.
long bytes_in_use();

/// The most bytes that were in use at once since the last call, which begins anew.
long most_bytes_in_use();

/// How many bytes more than before are in use while `f()` runs, at most.
template <class F>
long most_bytes_of(F&& f) {
  const long before = bytes_in_use();
  most_bytes_in_use();
  std::forward<F>(f)();
  return most_bytes_in_use() - before;
}

/// Lets one allocation fail, the `nth` from now on; 0: none. Nothing fails where allocations are
/// not counted.
void fail_allocation(long nth);

/// Calls `f()` while its `nth` allocation, counted from 1, fails.
/// \return         Whether that came to `f` as std::bad_alloc, and through it.
template <class F>
bool runs_out_of_memory(long nth, F&& f) {
  bool ran_out = false;
  fail_allocation(nth);
  try {
    std::forward<F>(f)();
  } catch (const std::bad_alloc&) {
    ran_out = true;
  }
  fail_allocation(0);
  return ran_out;
}

}  // namespace weir::test
