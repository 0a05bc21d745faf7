// SPDX-License-Identifier: MIT
/// \file
/// Ctrl-C as a request to come to an end.
#pragma once

#include <csignal>

/// While it lives, the first SIGINT is only noted; the second ends the program as usual.
class Interrupt {
 public:
  Interrupt() {
    noted() = 0;
    struct sigaction action = {};
    action.sa_handler = [](int) { noted() = 1; };
    action.sa_flags = static_cast<int>(SA_RESETHAND);
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, &before_);
  }
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;
  ~Interrupt() { sigaction(SIGINT, &before_, nullptr); }

  /// Whether there was one.
  static bool happened() { return noted() != 0; }

 private:
  static volatile std::sig_atomic_t& noted() {
    static volatile std::sig_atomic_t value = 0;
    return value;
  }

  struct sigaction before_ = {};
};
