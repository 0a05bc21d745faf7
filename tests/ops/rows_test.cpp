// SPDX-License-Identifier: MIT
#include <limits>

#include <weir/ops/rows.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::rows_test {

TEMPLATE_TEST_CASE("Rows are copied, scaled, added and summed alike by any number of threads",
                   "[ops][rows]", float, double) {
  using T = TestType;
  const auto rows = GENERATE(as<Index>{}, 0, 1, 15, 16, 17, 700, 1500);
  const auto cols = GENERATE(as<Index>{}, 1, 9, 130);
  const Matrix<T> a = test::random_matrix<T>(rows, cols, 1);
  const Matrix<T> b = test::random_matrix<T>(rows, cols, 2);

  const auto column_sums = [&](int threads) {
    const test::Threads scope(threads);
    Matrix<T> copy, scaled, product, sum(rows, cols), raised(a);
    copy_rows<T>(a, copy);
    scale_rows<T>(T(-0.5), a, scaled);
    multiply_rows<T>(a, b, product);
    add_rows<T>(a, b, sum);
    const RowVector<T> row = test::random_matrix<T>(1, cols, 3).row(0);
    add_to_each_row<T>(row.data(), raised);
    CHECK(copy == a);
    CHECK(scaled == T(-0.5) * a);
    CHECK(product == a.cwiseProduct(b));
    CHECK(sum == a + b);
    CHECK(raised == a.rowwise() + row);

    RowVector<T> sums = RowVector<T>::Ones(cols);
    Scratch<T> of_runs;
    sum_runs_of_rows<T>(rows, cols, of_runs,
                        [&](Index t, T* to) { loops::add<T>(cols, to, &a(t, 0), to); });
    add_rows_to<T>(of_runs.view(), sums.data());
    return sums;
  };
  const RowVector<T> sums = column_sums(1);
  const RowVector<T> expected = a.colwise().sum().array() + T(1);
  CHECK((sums - expected).norm() <= T(rows + 1) * std::numeric_limits<T>::epsilon() * T(cols));
  CHECK(column_sums(2) == sums);
  CHECK(column_sums(3) == sums);
}

TEST_CASE("Sums over rows are added to what was there, for any width", "[ops][rows]") {
  const auto cols = GENERATE(as<Index>{}, 1, 16, 33, 64, 65, 200);
  const auto rows = GENERATE(as<Index>{}, 0, 1, 50, 1500);  // The last in several ranges.
  const Matrix<double> x = test::random_matrix(rows, cols, 3);
  Matrix<double> sums = Matrix<double>::Ones(1, cols);
  add_over_rows<double>(rows, cols, sums.data(), [&](Index t, Index col, Index count) {
    return load_lanes<double>(&x(t, col), count);
  });
  const Matrix<double> expected = x.colwise().sum().array() + 1.0;
  CHECK(test::relative_error(sums, expected) <= 1e-13);
}

TEST_CASE("Pieces cover a matrix once", "[ops][rows]") {
  const auto cols = GENERATE(as<Index>{}, 0, 1, 1023, 1024, 1025, 3000);
  Matrix<double> seen = Matrix<double>::Zero(3, cols);
  parallel_pieces(3, cols, 1, [&](Index t, Index col, Index count) {
    for (Index j = col; j < col + count; ++j) seen(t, j) += 1.0;
  });
  CHECK(seen == Matrix<double>::Ones(3, cols));
}

}  // namespace weir::rows_test
