// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>

#include <weir/ops/unit_rows.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/threads.hpp"

namespace weir::unit_rows_test {

TEST_CASE("unit_rows scales each row to length one and says how long it was", "[ops][unit_rows]") {
  Matrix<double> rows(4, 2);
  rows << 3.0, -4.0, 3e-300, 4e-300, 0.0, 0.0, 1e-310, 0.0;
  Matrix<double> unit(4, 2);
  RowVector<double> norm(4);
  unit_rows<double>(rows, unit, norm.data());
  CHECK(unit(0, 0) == Approx(0.6));
  CHECK(unit(0, 1) == Approx(-0.8));
  CHECK(norm[0] == Approx(5.0));
  CHECK(unit(1, 0) == Approx(0.6));
  CHECK(unit(1, 1) == Approx(0.8));
  CHECK(norm[1] == Approx(5e-300));
  CHECK(unit.bottomRows(2).isZero(0.0));  // Below 2.2e-308 a row counts as zero.
  CHECK(norm.tail(2).isZero(0.0));
}

TEST_CASE("unit_rows gradient agrees with finite differences", "[ops][unit_rows][gradient]") {
  const Index cols = GENERATE(1, 3, 8, 33);
  Matrix<double> rows = test::random_matrix(5, cols, 1);
  const Matrix<double> weight = test::random_matrix(5, cols, 2);
  Matrix<double> unit(5, cols);
  RowVector<double> norm(5);
  const auto objective = [&] {
    unit_rows<double>(rows, unit, norm.data());
    return unit.cwiseProduct(weight).sum();
  };
  objective();
  Matrix<double> d = weight;
  unit_rows_backward<double>(unit, norm.data(), d);
  const Matrix<double> numeric = test::numeric_gradient(rows, objective);
  CHECK((d - numeric).norm() <= 1e-6 * weight.norm());

  rows.row(2).setZero();
  objective();
  d = weight;
  unit_rows_backward<double>(unit, norm.data(), d);
  CHECK(d.row(2).isZero(0.0));
}

TEST_CASE("unit_rows gives the same bits on any number of threads", "[ops][unit_rows]") {
  const Matrix<float> rows = test::random_matrix<float>(200, 65, 3);
  const auto run = [&](int threads) {
    const test::Threads set(threads);
    Matrix<float> both(400, 65);
    RowVector<float> norm(200);
    unit_rows<float>(rows, both.topRows(200), norm.data());
    both.bottomRows(200) = rows.reverse();
    unit_rows_backward<float>(both.topRows(200), norm.data(), both.bottomRows(200));
    return both;
  };
  CHECK(run(1) == run(3));
}

TEST_CASE("unit_rows refuses other shapes", "[ops][unit_rows]") {
  const Matrix<double> rows(2, 3);
  Matrix<double> wrong(2, 4);
  RowVector<double> norm(2);
  CHECK(test::message_of<ShapeError>([&] { unit_rows<double>(rows, wrong, norm.data()); }) ==
        "unit_rows: unit is [2, 4], expected [2, 3]");
  CHECK(test::message_of<ShapeError>([&] {
          unit_rows_backward<double>(rows, norm.data(), wrong);
        }) == "unit_rows_backward: d is [2, 4], expected [2, 3]");
}

TEST_CASE("unit_rows takes rows of any scale that has a norm", "[ops][unit_rows]") {
  Matrix<float> rows(5, 4);
  rows << 3e30f, -4e30f, 0.0f, 0.0f,     //
      1e38f, 1e38f, 1e38f, 1e38f,        //
      3e-11f, 0.0f, 4e-11f, 0.0f,        //
      -3.4e38f, 3.4e38f, 0.0f, 3.4e38f,  // Its norm is beyond the largest number.
      0.0f, 1.2e-38f, 0.0f, 0.0f;        // The least norm that is one.
  Matrix<float> unit(5, 4);
  RowVector<float> norm(5);
  unit_rows<float>(rows, unit, norm.data());
  CHECK(unit(0, 0) == Approx(0.6f));
  CHECK(unit(0, 1) == Approx(-0.8f));
  CHECK(norm[0] == Approx(5e30f));
  CHECK(unit(1, 2) == Approx(0.5f));
  CHECK(norm[1] == Approx(2e38f));
  CHECK(unit(2, 0) == Approx(0.6f));
  CHECK(unit(2, 2) == Approx(0.8f));
  CHECK(norm[2] == Approx(5e-11f));
  CHECK(unit(4, 1) == Approx(1.0f));
  CHECK(unit.allFinite());
  CHECK(norm.allFinite());
  Matrix<float> d = Matrix<float>::Ones(5, 4);
  unit_rows_backward<float>(unit, norm.data(), d);
  CHECK(d.allFinite());
}

TEST_CASE("safe_norm is the norm of numbers of any scale", "[ops][unit_rows]") {
  const double numbers[] = {3.0, 0.0, -4.0};
  for (const double scale : {1.0, 1e-300, 1e-160, 1e155, 1e300, 4.5e307}) {
    const double scaled[] = {3.0 * scale, 0.0, -4.0 * scale};
    const double limit = std::numeric_limits<double>::max();
    CHECK(safe_norm<double>(3, scaled) == Approx(std::min(5.0 * scale, limit)).epsilon(1e-15));
  }
  CHECK(safe_norm<double>(3, numbers) == 5.0);
  CHECK(safe_norm<double>(0, numbers) == 0.0);
  const double infinite[] = {1.0, -std::numeric_limits<double>::infinity()};
  CHECK(safe_norm<double>(2, infinite) == std::numeric_limits<double>::infinity());
}

}  // namespace weir::unit_rows_test
