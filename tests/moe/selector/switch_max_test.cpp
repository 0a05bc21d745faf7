// SPDX-License-Identifier: MIT
// Mesh TensorFlow's "switch_max" (moe.py, `_switch_max_gating`) is no selector of its own: tokens
// pick their best expert, and each expert keeps those of largest gate. Not causal.
#include <algorithm>
#include <cstdint>
#include <vector>

#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::switch_max_test {

namespace {

Routing<double> switch_max(const Matrix<double>& logits) {
  Routing<double> routing = test::route(SoftmaxTopK<double>({.k = 1}), logits, kTraining);
  test::limit(CapacityFactor({.train = 1.0,
                              .count_k = false,
                              .rounding = Rounding::kDown,
                              .minimum = 1,
                              .order = DropOrder::kProbability}),
              routing, kTraining);
  return routing;
}

}  // namespace

TEST_CASE("Switch-max keeps of each expert's tokens those of largest gate",
          "[moe][selector][switch_max]") {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const Matrix<double> logits = test::random_matrix(17, 4, seed);
    const Routing<double> routing = switch_max(logits);
    REQUIRE(routing.assignments() == 17);
    for (Index t = 0; t < 17; ++t) {
      Index better = 0;
      for (Index u = 0; u < 17; ++u) {
        better += routing.expert[u] == routing.expert[t] && routing.weight[u] > routing.weight[t];
      }
      CHECK(static_cast<bool>(routing.kept[t]) == (better < 4));
    }
  }
}

TEST_CASE("Switch-max is not causal: a later token takes an earlier one's place",
          "[moe][selector][switch_max]") {
  Matrix<double> logits(2, 2);
  logits << 1.0, 0.0, 0.0, 1.0;
  CHECK(switch_max(logits).kept[0] == 1);
  logits.row(1) << 2.0, 0.0;
  CHECK(switch_max(logits).kept[0] == 0);
}

}  // namespace weir::switch_max_test
