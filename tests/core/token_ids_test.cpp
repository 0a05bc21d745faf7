// SPDX-License-Identifier: MIT
#include <array>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <weir/core/token_ids.hpp>

#include "support/catch.hpp"

namespace weir::token_ids_test {

static_assert(std::is_convertible_v<std::vector<int>, TokenIds>);
static_assert(std::is_convertible_v<std::vector<Index>, TokenIds>);
static_assert(std::is_convertible_v<std::span<int>, TokenIds>);
static_assert(!std::is_convertible_v<std::vector<float>, TokenIds>);
static_assert(!std::is_convertible_v<std::string, TokenIds>);

TEST_CASE("TokenIds are int or Index", "[core][token_ids]") {
  const List<Index> expected = {3, -100, 7};
  const auto check = [&](TokenIds ids) {
    REQUIRE(ids.count() == 3);
    for (Index t = 0; t < 3; ++t) CHECK(ids[t] == expected[t]);
    List<Index> copy = {1, 2, 3, 4, 5};
    ids.copy_to(copy);
    CHECK(copy == expected);
  };
  check(std::vector<int>{3, -100, 7});
  check(std::array<int, 3>{3, -100, 7});
  check(std::vector<Index>{3, -100, 7});
  check(expected);
  check(std::span<const Index>(expected));
}

TEST_CASE("TokenIds may be none", "[core][token_ids]") {
  CHECK(TokenIds().count() == 0);
  CHECK(TokenIds(std::vector<int>()).count() == 0);
  List<Index> ids = {1};
  TokenIds().copy_to(ids);
  CHECK(ids.empty());
}

}  // namespace weir::token_ids_test
