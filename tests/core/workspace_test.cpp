// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>
#include <utility>

#include <weir/core/kept_pass.hpp>
#include <weir/core/workspace.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"

namespace weir::workspace_test {

namespace {

std::size_t place(const void* memory) {
  return reinterpret_cast<std::uintptr_t>(memory);
}

// Takes two matrices, the second in a function that is called meanwhile.
std::pair<double*, double*> two_matrices(Workspace& own, Index rows) {
  Workspace::Frame frame(own);
  auto outer = frame.matrix<double>(rows, 3);
  outer.setConstant(1.0);
  double* inner = nullptr;
  {
    Workspace::Frame called(own);
    auto matrix = called.matrix<double>(rows, 5);
    matrix.setConstant(2.0);
    inner = matrix.data();
  }
  CHECK(outer == Matrix<double>::Constant(rows, 3, 1.0));
  return {outer.data(), inner};
}

}  // namespace

TEST_CASE("Workspace hands out memory that nothing else uses, from the border of a cache line",
          "[core][workspace]") {
  Workspace workspace;
  Workspace::Frame frame(workspace);
  auto a = frame.matrix<double>(3, 5);
  const auto* bytes = frame.take<std::uint8_t>(1);
  auto b = frame.matrix<double>(100, 40);
  a.setConstant(1.0);
  b.setConstant(2.0);
  CHECK(a == Matrix<double>::Constant(3, 5, 1.0));
  CHECK(b == Matrix<double>::Constant(100, 40, 2.0));
  CHECK(place(a.data()) % 64 == 0);
  CHECK(place(bytes) % 64 == 0);
  CHECK(place(b.data()) % 64 == 0);
  CHECK(frame.matrix<double>(0, 4).size() == 0);
}

TEST_CASE("Workspace gives the memory of an ended function to the next", "[core][workspace]") {
  Workspace workspace;
  two_matrices(workspace, 50);  // Everything is in one piece from now on.
  const auto first = two_matrices(workspace, 50);
  CHECK(first.first + 152 == first.second);  // 150 numbers, up to the border of a cache line.
  CHECK(test::count_allocations([&] {
          CHECK(two_matrices(workspace, 50) == first);
          CHECK(two_matrices(workspace, 10).first == first.first);
        }) == 0);
  two_matrices(workspace, 70);
  CHECK(test::count_allocations([&] { two_matrices(workspace, 70); }) == 0);
}

TEST_CASE("A workspace that is lent takes the place of all others", "[core][workspace]") {
  Workspace model, first, second;
  {
    const Workspace::Lend lend(&model);
    two_matrices(first, 50);  // Everything is in one piece from now on.
    const auto of_first = two_matrices(first, 50);
    CHECK(two_matrices(second, 50).first == of_first.first);
    const Workspace::Lend none(nullptr);
    CHECK(two_matrices(first, 50).first != of_first.first);
  }
  CHECK(two_matrices(first, 50).first != two_matrices(second, 50).first);
}

TEST_CASE("A copy of a workspace is empty", "[core][workspace]") {
  if (!test::allocations_are_counted()) return;
  Workspace workspace;
  two_matrices(workspace, 50);
  Workspace copy = workspace;
  CHECK(test::count_allocations([&] { two_matrices(copy, 50); }) > 0);
  CHECK(two_matrices(copy, 50).first != two_matrices(workspace, 50).first);
  Workspace moved = std::move(copy);
  CHECK(test::count_allocations([&] { two_matrices(moved, 50); }) == 0);
}

TEST_CASE("A workspace whose memory ran out can be used again", "[core][workspace]") {
  if (!test::allocations_are_counted()) return;
  Workspace workspace;
  const long allocations = test::count_allocations([] {
    Workspace fresh;
    two_matrices(fresh, 50);
  });
  for (long nth = 1; nth <= allocations; ++nth) {
    Workspace starved;
    test::runs_out_of_memory(nth, [&] { two_matrices(starved, 50); });
    two_matrices(starved, 50);
    two_matrices(starved, 50);
    CHECK(test::count_allocations([&] { two_matrices(starved, 50); }) == 0);
  }
}

TEST_CASE("KeptPass owns what a pass points to", "[core][workspace]") {
  KeptPass kept;
  Rng rng(1);
  {
    const Sequences sequences({2, 3});
    const std::uint8_t mask[] = {1, 1, 0, 1, 1};
    const Index ids[] = {5, 6, 7, 8, 9};
    const std::uint8_t allowed[] = {1, 0};
    PassRecord record;
    kept.keep({.training = true,
               .sequences = &sequences,
               .mask = mask,
               .token_ids = ids,
               .allowed = allowed,
               .rng = &rng,
               .aux_scale = 0.5,
               .record = &record});
  }
  Rng again(2);
  const Pass pass = kept.again(&again);
  pass.check("test", 5);
  CHECK(pass.training);
  CHECK(pass.sequences->length(1) == 3);
  CHECK(pass.is_padding(2));
  CHECK(pass.token_ids[4] == 9);
  CHECK(pass.allowed[1] == 0);
  CHECK(pass.rng == &again);
  CHECK(pass.aux_scale == 0.5);
  CHECK(pass.record == nullptr);

  kept.keep({});
  CHECK(kept.again(nullptr).sequences == nullptr);
  CHECK(kept.again(nullptr).mask.empty());
  CHECK(kept.again(nullptr).rng == nullptr);
}

}  // namespace weir::workspace_test
