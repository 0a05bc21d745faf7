// SPDX-License-Identifier: MIT
#include <weir/core/scratch.hpp>

#include "support/catch.hpp"

using namespace weir;

TEST_CASE("Scratch keeps its memory when it shrinks and grows back", "[core][scratch]") {
  Scratch<float> scratch;
  CHECK(scratch.view().size() == 0);
  scratch.reshape(4, 5).setConstant(1.0F);
  const float* memory = scratch.data();
  auto smaller = scratch.reshape(2, 5);
  CHECK(smaller.rows() == 2);
  CHECK(scratch.data() == memory);
  CHECK(scratch.reshape(5, 4).data() == memory);
  CHECK(scratch.view().rows() == 5);
  CHECK(scratch.reshape(0, 4).size() == 0);
}
