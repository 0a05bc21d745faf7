// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <limits>

#include <weir/ops/clamp.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::clamp_test {

TEST_CASE("clamp keeps numbers within bounds, and the gradient of those that were",
          "[ops][clamp][golden]") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Matrix<double> x(1, 6);
  x << -9.0, -2.0, 0.5, 2.0, HUGE_VAL, nan;
  Matrix<double> inferred = x;
  List<std::uint8_t> outside;
  clamp_forward(2.0, x, &outside);
  CHECK(x(0, 0) == -2.0);
  CHECK(x(0, 1) == -2.0);
  CHECK(x(0, 2) == 0.5);
  CHECK(x(0, 3) == 2.0);
  CHECK(x(0, 4) == 2.0);
  CHECK(std::isnan(x(0, 5)));
  clamp_forward(2.0, inferred, nullptr);
  CHECK(inferred.leftCols(5) == x.leftCols(5));
  CHECK(std::isnan(inferred(0, 5)));

  Matrix<double> d = Matrix<double>::Ones(1, 6);
  clamp_backward(outside, d);
  Matrix<double> expected(1, 6);
  expected << 0.0, 1.0, 1.0, 1.0, 0.0, 1.0;
  CHECK(d == expected);
}

TEST_CASE("clamp is right for many numbers, on any number of threads", "[ops][clamp][parallel]") {
  const Matrix<float> before = 3.0F * test::random_matrix<float>(70, 130, 1);
  const auto run = [&] {
    Matrix<float> x = before;
    List<std::uint8_t> outside;
    clamp_forward(0.5, x, &outside);
    Matrix<float> d = Matrix<float>::Ones(70, 130);
    clamp_backward(outside, d);
    CHECK(x == before.cwiseMax(-0.5F).cwiseMin(0.5F));
    CHECK(d == (before.array().abs() <= 0.5F).cast<float>().matrix());
  };
  run();
  const test::Threads threads(2);
  run();
}

TEST_CASE("clamp takes no tokens", "[ops][clamp]") {
  Matrix<double> none(0, 4);
  List<std::uint8_t> outside = {1};
  clamp_forward(1.0, none, &outside);
  clamp_backward(outside, none);
  CHECK(outside.empty());
}

}  // namespace weir::clamp_test
