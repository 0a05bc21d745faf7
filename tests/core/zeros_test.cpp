// SPDX-License-Identifier: MIT
#include <weir/core/parallel.hpp>
#include <weir/core/zeros.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"

namespace weir::zeros_test {

TEST_CASE("Every number becomes zero, also the last of an odd size", "[core][zeros]") {
  const auto threads = GENERATE(1, 3);
  const test::Threads set(threads);
  for (const Index size : {1, 2, 4095, 4096, 4097, 8191, 8193, 20000}) {
    Matrix<float> matrix = Matrix<float>::Ones(1, size);
    set_zero_in_parallel(matrix);
    CHECK(matrix.isZero(0.0F));
    set_zero_in_parallel(matrix, size, 3);
    CHECK(matrix.rows() == size);
    CHECK(matrix.cols() == 3);
    CHECK(matrix.isZero(0.0F));
  }
}

}  // namespace weir::zeros_test
