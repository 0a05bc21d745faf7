// SPDX-License-Identifier: MIT
#include <utility>
#include <vector>

#include <weir/attention/paged_rows.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::paged_rows_test {

namespace {

constexpr Index kPage = PagedRows<double>::kPage;

// Which pages two have in common.
Index common_pages(const PagedRows<double>& a, const PagedRows<double>& b) {
  Index common = 0;
  for (const auto& page : a.pages()) {
    for (const auto& other : b.pages()) common += page == other ? 1 : 0;
  }
  return common;
}

}  // namespace

TEST_CASE("PagedRows holds the rows it was given, in order", "[attention][paged_rows]") {
  const Matrix<double> rows = test::random_matrix(3 * kPage + 7, 5, 1);
  PagedRows<double> grown;
  CHECK(grown.empty());
  CHECK(grown.capacity() == 0);
  CHECK(grown.matrix().rows() == 0);
  grown.append(rows.topRows(2));
  grown.append(rows.middleRows(2, 0));
  grown.append(rows.bottomRows(rows.rows() - 2).leftCols(3),
               rows.bottomRows(rows.rows() - 2).rightCols(2));
  CHECK(grown.count() == rows.rows());
  CHECK(grown.width() == 5);
  CHECK(grown.matrix() == rows);
  CHECK(grown.capacity() == 4 * kPage);
  CHECK(grown.pages()[2].get()[5] == rows(2 * kPage + 1, 0));

  grown.truncate(0);
  grown.append(rows.leftCols(2));  // Another width, now that it is empty.
  CHECK(grown.matrix() == rows.leftCols(2));
}

TEST_CASE("Copies of PagedRows share the pages that neither writes to", "[attention][paged_rows]") {
  const Matrix<double> rows = test::random_matrix(2 * kPage + 10, 4, 2);
  const Matrix<double> more = test::random_matrix(kPage, 4, 3);
  PagedRows<double> prefix;
  prefix.append(rows);
  PagedRows<double> first = prefix;
  PagedRows<double> second = prefix;
  CHECK(common_pages(first, second) == 3);
  first.append(more);
  second.append(more.topRows(1));
  CHECK(common_pages(first, prefix) == 2);
  CHECK(common_pages(first, second) == 2);

  Matrix<double> expected(rows.rows() + more.rows(), 4);
  expected << rows, more;
  CHECK(first.matrix() == expected);
  CHECK(second.matrix() == expected.topRows(rows.rows() + 1));
  CHECK(prefix.matrix() == rows);
  prefix.append(more.bottomRows(3));
  CHECK(prefix.matrix().topRows(rows.rows()) == rows);
  CHECK(prefix.matrix().bottomRows(3) == more.bottomRows(3));
  CHECK(second.matrix() == expected.topRows(rows.rows() + 1));

  // What was taken back is not written to while another has it.
  PagedRows<double> cut = first;
  cut.truncate(kPage + 5);
  cut.append(more);
  CHECK(first.matrix() == expected);
  CHECK(cut.matrix().topRows(kPage + 5) == rows.topRows(kPage + 5));
  CHECK(cut.matrix().bottomRows(kPage) == more);
  CHECK(common_pages(cut, first) == 2);  // The first one, and one that holds nothing of it now.

  // A copy holds no page that it does not need.
  first.truncate(5);
  const PagedRows<double> small = first;
  CHECK(small.capacity() == kPage);
  const PagedRows<double> moved = std::move(first);
  CHECK(moved.matrix() == rows.topRows(5));
  CHECK(first.empty());  // NOLINT(bugprone-use-after-move)
  first = moved;
  CHECK(first.matrix() == rows.topRows(5));
}

TEST_CASE("A page that is no longer shared is written to as it is", "[attention][paged_rows]") {
  const Matrix<double> rows = test::random_matrix(10, 4, 4);
  PagedRows<double> prefix;
  prefix.append(rows);
  const double* const page = prefix.pages()[0].get();
  { const PagedRows<double> copy = prefix; }
  CHECK(test::count_allocations([&] { prefix.append(rows); }) == 0);
  CHECK(prefix.pages()[0].get() == page);
}

TEST_CASE("PagedRows lets go of pages at the front", "[attention][paged_rows]") {
  const Matrix<double> rows = test::random_matrix(3 * kPage + 5, 3, 5);
  PagedRows<double> grown;
  grown.append(rows);
  const PagedRows<double> copy = grown;
  grown.append(rows.topRows(1));
  grown.drop_front(2);
  CHECK(grown.count() == kPage + 6);
  CHECK(grown.matrix().topRows(kPage + 5) == rows.bottomRows(kPage + 5));
  CHECK(copy.matrix() == rows);
  CHECK(grown.capacity() == 2 * kPage);  // The others belong to the copy.

  PagedRows<double> alone;
  alone.append(rows);
  alone.drop_front(2);
  CHECK(alone.capacity() == 4 * kPage);
  CHECK(test::count_allocations([&] {
          alone.append(rows.topRows(kPage));
          alone.drop_front(1);
          alone.append(rows.topRows(kPage));
        }) == 0);
  CHECK(alone.matrix().topRows(5) == rows.bottomRows(5));
  CHECK(alone.matrix().bottomRows(kPage) == rows.topRows(kPage));

  PagedRows<double> prompt;
  prompt.append(test::random_matrix(50 * kPage, 3, 6));
  prompt.drop_front(49);
  CHECK(prompt.capacity() == 2 * kPage);
}

TEST_CASE("PagedRows allocates nothing in what was reserved", "[attention][paged_rows]") {
  const Matrix<double> rows = test::random_matrix(2 * kPage, 4, 7);
  PagedRows<double> grown;
  grown.reserve(5);  // The width is not known.
  CHECK(grown.capacity() == 0);
  grown.append(rows.topRows(1));
  grown.reserve(4 * kPage + 1);
  CHECK(test::count_allocations([&] {
          for (int i = 0; i < 2; ++i) grown.append(rows);
        }) == 0);
  CHECK(grown.count() == 4 * kPage + 1);
  CHECK(grown.capacity() == 5 * kPage);
}

TEST_CASE("PagedRows whose memory ran out has the rows it had", "[attention][paged_rows]") {
  if (!test::allocations_are_counted()) return;
  const Matrix<double> rows = test::random_matrix(kPage + 10, 4, 8);
  PagedRows<double> prefix;
  prefix.append(rows);
  for (long nth = 1; nth <= 6; ++nth) {
    PagedRows<double> copy = prefix;
    if (test::runs_out_of_memory(nth, [&] { copy.append(rows); }))
      CHECK(copy.count() == kPage + 10);
    CHECK(copy.matrix().topRows(kPage + 10) == rows);
    copy.truncate(kPage + 10);
    copy.append(rows);
    CHECK(copy.matrix().bottomRows(kPage + 10) == rows);
    CHECK(prefix.matrix() == rows);
  }
}

}  // namespace weir::paged_rows_test
