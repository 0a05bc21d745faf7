// SPDX-License-Identifier: MIT
#include <cstdint>

#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/catch.hpp"
#include "support/routing.hpp"

namespace weir::dropless_test {

static_assert(CapacityPolicy<Dropless, float>);

TEST_CASE("Dropless keeps every assignment, even all to one expert", "[moe][dropless]") {
  const auto tokens = GENERATE(as<Index>{}, 0, 1, 100);
  Matrix<double> logits = Matrix<double>::Zero(tokens, 8);
  logits.col(5).setOnes();
  Routing<double> routing = test::route(TopKSoftmax<double>({.k = 1}), logits);
  const List<double> weight = routing.weight;

  Dropless().check();
  test::limit(Dropless(), routing);
  CHECK(routing.kept == List<std::uint8_t>(tokens, 1));
  CHECK(routing.expert == List<Index>(tokens, 5));
  CHECK(routing.weight == weight);
  CHECK(routing.applied.empty());
}

}  // namespace weir::dropless_test
