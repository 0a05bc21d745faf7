// SPDX-License-Identifier: MIT
#include <weir/core/name_pattern.hpp>

#include "support/catch.hpp"

namespace weir::name_pattern_test {

TEST_CASE("A pattern matches names by its stars", "[core][name_pattern]") {
  CHECK(matches_pattern("*", ""));
  CHECK(matches_pattern("*", "layers.0.moe.router.weight"));
  CHECK(matches_pattern("*.router.*", "layers.0.moe.router.weight"));
  CHECK_FALSE(matches_pattern("*.router.*", "router.weight"));
  CHECK(matches_pattern("*router.*", "router.weight"));
  CHECK(matches_pattern("layers.*.gate", "layers.1.moe.experts.7.gate"));
  CHECK_FALSE(matches_pattern("layers.*.gate", "layers.1.moe.experts.7.gates"));
  CHECK(matches_pattern("a*b*c", "aXbbXc"));
  CHECK(matches_pattern("a*b*c", "abc"));
  CHECK_FALSE(matches_pattern("a*b*c", "acb"));
  CHECK(matches_pattern("exact", "exact"));
  CHECK_FALSE(matches_pattern("exact", "exac"));
  CHECK_FALSE(matches_pattern("", "x"));
  CHECK(matches_pattern("", ""));
  CHECK(matches_pattern("**", "x"));
}

}  // namespace weir::name_pattern_test
