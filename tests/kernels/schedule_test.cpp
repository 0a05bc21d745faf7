// SPDX-License-Identifier: MIT
#include <atomic>
#include <mutex>
#include <vector>

#include <weir/kernels/schedule.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"

namespace weir::schedule_test {
using kernels::Pieces;

namespace {

/// How often each piece of each group is handed out.
std::vector<std::vector<int>> visits(const std::vector<Pieces>& groups, int* calls = nullptr) {
  std::vector<std::vector<int>> seen;
  for (const Pieces& pieces : groups) seen.emplace_back(static_cast<std::size_t>(pieces.count), 0);
  std::mutex mutex;
  kernels::parallel_pieces_of(
      static_cast<Index>(groups.size()),
      [&](Index g) { return groups[static_cast<std::size_t>(g)]; },
      [&](Index g, Index begin, Index end) {
        const std::scoped_lock lock(mutex);
        if (calls != nullptr) ++*calls;
        for (Index i = begin; i < end; ++i) {
          ++seen[static_cast<std::size_t>(g)][static_cast<std::size_t>(i)];
        }
      });
  return seen;
}

}  // namespace

TEST_CASE("Each piece of work is handed out once", "[kernels][schedule][parallel]") {
  const test::Threads threads(GENERATE(1, 2, 3));
  const std::vector<std::vector<Pieces>> cases = {
      {},
      {{0, 5}},
      {{7, 100'000}},
      {{1, 1}, {1, 1}, {1, 1}},
      {{3, 1'000'000}, {0, 9}, {1000, 7}, {5, 0}, {64, 123'457}},
      {{1, 900'000'000}, {200, 1000}},
  };
  for (const auto& groups : cases) {
    for (const auto& group : visits(groups)) {
      for (const int count : group) CHECK(count <= 1);
    }
  }
  // Pieces without cost need not be done; all others are.
  for (const auto& groups : cases) {
    const auto seen = visits(groups);
    for (std::size_t g = 0; g < groups.size(); ++g) {
      for (const int count : seen[g]) CHECK(count == (groups[g].cost > 0 ? 1 : 0));
    }
  }
}

TEST_CASE("Pieces that are better done together are not parted", "[kernels][schedule][parallel]") {
  const test::Threads threads(2);
  const Pieces pieces = {.count = 223, .cost = 1'000'000, .together = 4};
  std::mutex mutex;
  int calls = 0;
  Index covered = 0;
  kernels::parallel_pieces_of(
      1, [&](Index) { return pieces; },
      [&](Index /*group*/, Index begin, Index end) {
        const std::scoped_lock lock(mutex);
        ++calls;
        covered += end - begin;
        CHECK(begin % 4 == 0);
        CHECK((end % 4 == 0 || end == pieces.count));
      });
  CHECK(covered == pieces.count);
  CHECK(calls >= 8);

  // Unless there would be too few parts for all threads.
  CHECK(visits({{.count = 2, .cost = 1'000'000, .together = 4}}, &calls)[0] ==
        std::vector<int>{1, 1});
}

TEST_CASE("A large group is cut into many ranges", "[kernels][schedule][parallel]") {
  const test::Threads threads(2);
  int calls = 0;
  visits({{1, 1'000'000}, {400, 1'000'000}, {1, 1'000'000}}, &calls);
  CHECK(calls >= 16);
}

TEST_CASE("A little work is not cut at all", "[kernels][schedule][parallel]") {
  const test::Threads threads(2);
  int calls = 0;
  visits({{4, 1000}}, &calls);
  CHECK(calls == 1);
}

TEST_CASE("Shared tasks come in order to whoever owns them", "[kernels][schedule]") {
  kernels::SharedTasks tasks(5, 2);
  CHECK(tasks.take(0) == 0);
  CHECK(tasks.take(1) == 2);
  CHECK(tasks.take(1) == 3);
  CHECK(tasks.take(1) == 4);
  CHECK(tasks.take(1) == 1);  // The back of the other share.
  CHECK(tasks.take(1) == -1);
  CHECK(tasks.take(0) == -1);
}

TEST_CASE("Each shared task is taken once, whoever does the work", "[kernels][schedule]") {
  for (const Index shares : {1, 2, 3, 7}) {
    for (const Index count : {0, 1, 2, 6, 7, 100}) {
      for (Index worker = 0; worker < shares; ++worker) {
        kernels::SharedTasks tasks(count, shares);
        std::vector<int> taken(static_cast<std::size_t>(count), 0);
        for (Index task = tasks.take(worker); task >= 0; task = tasks.take(worker)) {
          ++taken[static_cast<std::size_t>(task)];
        }
        CHECK(taken == std::vector<int>(static_cast<std::size_t>(count), 1));
      }
    }
  }
}

}  // namespace weir::schedule_test
