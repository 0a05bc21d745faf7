// SPDX-License-Identifier: MIT
#include <cstdint>
#include <utility>
#include <vector>

#include <weir/core/token_rows.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::token_rows_test {

namespace {

using Ranges = std::vector<std::pair<Index, Index>>;

Ranges groups(const TokenRows& rows, Scope scope) {
  Ranges ranges;
  rows.for_each_group(scope, [&](Index begin, Index end) { ranges.emplace_back(begin, end); });
  return ranges;
}

}  // namespace

TEST_CASE("Without sequences all rows are one, and without a mask all are real",
          "[core][token_rows]") {
  TokenRows rows;
  rows.set("here", {}, 4);
  CHECK(rows.count() == 4);
  CHECK(rows.real() == 4);
  CHECK_FALSE(rows.has_padding());
  CHECK_FALSE(rows.is_padding(3));
  CHECK(groups(rows, Scope::kSequence) == Ranges{{0, 4}});
}

TEST_CASE("Rows keep padding and sequences of the pass", "[core][token_rows]") {
  TokenRows rows;
  {
    const Sequences sequences({2, 0, 3});
    const std::vector<std::uint8_t> mask = {1, 0, 1, 0, 1};
    rows.set("here", {.sequences = &sequences, .mask = mask}, 5);
  }  // The pass's own are gone.
  CHECK(rows.has_padding());
  CHECK(rows.is_padding(1));
  CHECK_FALSE(rows.is_padding(2));
  CHECK(rows.real() == 3);
  CHECK(rows.real(1, 4) == 1);
  CHECK(rows.real_sequences() == 2.0);  // One has no rows.
  CHECK(groups(rows, Scope::kBatch) == Ranges{{0, 5}});
  CHECK(groups(rows, Scope::kSequence) == Ranges{{0, 2}, {2, 2}, {2, 5}});

  std::vector<int> seen(5, 0);
  rows.for_each_real(1, [&](Index t) { ++seen[static_cast<std::size_t>(t)]; });
  CHECK(seen == std::vector<int>{1, 0, 1, 0, 1});

  const std::vector<std::uint8_t> padding_first = {0, 0, 1, 1, 1};
  const Sequences two({2, 3});
  rows.set("here", {.sequences = &two, .mask = padding_first}, 5);
  CHECK(rows.real_sequences() == 1.0);

  rows.set("here", {}, 0);
  CHECK(rows.count() == 0);
  CHECK(rows.real() == 0);
}

TEST_CASE("Rows refuse a pass that does not fit", "[core][token_rows]") {
  const std::vector<std::uint8_t> mask = {1, 0};
  TokenRows rows;
  CHECK(test::message_of<ShapeError>([&] { rows.set("MoELayer", {.mask = mask}, 3); }) ==
        "MoELayer: pass.mask has 2 entries, expected 3 (one per token)");
}

}  // namespace weir::token_rows_test
