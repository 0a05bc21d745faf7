// SPDX-License-Identifier: MIT
/// \file
/// How long a rank has been waiting.
#pragma once

#include <chrono>

namespace weir {

/// A clock that runs from now, or from the last `restart`.
class Deadline {
 public:
  explicit Deadline(double seconds) : seconds_(seconds), begin_(Clock::now()) {}

  void restart() { begin_ = Clock::now(); }
  double seconds() const { return seconds_; }
  bool is_over() const {
    return std::chrono::duration<double>(Clock::now() - begin_).count() > seconds_;
  }

 private:
  using Clock = std::chrono::steady_clock;

  double seconds_;
  Clock::time_point begin_;
};

}  // namespace weir
