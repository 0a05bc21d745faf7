// SPDX-License-Identifier: MIT
#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include <weir/core/parallel.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::parallel_test {

TEST_CASE("parallel_for runs each index once on any number of threads", "[core][parallel]") {
  const auto count = GENERATE(as<Index>{}, 0, 1, 2, 7, 1000);
  const auto team = GENERATE(1, 2, 5);
  set_threads(team);
  CHECK(threads() == team);
  std::vector<int> runs(static_cast<std::size_t>(count), 0);
  for (int round = 0; round < 20; ++round) {
    parallel_for(count, [&](Index i) { ++runs[static_cast<std::size_t>(i)]; });
  }
  set_threads(1);
  for (const int r : runs) CHECK(r == 20);
}

TEST_CASE("parallel_for really shares its work among threads", "[core][parallel]") {
  set_threads(2);
  // Each of two iterations waits for the other: one thread alone would never end.
  std::atomic<int> arrived{0};
  parallel_for(2, [&](Index) {
    ++arrived;
    while (arrived < 2) std::this_thread::yield();
  });
  set_threads(1);
  CHECK(arrived == 2);
}

TEST_CASE("parallel_rows covers all rows with ranges that do not depend on threads",
          "[core][parallel]") {
  const auto rows = GENERATE(as<Index>{}, 0, 1, 100, 12345);
  const auto cost = GENERATE(as<Index>{}, 0, 10, 1'000'000);
  const auto ranges = [&] {
    std::vector<Index> end_of(static_cast<std::size_t>(rows), -1);
    parallel_rows(rows, cost, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) end_of[static_cast<std::size_t>(i)] = end;
    });
    return end_of;
  };
  const auto one = ranges();
  set_threads(2);
  const auto two = ranges();
  set_threads(1);
  CHECK(one == two);
  for (std::size_t i = 0; i < one.size(); ++i) CHECK(one[i] > static_cast<Index>(i));
}

TEST_CASE("An exception in a parallel loop reaches the caller", "[core][parallel]") {
  const auto team = GENERATE(1, 3);
  set_threads(team);
  const auto loop = [](Index bad) {
    parallel_for(100, [bad](Index i) {
      if (i == bad) throw std::runtime_error("bad index");
    });
  };
  CHECK(test::message_of<std::runtime_error>([&] { loop(37); }) == "bad index");
  CHECK(test::message_of<std::runtime_error>([&] { loop(100); }) == "no exception");
  set_threads(1);
}

TEST_CASE("A loop inside a parallel loop runs on its own thread", "[core][parallel]") {
  set_threads(2);
  std::atomic<int> runs{0};
  parallel_for(10, [&](Index) {
    const auto me = std::this_thread::get_id();
    parallel_for(10, [&](Index) {
      if (std::this_thread::get_id() == me) ++runs;
    });
  });
  set_threads(1);
  CHECK(runs == 100);
}

TEST_CASE("Threads of the program may run parallel loops side by side", "[core][parallel]") {
  set_threads(2);
  std::atomic<int> runs{0};
  std::vector<std::thread> users;
  for (int u = 0; u < 3; ++u) {
    users.emplace_back([&] {
      for (int round = 0; round < 200; ++round) parallel_for(5, [&](Index) { ++runs; });
    });
  }
  for (std::thread& user : users) user.join();
  set_threads(1);
  CHECK(runs == 3 * 200 * 5);
}

TEST_CASE("set_threads refuses what makes no sense", "[core][parallel]") {
  CHECK(test::message_of<ConfigError>([] { set_threads(0); }) ==
        "set_threads: count = 0, expected >= 1");
  set_threads(2);
  CHECK(test::message_of<StateError>([] { parallel_for(2, [](Index) { set_threads(3); }); }) ==
        "set_threads: called from inside a parallel loop");
  CHECK(threads() == 2);
  set_threads(1);
  CHECK(hardware_threads() >= 1);
}

}  // namespace weir::parallel_test
