// SPDX-License-Identifier: MIT
/// \file
/// Code that runs in a process of its own.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>

#if defined(__SANITIZE_THREAD__)
#define WEIR_THREAD_SANITIZER
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define WEIR_THREAD_SANITIZER
#endif
#endif

namespace weir::test {

/// Whether a child process may start threads: the thread sanitizer ends one that does.
inline bool children_start_threads() {
#ifdef WEIR_THREAD_SANITIZER
  return false;
#else
  return true;
#endif
}

/// Runs `f()`, which returns an exit code, in a child that ends by `std::exit`. Not for programs
/// with sanitizers: LeakSanitizer then waits for threads that the child does not have.
/// \return         The exit code, or minus the number of the signal that killed the child; after 30
///                 seconds, that is SIGALRM.
template <class F>
int exit_code_of_child(F&& f) {
  std::cout.flush();
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    std::exit(std::forward<F>(f)());
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

}  // namespace weir::test
