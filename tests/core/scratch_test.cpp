// SPDX-License-Identifier: MIT
#include <utility>

#include <weir/core/scratch.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"

namespace weir::scratch_test {

TEST_CASE("Scratch keeps its memory when it shrinks and grows back", "[core][scratch]") {
  Scratch<float> scratch;
  CHECK(scratch.rows() == 0);
  CHECK(scratch.cols() == 0);
  scratch.reshape(4, 5).setConstant(1.0F);
  const float* memory = scratch.data();
  auto smaller = scratch.reshape(2, 5);
  CHECK(smaller.rows() == 2);
  CHECK(scratch.data() == memory);
  CHECK(scratch.reshape(5, 4).data() == memory);
  CHECK(scratch.view().rows() == 5);
  CHECK(scratch.reshape(0, 4).size() == 0);
}

TEST_CASE("Scratch is copied with what it holds, and moved", "[core][scratch]") {
  Scratch<float> scratch;
  scratch.reshape(2, 3) << 1, 2, 3, 4, 5, 6;
  Scratch<float> copy = scratch;
  CHECK(copy.view() == scratch.view());
  CHECK(copy.data() != scratch.data());
  copy.view().setZero();
  CHECK(scratch.view()(1, 2) == 6.0F);
  copy = scratch;
  CHECK(copy.view() == scratch.view());
  const float* const memory = scratch.data();
  Scratch<float> moved = std::move(scratch);
  CHECK(moved.data() == memory);
  CHECK(moved.view()(1, 2) == 6.0F);
  copy = Scratch<float>();
  CHECK(copy.view().size() == 0);
  copy = std::move(moved);
  CHECK(copy.data() == memory);
  CHECK(copy.cols() == 3);
}

TEST_CASE("Scratch is empty after its memory ran out, and can be used", "[core][scratch]") {
  if (!test::allocations_are_counted()) return;
  Scratch<float> scratch;
  scratch.reshape(2, 3);
  CHECK(test::runs_out_of_memory(1, [&] { scratch.reshape(20, 30); }));
  CHECK(scratch.rows() == 0);
  CHECK(scratch.cols() == 0);
  scratch.reshape(2, 3).setConstant(1.0F);
  CHECK(scratch.view()(1, 2) == 1.0F);
}

}  // namespace weir::scratch_test
