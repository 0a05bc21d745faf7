// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

#include <weir/attention/pages.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::pages_test {

namespace {

constexpr Index kPage = Pages::kRows;

// Appends rows, one behind the other in each page.
void append(Pages& to, const Matrix<double>& rows) {
  const Index width = rows.cols();
  const auto size = static_cast<Index>(sizeof(double));
  to.append(rows.rows(), kPage * width * size,
            [&](std::byte* page, Index first, Index end, Index i) {
              const Matrix<double> some = rows.middleRows(i, end - first);
              std::memcpy(page + first * width * size, some.data(),
                          static_cast<std::size_t>(some.size() * size));
            });
}

Matrix<double> rows_of(const Pages& pages, Index width) {
  Matrix<double> rows(pages.count(), width);
  for (Index i = 0; i < pages.count(); ++i) {
    const std::byte* const page = pages.pages()[static_cast<std::size_t>(i / kPage)].get();
    std::copy_n(reinterpret_cast<const double*>(page) + i % kPage * width, width,
                rows.data() + i * width);
  }
  return rows;
}

// How many pages two have in common.
Index common_pages(const Pages& a, const Pages& b) {
  Index common = 0;
  for (const Page& page : a.pages()) {
    for (const Page& other : b.pages()) common += page == other ? 1 : 0;
  }
  return common;
}

}  // namespace

TEST_CASE("Pages hold the rows they were given, in order", "[attention][pages]") {
  const Matrix<double> rows = test::random_matrix(3 * kPage + 7, 5, 1);
  Pages grown;
  CHECK(grown.empty());
  CHECK(grown.capacity() == 0);
  CHECK(grown.page_bytes() == 0);
  append(grown, rows.topRows(2));
  append(grown, rows.middleRows(2, 0));
  append(grown, rows.bottomRows(rows.rows() - 2));
  CHECK(grown.count() == rows.rows());
  CHECK(grown.page_bytes() == kPage * 5 * 8);
  CHECK(rows_of(grown, 5) == rows);
  CHECK(grown.capacity() == 4 * kPage);
  const std::byte* const last = grown.pages()[3].get();
  CHECK(reinterpret_cast<const double*>(last)[7 * 5] == 0.0);  // New pages are zeros.

  grown.truncate(0);
  append(grown, rows.leftCols(2));  // Another width, now that it is empty.
  CHECK(rows_of(grown, 2) == rows.leftCols(2));
}

TEST_CASE("Copies share the pages that neither writes to", "[attention][pages]") {
  const Matrix<double> rows = test::random_matrix(2 * kPage + 10, 4, 2);
  const Matrix<double> more = test::random_matrix(kPage, 4, 3);
  Pages prefix;
  append(prefix, rows);
  Pages first = prefix;
  Pages second = prefix;
  CHECK(common_pages(first, second) == 3);
  append(first, more);
  append(second, more.topRows(1));
  CHECK(common_pages(first, prefix) == 2);
  CHECK(common_pages(first, second) == 2);

  Matrix<double> expected(rows.rows() + more.rows(), 4);
  expected << rows, more;
  CHECK(rows_of(first, 4) == expected);
  CHECK(rows_of(second, 4) == expected.topRows(rows.rows() + 1));
  CHECK(rows_of(prefix, 4) == rows);
  append(prefix, more.bottomRows(3));
  CHECK(rows_of(prefix, 4).topRows(rows.rows()) == rows);
  CHECK(rows_of(prefix, 4).bottomRows(3) == more.bottomRows(3));
  CHECK(rows_of(second, 4) == expected.topRows(rows.rows() + 1));

  // What was taken back is not written to while another has it.
  Pages cut = first;
  cut.truncate(kPage + 5);
  append(cut, more);
  CHECK(rows_of(first, 4) == expected);
  CHECK(rows_of(cut, 4).topRows(kPage + 5) == rows.topRows(kPage + 5));
  CHECK(rows_of(cut, 4).bottomRows(kPage) == more);
  CHECK(common_pages(cut, first) == 2);  // The first one, and one that holds nothing of it now.

  // A copy holds no page that it does not need.
  first.truncate(5);
  const Pages small = first;
  CHECK(small.capacity() == kPage);
  const Pages moved = std::move(first);
  CHECK(rows_of(moved, 4) == rows.topRows(5));
  CHECK(first.empty());  // NOLINT(bugprone-use-after-move)
  first = moved;
  CHECK(rows_of(first, 4) == rows.topRows(5));
}

TEST_CASE("A page that is no longer shared is written to as it is", "[attention][pages]") {
  const Matrix<double> rows = test::random_matrix(10, 4, 4);
  Pages prefix;
  append(prefix, rows);
  const std::byte* const page = prefix.pages()[0].get();
  { const Pages copy = prefix; }
  append(prefix, rows);
  CHECK(prefix.pages()[0].get() == page);
}

TEST_CASE("Pages at the front can be let go of", "[attention][pages]") {
  const Matrix<double> rows = test::random_matrix(3 * kPage + 5, 3, 5);
  Pages grown;
  append(grown, rows);
  const Pages copy = grown;
  append(grown, rows.topRows(1));
  grown.drop_front(2);
  CHECK(grown.count() == kPage + 6);
  CHECK(rows_of(grown, 3).topRows(kPage + 5) == rows.bottomRows(kPage + 5));
  CHECK(rows_of(copy, 3) == rows);
  CHECK(grown.capacity() == 2 * kPage);  // The others belong to the copy.

  Pages alone;
  append(alone, rows);
  alone.drop_front(2);
  CHECK(alone.capacity() == 4 * kPage);
  append(alone, rows.topRows(kPage));
  alone.drop_front(1);
  append(alone, rows.topRows(kPage));
  CHECK(alone.capacity() == 4 * kPage);
  CHECK(rows_of(alone, 3).topRows(5) == rows.bottomRows(5));
  CHECK(rows_of(alone, 3).bottomRows(kPage) == rows.topRows(kPage));

  Pages prompt;
  append(prompt, test::random_matrix(50 * kPage, 3, 6));
  prompt.drop_front(49);
  CHECK(prompt.capacity() == 2 * kPage);
}

TEST_CASE("Pages can be reserved", "[attention][pages]") {
  const Matrix<double> rows = test::random_matrix(2 * kPage, 4, 7);
  Pages grown;
  grown.reserve(5);  // The width is not known.
  CHECK(grown.capacity() == 0);
  append(grown, rows.topRows(1));
  grown.reserve(4 * kPage + 1);
  CHECK(grown.capacity() == 5 * kPage);
  const std::byte* const last = grown.pages()[4].get();
  for (int i = 0; i < 2; ++i) append(grown, rows);
  CHECK(grown.count() == 4 * kPage + 1);
  CHECK(grown.pages()[4].get() == last);
  CHECK_THROWS_AS(grown.reserve(std::numeric_limits<Index>::max() / 3), std::length_error);
  CHECK(grown.count() == 4 * kPage + 1);
}

TEST_CASE("Pages whose memory ran out have the rows they had", "[attention][pages]") {
  if (!test::allocations_are_counted()) return;
  const Matrix<double> rows = test::random_matrix(kPage + 10, 4, 8);
  Pages prefix;
  append(prefix, rows);
  for (long nth = 1; nth <= 6; ++nth) {
    Pages copy = prefix;
    if (test::runs_out_of_memory(nth, [&] { append(copy, rows); })) {
      CHECK(copy.count() == kPage + 10);
    }
    CHECK(rows_of(copy, 4).topRows(kPage + 10) == rows);
    copy.truncate(kPage + 10);
    append(copy, rows);
    CHECK(rows_of(copy, 4).bottomRows(kPage + 10) == rows);
    CHECK(rows_of(prefix, 4) == rows);
  }
}

}  // namespace weir::pages_test
