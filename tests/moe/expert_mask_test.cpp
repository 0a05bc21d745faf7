// SPDX-License-Identifier: MIT
#include <cstdint>
#include <vector>

#include <weir/moe/expert_mask.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::expert_mask_test {

namespace {

using Mask = std::vector<std::uint8_t>;
using Indices = std::vector<Index>;

const Mask kTable = {1, 1, 0, 0, 1, 1};  // Two modalities, three experts.

}  // namespace

TEST_CASE("All experts but those that are excluded", "[moe][expert_mask]") {
  CHECK(all_but(4, Indices{2, 0, 2}) == Mask{0, 1, 0, 1});
  CHECK(all_but(2, {}) == Mask{1, 1});
  CHECK(all_but(1, Indices{0}) == Mask{0});
}

TEST_CASE("Each token has the experts of its modality", "[moe][expert_mask]") {
  CHECK(modality_mask(Indices{1, 0}, kTable, 3) == Mask{0, 1, 1, 1, 1, 0});
  CHECK(modality_mask(Indices{1, -7, 0}, kTable, 3, Mask{1, 0, 1}) ==
        Mask{0, 1, 1, 0, 0, 0, 1, 1, 0});
  CHECK(modality_mask({}, kTable, 3).empty());
}

TEST_CASE("Expert masks name what does not fit", "[moe][expert_mask]") {
  const auto config = [](auto action) { return test::message_of<ConfigError>(action); };
  CHECK(config([] { all_but(0, {}); }) == "all_but: experts = 0, expected >= 1");
  CHECK(config([] {
          all_but(4, Indices{1, 4});
        }) == "all_but: excluded[1] = 4, expected 0 <= excluded < experts = 4");
  CHECK(config([] { all_but(4, Indices{-1}); }) ==
        "all_but: excluded[0] = -1, expected 0 <= excluded < experts = 4");
  CHECK(config([] { modality_mask({}, {}, 0); }) == "modality_mask: experts = 0, expected >= 1");
  CHECK(config([] {
          modality_mask(Indices{0, 2}, kTable, 3);
        }) == "modality_mask: modality[1] = 2, expected 0 <= modality < 2, the rows of the table");
  const auto shape = [](auto action) { return test::message_of<ShapeError>(action); };
  CHECK(shape([] { modality_mask(Indices{0}, kTable, 4); }) ==
        "modality_mask: the table has 6 entries, expected a multiple of experts = 4");
  CHECK(shape([] {
          modality_mask(Indices{0}, kTable, 3, Mask{1, 1});
        }) == "modality_mask: mask has 2 entries, expected 1 (one per token)");
}

}  // namespace weir::expert_mask_test
