// SPDX-License-Identifier: MIT
#include <type_traits>
#include <vector>

#include <weir/kernels/head_blocks.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::head_blocks_test {
using kernels::HeadBlocks;

namespace {

template <class T>
struct Case {
  Index heads, tokens, rows, cols;
  typename HeadBlocks<T>::Side side;
  Matrix<T> weight = test::random_matrix<T>(heads * rows, cols, 1);
  Matrix<T> x = test::random_matrix<T>(heads * tokens, transposed() ? rows : cols, 2);

  bool transposed() const { return side == HeadBlocks<T>::Side::kTransposed; }
  Index out() const { return transposed() ? cols : rows; }

  /// `width` columns for each head, all 7 where nothing was set.
  Matrix<T> product(Storage storage, Index width) const {
    HeadBlocks<T> blocks(heads, side);
    blocks.set_storage(weight, storage);
    std::vector<Product<T>> plain;
    Matrix<T> y = Matrix<T>::Constant(tokens, heads * width, T(7));
    // Packed, the weight as a whole is not looked at.
    blocks.multiply(x, storage == Storage::kTrainable ? weight : Matrix<T>(), y, width, plain);
    return y;
  }

  Matrix<T> expected(Index width) const {
    Matrix<T> y = Matrix<T>::Constant(tokens, heads * width, T(7));
    for (Index h = 0; h < heads; ++h) {
      const Matrix<T> block = weight.middleRows(h * rows, rows);
      const Matrix<T> own = x.middleRows(h * tokens, tokens);
      y.middleCols(h * width, out()) =
          transposed() ? Matrix<T>(own * block) : Matrix<T>(own * block.transpose());
    }
    return y;
  }
};

}  // namespace

TEMPLATE_TEST_CASE("HeadBlocks multiplies each head's rows with its block of the weight",
                   "[kernels][head_blocks]", float, double) {
  using T = TestType;
  using Side = typename HeadBlocks<T>::Side;
  const double kSame = std::is_same_v<T, float> ? 1e-6 : 1e-14;
  const auto side = GENERATE(Side::kRows, Side::kTransposed);
  const auto tokens = GENERATE(as<Index>{}, 0, 1, 5, 70);
  const auto heads = GENERATE(as<Index>{}, 1, 3);
  const Case<T> c{heads, tokens, 19, 33, side};
  for (const Index room : {0, 4}) {
    const Index width = c.out() + room;
    const Matrix<T> expected = c.expected(width);
    CHECK(test::relative_error(c.product(Storage::kTrainable, width), expected) <= kSame);
    CHECK(test::relative_error(c.product(Storage::kPacked, width), expected) <= kSame);
    CHECK(test::relative_error(c.product(Storage::kBfloat16, width), expected) <= 1e-2);
  }
}

TEST_CASE("HeadBlocks forgets packed blocks when they are trainable again",
          "[kernels][head_blocks]") {
  HeadBlocks<double> blocks(1, HeadBlocks<double>::Side::kRows);
  blocks.set_storage(Matrix<double>::Constant(1, 1, 2.0), Storage::kPacked);
  blocks.set_storage(Matrix<double>::Constant(1, 1, 3.0), Storage::kTrainable);
  std::vector<Product<double>> plain;
  Matrix<double> y(1, 1);
  blocks.multiply(Matrix<double>::Ones(1, 1), Matrix<double>::Constant(1, 1, 4.0), y, 1, plain);
  CHECK(y(0, 0) == 4.0);
}

TEST_CASE("Packed blocks of all heads share one memory, which copies keep",
          "[kernels][head_blocks]") {
  using Side = HeadBlocks<float>::Side;
  const auto side = GENERATE(Side::kRows, Side::kTransposed);
  const auto storage = GENERATE(Storage::kPacked, Storage::kBfloat16);
  const Case<float> c{9, 5, 19, 33, side};
  HeadBlocks<float> blocks(c.heads, side), one(1, side);
  const long of_one = test::count_allocations([&] { one.set_storage(c.weight, storage); });
  CHECK(test::count_allocations([&] { blocks.set_storage(c.weight, storage); }) == of_one);

  std::vector<Product<float>> plain;
  const auto product = [&](const HeadBlocks<float>& of) {
    Matrix<float> y(c.tokens, c.heads * c.out());
    of.multiply(c.x, {}, y, c.out(), plain);
    return y;
  };
  const HeadBlocks<float> copy = blocks;
  const Matrix<float> before = product(copy);
  blocks.set_storage(2.F * c.weight,
                     storage == Storage::kPacked ? Storage::kBfloat16 : Storage::kPacked);
  CHECK(product(copy) == before);
  CHECK(test::relative_error(product(blocks), 2.F * before) < 1e-2);
  blocks.set_storage(c.weight, Storage::kTrainable);
  CHECK(product(copy) == before);
}

TEST_CASE("HeadBlocks gives the same bits on any number of threads, and asks for no memory again",
          "[kernels][head_blocks][parallel]") {
  const auto storage = GENERATE(Storage::kTrainable, Storage::kPacked, Storage::kBfloat16);
  const auto tokens = GENERATE(as<Index>{}, 1, 3, 40);
  const Case<float> c{4, tokens, 100, 130, HeadBlocks<float>::Side::kTransposed};
  const Matrix<float> one = c.product(storage, 130);
  {
    const test::Threads threads(3);
    CHECK(c.product(storage, 130) == one);
  }
  HeadBlocks<float> blocks(c.heads, c.side);
  blocks.set_storage(c.weight, storage);
  std::vector<Product<float>> plain;
  Matrix<float> y(tokens, 4 * 130);
  const auto multiply = [&] { blocks.multiply(c.x, c.weight, y, 130, plain); };
  multiply();
  CHECK((test::count_allocations(multiply) == 0 || !test::allocations_are_counted()));
}

}  // namespace weir::head_blocks_test
