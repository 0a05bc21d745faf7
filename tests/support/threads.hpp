// SPDX-License-Identifier: MIT
/// \file
/// A number of threads for the duration of a scope.
#pragma once

#include <weir/core/parallel.hpp>

namespace weir::test {

/// Sets the number of threads, and back to one at the end.
class Threads {
 public:
  explicit Threads(int count) { set_threads(count); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;
  ~Threads() { set_threads(1); }
};

}  // namespace weir::test
