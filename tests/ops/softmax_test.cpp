// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include <weir/ops/softmax.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::softmax_test {

TEMPLATE_TEST_CASE("Softmax rows are positive, sum to one and ignore a shift", "[ops][softmax]",
                   float, double) {
  using T = TestType;
  const auto cols = GENERATE(as<Index>{}, 1, 2, 7, 8, 15, 16, 17, 64, 101);
  const Matrix<T> logits = test::random_matrix<T>(5, cols, 1);
  const Matrix<T> p = softmax<T>(logits);

  CHECK(p.minCoeff() > T(0));
  for (Index t = 0; t < p.rows(); ++t) CHECK(p.row(t).sum() == Approx(1.0).epsilon(1e-6));
  const Matrix<T> shifted = logits.array() + T(100);
  CHECK(test::relative_error(softmax<T>(shifted), p) <= 1e-4);
}

TEST_CASE("Softmax matches a row worked out by hand", "[ops][softmax]") {
  // exp(log 1, log 2, log 5) = 1, 2, 5, whose sum is 8.
  Matrix<double> logits(1, 3);
  logits << std::log(1.0), std::log(2.0), std::log(5.0);
  const Matrix<double> p = softmax<double>(logits);

  CHECK(p(0, 0) == Approx(0.125));
  CHECK(p(0, 1) == Approx(0.25));
  CHECK(p(0, 2) == Approx(0.625));
}

TEMPLATE_TEST_CASE("Softmax survives extreme logits", "[ops][softmax]", float, double) {
  using T = TestType;
  const T infinity = std::numeric_limits<T>::infinity();
  Matrix<T> logits(4, 3);
  logits << T(1e4), T(0), T(-1e4), T(-1e4), T(-1e4), T(-1e4), T(0), -infinity, T(0), -infinity,
      T(-3e4), -infinity;
  const Matrix<T> p = softmax<T>(logits);

  CHECK(p.row(0) == RowVector<T>::Unit(3, 0));
  CHECK(p(1, 2) == Approx(1.0 / 3));
  CHECK(p(2, 0) == Approx(0.5));
  CHECK(p(2, 1) == T(0));
  CHECK(p.row(3) == RowVector<T>::Unit(3, 1));
}

TEST_CASE("A NaN among the logits is not hidden by softmax", "[ops][softmax]") {
  const auto where = GENERATE(as<Index>{}, 0, 9, 20);
  Matrix<float> logits = Matrix<float>::Zero(1, 21);
  logits(0, where) = std::nanf("");
  CHECK(softmax<float>(logits).array().isNaN().all());
}

TEST_CASE("Softmax works in place and on blocks", "[ops][softmax]") {
  const Matrix<double> logits = test::random_matrix(6, 40, 2);
  const Matrix<double> block = logits.block(1, 3, 4, 30);
  const Matrix<double> expected = softmax<double>(block);

  Matrix<double> inside = logits;
  softmax<double>(inside.block(1, 3, 4, 30), inside.block(1, 3, 4, 30));
  CHECK(inside.block(1, 3, 4, 30) == expected);
  CHECK(inside.row(0) == logits.row(0));
  CHECK(inside.col(33) == logits.col(33));
}

TEST_CASE("Softmax does not depend on where a row lies in memory", "[ops][softmax]") {
  const Matrix<float> logits = test::random_matrix<float>(1, 45, 3);
  const Matrix<float> expected = softmax<float>(logits);
  std::vector<float> memory(80);
  for (std::size_t shift = 0; shift < 16; ++shift) {
    std::copy_n(logits.data(), 45, memory.data() + shift);
    const std::span<float> row(memory.data() + shift, 45);
    softmax_row<float>(row, row);
    CHECK(std::equal(expected.data(), expected.data() + 45, memory.data() + shift));
  }
}

TEST_CASE("Softmax of nothing is nothing", "[ops][softmax]") {
  CHECK(softmax<float>(Matrix<float>(0, 4)).cols() == 4);
  CHECK(softmax<float>(Matrix<float>(4, 0)).rows() == 4);
  Matrix<float> none(4, 0);
  add_softmax_backward<float>(none, none, none);
}

TEST_CASE("Softmax backward agrees with finite differences and accumulates",
          "[ops][softmax][gradient]") {
  const auto cols = GENERATE(as<Index>{}, 1, 5, 19);
  Matrix<double> logits = test::random_matrix(4, cols, 4);
  const Matrix<double> dp = test::random_matrix(4, cols, 5);
  const Matrix<double> start = test::random_matrix(4, cols, 6);

  Matrix<double> d_logits = start;
  add_softmax_backward<double>(softmax<double>(logits), dp, d_logits);
  const Matrix<double> numeric = test::numeric_gradient(
      logits, [&] { return softmax<double>(logits).cwiseProduct(dp).sum(); });

  CHECK((d_logits - start - numeric).norm() <= 1e-8);
}

TEST_CASE("Softmax refuses shapes that differ", "[ops][softmax]") {
  const Matrix<float> p(2, 3);
  Matrix<float> narrow(2, 2);
  CHECK(test::message_of<ShapeError>([&] { softmax<float>(p, narrow); }) ==
        "softmax: p is [2, 2], expected [2, 3]");
  CHECK(test::message_of<ShapeError>([&] { add_softmax_backward<float>(p, narrow, narrow); }) ==
        "add_softmax_backward: dp is [2, 2], expected [2, 3]");
  CHECK(test::message_of<ShapeError>([&] { add_softmax_backward<float>(p, p, narrow); }) ==
        "add_softmax_backward: d_logits is [2, 2], expected [2, 3]");
}

}  // namespace weir::softmax_test
