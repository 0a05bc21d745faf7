// SPDX-License-Identifier: MIT
#include <atomic>
#include <cstdlib>
#include <limits>
#include <new>
#include <sys/resource.h>
#include <system_error>
#include <thread>

#include <weir/core/parallel.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/child.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::processes_test {

namespace {

/// How many of 100 iterations run.
int iterations() {
  std::atomic<int> runs{0};
  parallel_for(100, [&](Index) { ++runs; });
  return runs;
}

}  // namespace

TEST_CASE("A child process begins with one thread and may set others", "[core][parallel]") {
  if (!test::allocations_are_counted()) return;  // See child.hpp.
  const test::Threads four(4);
  REQUIRE(iterations() == 100);
  CHECK(test::exit_code_of_child([] {
          if (threads() != 1 || iterations() != 100) return 1;
          if (!test::children_start_threads()) return 0;
          set_threads(3);
          return threads() == 3 && iterations() == 100 ? 0 : 2;
        }) == 0);
  CHECK(threads() == 4);
  CHECK(iterations() == 100);
}

TEST_CASE("A child of a child begins with one thread, too", "[core][parallel]") {
  if (!test::allocations_are_counted()) return;  // See child.hpp.
  if (!test::children_start_threads()) return;
  const test::Threads two(2);
  CHECK(test::exit_code_of_child([] {
          set_threads(2);
          if (iterations() != 100) return 1;
          return test::exit_code_of_child(
              [] { return threads() == 1 && iterations() == 100 ? 0 : 2; });
        }) == 0);
}

TEST_CASE("A child is not held up by a loop of another thread", "[core][parallel]") {
  if (!test::allocations_are_counted()) return;  // See child.hpp.
  const test::Threads two(2);
  std::atomic<bool> entered{false};
  std::atomic<bool> leave{false};
  std::thread other([&] {
    parallel_for(2, [&](Index) {
      entered = true;
      while (!leave) std::this_thread::yield();
    });
  });
  while (!entered) std::this_thread::yield();
  CHECK(test::exit_code_of_child([] {
          if (threads() != 1 || iterations() != 100) return 1;
          if (test::children_start_threads()) set_threads(2);
          return iterations() == 100 ? 0 : 2;
        }) == 0);
  leave = true;
  other.join();
}

TEST_CASE("The child of a loop's body may exit, and is told if it goes on", "[core][parallel]") {
  if (!test::allocations_are_counted()) return;  // See child.hpp.
  const test::Threads two(2);
  const std::thread::id caller = std::this_thread::get_id();
  int code = -1;
  std::string message;
  std::atomic<bool> forked{false};
  // The other thread waits until the caller has taken an iteration and forked in it.
  const auto loop = [&](const auto& in_child) {
    forked = false;
    parallel_for(2, [&](Index) {
      if (std::this_thread::get_id() == caller && !forked) {
        code = in_child();
        forked = true;
      }
      while (!forked) std::this_thread::yield();
    });
  };
  loop([] { return test::exit_code_of_child([] { return iterations() == 100 ? 7 : 8; }); });
  CHECK(code == 7);

  CHECK(test::exit_code_of_child([&]() -> int {
          if (!test::children_start_threads()) return 9;
          set_threads(2);
          const pid_t parent = getpid();
          const auto message_in_child = test::message_of<StateError>([&] {
            loop([&] {
              const pid_t child = fork();
              if (child == 0) {
                alarm(30);
                return 0;
              }
              int status = 0;
              waitpid(child, &status, 0);
              return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
            });
          });
          if (getpid() == parent) return code;
          return message_in_child ==
                         "parallel_for: the process was forked inside the loop, expected the child "
                         "to call exec or exit there"
                     ? 9
                     : 1;
        }) == 9);
}

TEST_CASE("The body of a loop may end the program", "[core][parallel]") {
  if (!test::allocations_are_counted()) return;  // See child.hpp.
  const auto by_caller = GENERATE(false, true);
  if (!test::children_start_threads()) return;
  CHECK(test::exit_code_of_child([&] {
          set_threads(3);
          const std::thread::id caller = std::this_thread::get_id();
          std::atomic<int> arrived{0};
          std::atomic<bool> ends{false};
          parallel_for(1000, [&](Index) {
            ++arrived;
            while (arrived < 3) std::this_thread::yield();  // All threads are in the loop.
            const bool chosen = (std::this_thread::get_id() == caller) == by_caller;
            if (chosen && !ends.exchange(true)) std::exit(11);  // Two at once are undefined.
            while (arrived < 2000) std::this_thread::yield();
          });
          return 1;
        }) == 11);
  CHECK(test::exit_code_of_child([&]() -> int {
          parallel_for(10, [&](Index) { std::exit(12); });  // One thread.
          return 1;
        }) == 12);
}

TEST_CASE("A program may end while another thread is in a loop", "[core][parallel]") {
  if (!test::allocations_are_counted()) return;  // See child.hpp.
  if (!test::children_start_threads()) return;
  CHECK(test::exit_code_of_child([] {
          set_threads(2);
          static std::atomic<bool> entered{false};
          std::thread([] {
            parallel_for(100, [](Index) {
              entered = true;
              for (;;) std::this_thread::yield();
            });
          }).detach();
          while (!entered) std::this_thread::yield();
          return 13;
        }) == 13);
}

TEST_CASE("Threads come and go by any number", "[core][parallel]") {
  for (const int count : {2, 5, 3, 3, 4, 1, 6}) {
    set_threads(count);
    CHECK(threads() == count);
    // As many iterations as threads wait for each other.
    std::atomic<int> arrived{0};
    parallel_for(count, [&](Index) {
      ++arrived;
      while (arrived < count) std::this_thread::yield();
    });
    CHECK(iterations() == 100);
  }
  set_threads(1);
}

TEST_CASE("set_threads that fails leaves the threads there are", "[core][parallel]") {
  if (!test::allocations_are_counted()) return;  // Sanitizers need much memory, too.
  const auto before = GENERATE(1, 3);
  const test::Threads some(before);
  const auto grow = [] {
    try {
      set_threads(5);
    } catch (const std::system_error&) {
      throw std::bad_alloc();  // What the system says if a thread itself finds no memory.
    }
  };
  for (long nth = 1; test::runs_out_of_memory(nth, grow); ++nth) {
    CHECK(threads() == before);
    CHECK(iterations() == 100);
    REQUIRE(nth < 100);
  }
  CHECK(threads() == 5);
  CHECK(iterations() == 100);

  // No room for stacks: the system refuses at some point.
  CHECK(test::exit_code_of_child([&] {
          set_threads(before);
          const rlimit limit = {256U << 20U, 256U << 20U};
          setrlimit(RLIMIT_AS, &limit);
          try {
            set_threads(10'000);
          } catch (const std::system_error&) {
            return threads() == before && iterations() == 100 ? 0 : 1;
          } catch (const std::bad_alloc&) {
            return threads() == before && iterations() == 100 ? 0 : 2;
          }
          return 3;
        }) == 0);
}

}  // namespace weir::processes_test
