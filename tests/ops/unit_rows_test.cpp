// SPDX-License-Identifier: MIT
#include <cmath>

#include <weir/ops/unit_rows.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/threads.hpp"

using namespace weir;

TEST_CASE("unit_rows scales each row to length one and says how long it was", "[ops][unit_rows]") {
  Matrix<double> rows(3, 2);
  rows << 3.0, -4.0, 0.0, 0.0, 1e-13, 0.0;
  Matrix<double> unit(3, 2);
  RowVector<double> norm(3);
  unit_rows<double>(rows, unit, norm.data());
  CHECK(unit(0, 0) == Approx(0.6));
  CHECK(unit(0, 1) == Approx(-0.8));
  CHECK(norm[0] == Approx(5.0));
  CHECK(unit.bottomRows(2).isZero(0.0));  // Below 1e-12 a row counts as zero.
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
