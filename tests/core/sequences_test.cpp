// SPDX-License-Identifier: MIT
#include <cstdint>
#include <vector>

#include <weir/core/pass.hpp>
#include <weir/core/sequences.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::sequences_test {

TEST_CASE("Sequences lie one after the other", "[core][sequences]") {
  const Sequences sequences({3, 0, 2});
  CHECK(sequences.count() == 3);
  CHECK(sequences.tokens() == 5);
  CHECK(sequences.begin(1) == 3);
  CHECK(sequences.end(1) == 3);
  CHECK(sequences.length(2) == 2);
}

TEST_CASE("Sequences of equal length, none, and one more", "[core][sequences]") {
  CHECK(Sequences::uniform(4, 8).tokens() == 32);
  Sequences sequences;
  CHECK(sequences.count() == 0);
  CHECK(sequences.tokens() == 0);
  sequences.append(7);
  CHECK(sequences.end(0) == 7);
  sequences.clear();
  CHECK(sequences.count() == 0);
}

TEST_CASE("Sequences refuse a negative length", "[core][sequences]") {
  CHECK(test::message_of<ConfigError>([] {
          Sequences({2, -1});
        }) == "Sequences: length = -1, expected >= 0");
}

TEST_CASE("A pass knows its padding", "[core][pass]") {
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  const Pass pass{.mask = mask};
  CHECK_FALSE(pass.is_padding(0));
  CHECK(pass.is_padding(1));
  CHECK_FALSE(Pass{}.is_padding(1));
}

TEST_CASE("A pass has to fit the tokens", "[core][pass]") {
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  const Sequences sequences({2, 2});
  CHECK(test::message_of<ShapeError>([&] { Pass{.mask = mask}.check("here", 4); }) ==
        "here: pass.mask has 3 entries, expected 4 (one per token)");
  CHECK(test::message_of<ShapeError>([&] { Pass{.sequences = &sequences}.check("here", 3); }) ==
        "here: pass.sequences cover 4 tokens, expected 3");
  CHECK(test::message_of<ShapeError>([&] {
          Pass{.sequences = &sequences, .mask = mask}.check("here", 4);
        }) == "here: pass.mask has 3 entries, expected 4 (one per token)");
}

}  // namespace weir::sequences_test
