// SPDX-License-Identifier: MIT
#include <cmath>
#include <map>
#include <vector>

#include <weir/core/random.hpp>

#include "support/catch.hpp"

namespace weir::random_test {

TEST_CASE("mix_bits is splitmix64", "[core][random]") {
  // The first outputs of the published generator seeded with 0: its state advances by the golden
  // ratio, which mix_bits adds itself.
  CHECK(mix_bits(0) == 0xE220A8397B1DCDAFU);
  CHECK(mix_bits(0x9E3779B97F4A7C15U) == 0x6E789E6AA1B965F4U);
  CHECK(mix_bits(2 * 0x9E3779B97F4A7C15U) == 0x06C45D188009454FU);
}

TEST_CASE("Rng repeats for a seed and differs between seeds", "[core][random]") {
  Rng a(7);
  Rng b(7);
  Rng c(8);
  for (int i = 0; i < 100; ++i) {
    const auto bits = a.bits();
    CHECK(bits == b.bits());
    CHECK(bits != c.bits());
  }
}

TEST_CASE("Rng draws any position out of order", "[core][random]") {
  const Rng origin(3);
  Rng rng = origin;
  for (std::uint64_t i = 0; i < 10; ++i) CHECK(rng.bits() == origin.at(i));
}

TEST_CASE("Rng continues from its saved state", "[core][random]") {
  Rng rng(11);
  for (int i = 0; i < 5; ++i) rng.bits();
  Rng restored = Rng::restore(rng.stream(), rng.position());
  for (int i = 0; i < 5; ++i) CHECK(restored.bits() == rng.bits());
}

TEST_CASE("Rng::split gives a stream of its own", "[core][random]") {
  Rng parent(5);
  Rng child = parent.split();
  Rng sibling = parent.split();
  CHECK(child.stream() != parent.stream());
  CHECK(child.bits() != sibling.bits());
}

TEST_CASE("Rng::unset draws as Rng(0) does, and says so for weights", "[core][random]") {
  Rng unset = Rng::unset();
  Rng zero(0);
  CHECK(unset.leaves_unset());
  CHECK_FALSE(zero.leaves_unset());
  CHECK(unset.bits() == zero.bits());
  Rng part = unset.split();
  CHECK(part.leaves_unset());
  CHECK(part.bits() == zero.split().bits());
  CHECK(unset.position() == zero.position());
}

TEST_CASE("Rng::uniform has the moments of U[0, 1)", "[core][random]") {
  constexpr int kDraws = 100000;
  Rng rng(1);
  double sum = 0.0;
  double squares = 0.0;
  for (int i = 0; i < kDraws; ++i) {
    const double u = rng.uniform();
    REQUIRE(u >= 0.0);
    REQUIRE(u < 1.0);
    sum += u;
    squares += u * u;
  }
  CHECK(std::abs(sum / kDraws - 0.5) < 0.005);
  CHECK(std::abs(squares / kDraws - 1.0 / 3.0) < 0.005);
}

TEST_CASE("Rng::below is uniform over its range", "[core][random]") {
  Rng rng(2);
  std::vector<int> count(7, 0);
  for (int i = 0; i < 70000; ++i) ++count[static_cast<std::size_t>(rng.below(7))];
  for (const int c : count) CHECK(std::abs(c - 10000) < 500);
  CHECK(rng.below(1) == 0);
}

TEST_CASE("Rng::normal has the moments of N(0, 1)", "[core][random]") {
  constexpr int kDraws = 100000;
  Rng rng(4);
  double moments[5] = {};
  for (int i = 0; i < kDraws; ++i) {
    const double z = rng.normal();
    double power = 1.0;
    for (double& moment : moments) {
      moment += power / kDraws;
      power *= z;
    }
  }
  CHECK(std::abs(moments[1]) < 0.02);
  CHECK(std::abs(moments[2] - 1.0) < 0.02);
  CHECK(std::abs(moments[3]) < 0.05);
  CHECK(std::abs(moments[4] - 3.0) < 0.1);
}

TEST_CASE("Rng::truncated_normal stays within its bound", "[core][random]") {
  constexpr int kDraws = 50000;
  Rng rng(6);
  double squares = 0.0;
  for (int i = 0; i < kDraws; ++i) {
    const double z = rng.truncated_normal(2.0);
    REQUIRE(std::abs(z) <= 2.0);
    squares += z * z / kDraws;
  }
  // 1 - 2 b phi(b) / (2 Phi(b) - 1) for b = 2.
  CHECK(std::abs(squares - 0.7737) < 0.01);
}

TEST_CASE("Drawing without replacement gives each choice and each order equally often",
          "[core][random]") {
  Rng rng(4);
  constexpr int kDraws = 12000;
  std::map<std::vector<Index>, int> pairs, orders;
  for (int i = 0; i < kDraws; ++i) {
    std::vector<Index> items = {0, 1, 2, 3};
    draw_to_back(items, 2, rng);
    ++pairs[{items[3], items[2]}];
    std::vector<Index> all = {0, 1, 2};
    shuffle(all, rng);
    ++orders[all];
  }
  REQUIRE(pairs.size() == 12);
  for (const auto& [pair, count] : pairs) CHECK(std::abs(count - kDraws / 12) < 150);
  REQUIRE(orders.size() == 6);
  for (const auto& [order, count] : orders) CHECK(std::abs(count - kDraws / 6) < 200);

  const Rng before = rng;
  std::vector<Index> few = {7};
  shuffle(few, rng);
  std::vector<Index> none;
  shuffle(none, rng);
  draw_to_back(none, 0, rng);
  CHECK(rng.position() == before.position());
  CHECK(few == std::vector<Index>{7});
}

}  // namespace weir::random_test
