// SPDX-License-Identifier: MIT
#include <cstddef>
#include <stdexcept>
#include <vector>

#include <weir/io/expert_store.hpp>

#include "support/catch.hpp"

namespace weir::io::expert_store_test {
namespace {

/// A store that is asked for experts of one layer, whose weights are all the same.
class Asked {
 public:
  explicit Asked(std::size_t capacity) : store_(capacity) {}

  /// Whether the expert had to be fetched.
  bool fetches(Index expert, std::size_t bytes = 1) {
    bool fetched = false;
    store_.get({0, expert}, bytes, [&] {
      fetched = true;
      SharedMemory memory(PackedGlu<float>::bytes(1, 1, 1, Storage::kPacked));
      const Matrix<float> w = Matrix<float>::Ones(1, 1);
      return PackedGlu<float>(w, w, w, Storage::kPacked, memory);
    });
    return fetched;
  }

  std::vector<Index> held(Index experts) const {
    std::vector<Index> held;
    for (Index e = 0; e < experts; ++e) {
      if (store_.holds({0, e})) held.push_back(e);
    }
    return held;
  }

  ExpertStore<float>& store() { return store_; }

 private:
  ExpertStore<float> store_;
};

using Experts = std::vector<Index>;

}  // namespace

TEST_CASE("Of experts used once, the least recently used makes room", "[io][expert_store]") {
  Asked asked(4);
  for (Index e = 0; e < 4; ++e) CHECK(asked.fetches(e));
  CHECK(asked.fetches(4));
  CHECK(asked.held(5) == Experts{1, 2, 3, 4});
  CHECK(asked.fetches(5, 2));
  CHECK(asked.held(6) == Experts{3, 4, 5});
}

TEST_CASE("Experts used twice stay, up to three quarters of the room", "[io][expert_store]") {
  Asked asked(4);
  for (Index e = 0; e < 4; ++e) asked.fetches(e);
  for (Index e = 0; e < 3; ++e) CHECK_FALSE(asked.fetches(e));
  // 0, 1 and 2 have been used twice, and each new one replaces the one before it.
  for (Index e = 4; e < 7; ++e) {
    CHECK(asked.fetches(e));
    CHECK(asked.held(7) == Experts{0, 1, 2, e});
  }
  // A fourth one used twice pushes 0 back among those used once, where it is the next to go.
  CHECK_FALSE(asked.fetches(6));
  CHECK(asked.fetches(7));
  CHECK(asked.held(8) == Experts{1, 2, 6, 7});
  // One that is used again is the last of them to go.
  CHECK_FALSE(asked.fetches(1));
  CHECK_FALSE(asked.fetches(7));
  CHECK(asked.fetches(8));
  CHECK(asked.held(9) == Experts{1, 6, 7, 8});
}

TEST_CASE("Where all experts were used twice, they make room, too", "[io][expert_store]") {
  Asked asked(8);
  for (int n = 0; n < 2; ++n) {
    for (Index e = 0; e < 6; ++e) asked.fetches(e);
  }
  CHECK(asked.fetches(6, 4));
  CHECK(asked.held(7) == Experts{2, 3, 4, 5, 6});
  CHECK(asked.fetches(7, 5));  // Takes the place of 6, which was used once, and of 2.
  CHECK(asked.held(8) == Experts{3, 4, 5, 7});
  CHECK(asked.store().statistics().bytes == 8);
}

TEST_CASE("An expert that is larger than the store is there alone", "[io][expert_store]") {
  Asked asked(4);
  for (Index e = 0; e < 4; ++e) asked.fetches(e);
  CHECK(asked.fetches(4, 9));
  CHECK(asked.held(5) == Experts{4});
  CHECK_FALSE(asked.fetches(4, 9));
  CHECK(asked.fetches(0));
  CHECK(asked.held(5) == Experts{0});
  const ExpertStatistics statistics = asked.store().statistics();
  CHECK(statistics.bytes == 1);
  CHECK(statistics.most_bytes == 9);
  CHECK(statistics.evictions == 5);
}

TEST_CASE("A store counts what it did", "[io][expert_store]") {
  Asked asked(2);
  CHECK(asked.store().statistics().hit_rate() == 0.0);
  CHECK(asked.store().statistics().most_bytes == 0);
  for (const Index e : {0, 1, 0, 2, 0}) asked.fetches(e);
  asked.store().count_predictions(3, 2);
  asked.store().count_predictions(1, 0);
  const ExpertStatistics statistics = asked.store().statistics();
  CHECK(statistics.hits == 2);
  CHECK(statistics.misses == 3);
  CHECK(statistics.evictions == 1);
  CHECK(statistics.predicted == 4);
  CHECK(statistics.confirmed == 2);
  CHECK(statistics.bytes == 2);
  CHECK(statistics.hit_rate() == 0.4);
}

TEST_CASE("An expert that cannot be fetched is asked for again", "[io][expert_store]") {
  Asked asked(2);
  const auto fail = []() -> PackedGlu<float> { throw std::runtime_error("no file"); };
  CHECK_THROWS_WITH(asked.store().get({0, 0}, 1, fail), "no file");
  CHECK(asked.held(1).empty());
  CHECK(asked.store().statistics().bytes == 0);
  CHECK(asked.fetches(0));
  CHECK_FALSE(asked.fetches(0));
}

TEST_CASE("Memory of an expert that was let go serves the next of its size", "[io][expert_store]") {
  ExpertStore<float> store(1);
  const void* first = nullptr;
  {
    SharedMemory memory = store.memory(4096);
    first = memory.take<float>(1024).get();
  }
  SharedMemory again = store.memory(4096);
  CHECK(again.take<float>(1024).get() == first);
  SharedMemory other = store.memory(8192);
  CHECK(other.take<float>(2048).get() != first);
}

}  // namespace weir::io::expert_store_test
