// SPDX-License-Identifier: MIT
/// \file
/// Working space of a thread for the block it computes.
#pragma once

#include <algorithm>

#include <weir/core/aligned.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A thread's space for the blocks it works on, aligned to cache lines. It grows and never shrinks.
/// Code whose blocks are in use at the same time names different types as `User`.
template <class T, class User>
class ThreadSpace {
 public:
  static ThreadSpace& of_this_thread() {
    thread_local ThreadSpace space;
    return space;
  }

  /// Makes room for `count` numbers in all and starts handing them out from the front.
  void reserve(Index count) {
    storage_.resize(std::max(storage_.size(), static_cast<std::size_t>(count)));
    next_ = storage_.data();
  }

  /// The next `count` numbers, contents unspecified.
  T* take(Index count) {
    T* const taken = next_;
    next_ += count;
    return taken;
  }

  /// The next `count` numbers, zero.
  T* take_zeros(Index count) {
    std::fill_n(next_, count, T(0));
    return take(count);
  }

 private:
  AlignedVector<T> storage_;
  T* next_ = nullptr;
};

}  // namespace weir
