// SPDX-License-Identifier: MIT
#include <cstdint>
#include <vector>

#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

using namespace weir;

static_assert(CapacityPolicy<Dropless, float>);

TEST_CASE("Dropless keeps every assignment, even all to one expert", "[moe][dropless]") {
  const auto tokens = GENERATE(as<Index>{}, 0, 1, 100);
  Matrix<double> logits = Matrix<double>::Zero(tokens, 8);
  logits.col(5).setOnes();
  Routing<double> routing;
  TopKSoftmax<double>{1}.select(logits, {}, routing);
  const std::vector<double> weight = routing.weight;

  Dropless{}.check();
  Dropless{}.apply(routing);
  CHECK(routing.kept == std::vector<std::uint8_t>(static_cast<std::size_t>(tokens), 1));
  CHECK(routing.expert == std::vector<Index>(static_cast<std::size_t>(tokens), 5));
  CHECK(routing.weight == weight);
  CHECK_FALSE(routing.pass_dropped);
}
