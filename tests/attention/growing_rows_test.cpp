// SPDX-License-Identifier: MIT
#include <weir/attention/growing_rows.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

using namespace weir;

TEST_CASE("GrowingRows holds the rows it was given, in order", "[attention][growing_rows]") {
  const Matrix<double> rows = test::random_matrix(7, 5, 1);
  GrowingRows<double> grown;
  CHECK(grown.empty());
  CHECK(grown.capacity() == 0);
  grown.append(rows.topRows(2));
  grown.append(rows.middleRows(2, 0));
  grown.append(rows.bottomRows(5).leftCols(3), rows.bottomRows(5).rightCols(2));
  CHECK(grown.count() == 7);
  CHECK(grown.width() == 5);
  CHECK(grown.view() == rows);

  const GrowingRows<double> copy = grown;
  grown.truncate(3);
  CHECK(grown.view() == rows.topRows(3));
  CHECK(copy.view() == rows);
  grown.truncate(0);
  grown.append(rows.leftCols(2));  // Another width, now that it is empty.
  CHECK(grown.view() == rows.leftCols(2));
}

TEST_CASE("GrowingRows lets go of rows at the front", "[attention][growing_rows]") {
  const Matrix<double> rows = test::random_matrix(100, 3, 2);
  GrowingRows<double> grown;
  grown.append(rows);
  grown.drop_front(10, 90);
  CHECK(grown.view() == rows.bottomRows(90));
  CHECK(grown.capacity() >= 100);
  grown.drop_front(80, 12);  // Far more room than for 12 rows: it is given up.
  CHECK(grown.view() == rows.bottomRows(10));
  CHECK(grown.capacity() == 12);
  grown.append(rows.topRows(3), 12);
  CHECK(grown.capacity() == 15);
}

TEST_CASE("GrowingRows allocates nothing in what was reserved", "[attention][growing_rows]") {
  const Matrix<float> rows = test::random_matrix<float>(20, 4, 3);
  GrowingRows<float> grown;
  grown.append(rows.topRows(1));
  grown.reserve(60);
  CHECK(test::count_allocations([&] {
          for (int i = 0; i < 2; ++i) grown.append(rows);
        }) == 0);
  CHECK(grown.count() == 41);
}
