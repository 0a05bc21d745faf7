// SPDX-License-Identifier: MIT
#include <array>
#include <cmath>
#include <cstdint>
#include <set>
#include <vector>

#include <weir/core/shuffle.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::shuffle_test {

TEST_CASE("Shuffle takes each place once", "[core][shuffle]") {
  for (const Index count : {1, 2, 3, 7, 64, 1000}) {
    for (const std::uint64_t key : {0U, 1U, 99U}) {
      const Shuffle order(count, key);
      std::set<Index> seen;
      for (Index place = 0; place < count; ++place) seen.insert(order(place));
      CHECK(static_cast<Index>(seen.size()) == count);
      CHECK(*seen.begin() == 0);
      CHECK(*seen.rbegin() == count - 1);
    }
  }
}

TEST_CASE("Shuffle has no favourite order", "[core][shuffle]") {
  // All 24 orders of four things are equally frequent: chi-square with 23 degrees of freedom, whose
  // quantile of 99.9 % is 49.7.
  constexpr int kKeys = 24000;
  std::array<int, 256> frequency = {};
  for (std::uint64_t key = 0; key < kKeys; ++key) {
    const Shuffle order(4, key);
    ++frequency[static_cast<std::size_t>(order(0) + 4 * order(1) + 16 * order(2) + 64 * order(3))];
  }
  int orders = 0;
  double chi = 0.0;
  for (const int count : frequency) {
    if (count == 0) continue;
    ++orders;
    chi += std::pow(count - kKeys / 24.0, 2) / (kKeys / 24.0);
  }
  CHECK(orders == 24);
  CHECK(chi < 49.7);
}

TEST_CASE("Shuffle leaves no trace of the order in which things were", "[core][shuffle]") {
  // Neighbours of a random order of n things are neighbours before in 2 of n cases.
  constexpr Index kCount = 1000;
  Index neighbours = 0;
  Index fixed = 0;
  for (std::uint64_t key = 0; key < 50; ++key) {
    const Shuffle order(kCount, key);
    for (Index place = 0; place < kCount; ++place) {
      fixed += order(place) == place ? 1 : 0;
      if (place > 0 && std::abs(order(place) - order(place - 1)) == 1) ++neighbours;
    }
  }
  CHECK(neighbours > 60);  // 100 are expected, with a deviation of 10.
  CHECK(neighbours < 140);
  CHECK(fixed > 20);  // 50, with a deviation of 7.
  CHECK(fixed < 80);
}

TEST_CASE("Shuffle reaches places beyond 32 bits", "[core][shuffle]") {
  constexpr Index kMany = Index{1} << 48;
  const Shuffle order(kMany, 5);
  std::set<Index> seen;
  for (Index place = 0; place < 1000; ++place) seen.insert(order(place));
  CHECK(seen.size() == 1000);
  CHECK(*seen.rbegin() < kMany);
  CHECK(*seen.rbegin() > kMany / 2);
  CHECK(Shuffle(kMany, 6)(0) != order(0));
}

TEST_CASE("Shuffle says what does not fit", "[core][shuffle]") {
  CHECK(test::message_of<ConfigError>([] { Shuffle(0, 1); }) ==
        "Shuffle: count = 0, expected >= 1");
  const Shuffle order(3, 1);
  CHECK(test::message_of<ConfigError>([&] { order(3); }) ==
        "Shuffle: place = 3, expected 0 <= place <= 2");
  CHECK(test::message_of<ConfigError>([&] { order(-1); }) ==
        "Shuffle: place = -1, expected 0 <= place <= 2");
}

}  // namespace weir::shuffle_test
