// SPDX-License-Identifier: MIT
#include <cmath>

#include <weir/attention/qk_norm.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

namespace weir::qk_norm_test {

TEST_CASE("HeadNorm is RmsNorm of each part of a row", "[attention][qk_norm]") {
  HeadNorm<double> norm(3, {.epsilon = 0.1});
  norm.weight().value = test::random_matrix(1, 3, 1);
  Matrix<double> x = test::random_matrix(5, 6, 2);
  const Matrix<double> before = x;
  HeadNorm<double>::Cache cache;
  norm.forward(x, Pass{}, cache);
  for (const Index head : {0, 3}) {
    for (Index t = 0; t < 5; ++t) {
      const auto row = before.row(t).segment(head, 3);
      const Matrix<double> expected =
          (row / std::sqrt(row.squaredNorm() / 3.0 + 0.1)).cwiseProduct(norm.weight().value);
      CHECK(test::relative_error(x.row(t).segment(head, 3), expected) <= 1e-15);
    }
  }
  Matrix<double> none(0, 6);
  norm.forward(none, kTraining, cache);
  norm.backward(none, cache);
  CHECK(none.rows() == 0);
}

TEST_CASE("HeadL2Norm gives each head a root mean square of one", "[attention][qk_norm][golden]") {
  // Root mean squares of 5 and sqrt(13 / 2).
  Matrix<double> x(1, 4);
  x << 5.0, -5.0, 2.0, 3.0;
  HeadL2Norm<double>::Cache cache;
  HeadL2Norm<double>(2, {.epsilon = 0.0}).forward(x, Pass{}, cache);
  CHECK(x(0, 0) == Approx(1.0));
  CHECK(x(0, 1) == Approx(-1.0));
  CHECK(x(0, 2) == Approx(2.0 / std::sqrt(6.5)));
  CHECK(x(0, 3) == Approx(3.0 / std::sqrt(6.5)));

  CHECK(cache.inverse.rows() == 0);  // Nothing is kept for `backward`.

  Matrix<double> zero = Matrix<double>::Zero(2, 4);
  HeadL2Norm<double>(2, {.epsilon = 1e-5}).forward(zero, Pass{}, cache);
  CHECK(zero.isZero(0.0));
}

TEST_CASE("HeadL2Norm gradient agrees with finite differences", "[attention][qk_norm][gradient]") {
  const auto dim = GENERATE(as<Index>{}, 1, 3, 20);
  const HeadL2Norm<double> norm(dim, {.epsilon = 0.2});
  Matrix<double> x = test::random_matrix(4, 2 * dim, 3);
  const Matrix<double> weight = test::random_matrix(4, 2 * dim, 4);
  HeadL2Norm<double>::Cache cache;
  const auto forward = [&] {
    Matrix<double> y = x;
    norm.forward(y, kTraining, cache);
    return y;
  };
  const Matrix<double> y = forward();
  Matrix<double> d = weight;
  norm.backward(y, d, cache);
  const auto objective = [&] { return forward().cwiseProduct(weight).sum(); };
  CHECK(test::relative_error(d, test::numeric_gradient(x, objective)) <= 1e-8);
}

}  // namespace weir::qk_norm_test
