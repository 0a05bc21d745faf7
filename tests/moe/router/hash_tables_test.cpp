// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdint>
#include <vector>

#include <weir/moe/router/hash_tables.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::hash_tables_test {

TEST_CASE("A random table is balanced, and given by its seed", "[moe][router][hash_tables]") {
  const Index vocab = GENERATE(1, 10, 103);
  const Index experts = GENERATE(1, 4, 7);
  const auto draw = [&](std::uint64_t seed) {
    Rng rng(seed);
    return random_hash_table(vocab, experts, rng);
  };
  const std::vector<Index> table = draw(6);
  for (Index e = 0; e < experts; ++e) {
    const Index count = std::count(table.begin(), table.end(), e);
    CHECK(count >= vocab / experts);
    CHECK(count <= vocab / experts + 1);
  }
  CHECK(draw(6) == table);
  if (vocab == 103 && experts > 1) CHECK(draw(7) != table);
}

TEST_CASE("A modulo table repeats", "[moe][router][hash_tables]") {
  CHECK(modulo_hash_table(5, 3) == std::vector<Index>{0, 1, 2, 0, 1});
}

TEST_CASE("A balanced table levels the frequencies", "[moe][router][hash_tables]") {
  // 8 to expert 0; 5 and 4 to expert 1 since 5 < 8, then 3 to expert 0, and the rest likewise.
  const std::vector<double> frequency = {3.0, 8.0, 4.0, 5.0, 1.0};
  CHECK(balanced_hash_table(frequency, 2) == std::vector<Index>{0, 0, 1, 1, 1});
  CHECK(balanced_hash_table(std::vector<double>(4, 1.0), 2) == std::vector<Index>{0, 1, 0, 1});
}

TEST_CASE("Hash tables say what does not fit", "[moe][router][hash_tables]") {
  const auto config = [](const auto& action) { return test::message_of<ConfigError>(action); };
  CHECK(config([] { modulo_hash_table(0, 2); }) == "modulo_hash_table: vocab = 0, expected >= 1");
  CHECK(config([] {
          Rng rng;
          random_hash_table(4, 0, rng);
        }) == "random_hash_table: experts = 0, expected >= 1");
  CHECK(config([] { balanced_hash_table(std::vector<double>{-1.0}, 2); }) ==
        "balanced_hash_table: frequency = -1, expected a finite number >= 0");
  CHECK(config([] { modulo_hash_table(4, 0); }) == "modulo_hash_table: experts = 0, expected >= 1");
  CHECK(config([] {
          Rng rng;
          random_hash_table(0, 2, rng);
        }) == "random_hash_table: vocab = 0, expected >= 1");
  CHECK(config([] { balanced_hash_table(std::vector<double>{}, 2); }) ==
        "balanced_hash_table: vocab = 0, expected >= 1");
  CHECK(config([] { balanced_hash_table(std::vector<double>{1.0}, 0); }) ==
        "balanced_hash_table: experts = 0, expected >= 1");
}

}  // namespace weir::hash_tables_test
