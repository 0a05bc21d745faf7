// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstddef>

#include <weir/attention/kv_cache.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::kv_cache_test {

namespace {
constexpr Index kPage = Pages::kRows;
}  // namespace

TEST_CASE("KvCache holds the rows it was given, in order", "[attention][kv_cache]") {
  const Matrix<double> keys = test::random_matrix(11, 4, 1);
  const Matrix<double> values = test::random_matrix(11, 6, 2);
  KvCache<double> kv;
  CHECK(kv.empty());
  CHECK(kv.keys().rows() == 0);
  const auto chunk = GENERATE(as<Index>{}, 1, 3, 11);
  for (Index t = 0; t < 11; t += chunk) {
    const Index count = std::min<Index>(chunk, 11 - t);
    kv.append(keys.middleRows(t, count), values.middleRows(t, count));
  }
  CHECK(kv.length() == 11);
  CHECK(kv.keys() == keys);
  CHECK(kv.values() == values);
}

TEST_CASE("KvCache takes columns out of a wider matrix", "[attention][kv_cache]") {
  const Matrix<double> both = test::random_matrix(3, 10, 3);
  KvCache<double> kv;
  kv.append(both.leftCols(4), both.rightCols(6));
  CHECK(kv.keys() == both.leftCols(4));
  CHECK(kv.values() == both.rightCols(6));
}

TEST_CASE("KvCache never moves what it holds, and takes memory page by page",
          "[attention][kv_cache]") {
  const Matrix<float> row = test::random_matrix<float>(1, 8, 4);
  KvCache<float> kv;
  kv.append(row, row);
  const std::byte* const place = kv.pages().pages()[0].get();
  for (Index t = 1; t < 1000; ++t) {
    kv.append(row, row);
    REQUIRE(kv.capacity() - kv.length() < kPage);
  }
  CHECK(kv.pages().pages()[0].get() == place);

  kv.reserve(4000);
  CHECK(kv.capacity() >= 4000);
  CHECK(test::count_allocations([&] {
          for (Index t = 0; t < 3000; ++t) kv.append(row, row);
        }) == 0);
}

TEST_CASE("KvCache copies are independent", "[attention][kv_cache]") {
  const Matrix<double> first = test::random_matrix(2, 4, 5);
  const Matrix<double> second = test::random_matrix(1, 4, 6);
  KvCache<double> kv;
  kv.append(first, first);
  KvCache<double> copy = kv;
  copy.append(second, second);

  CHECK(kv.length() == 2);
  CHECK(kv.keys() == first);
  CHECK(copy.length() == 3);
  CHECK(copy.keys().topRows(2) == first);
  CHECK(copy.keys().bottomRows(1) == second);
}

TEST_CASE("KvCache forgets from the end", "[attention][kv_cache]") {
  const Matrix<double> rows = test::random_matrix(5, 4, 7);
  KvCache<double> kv;
  kv.append(rows, rows);
  const std::byte* const place = kv.pages().pages()[0].get();
  kv.truncate(2);
  CHECK(kv.keys() == rows.topRows(2));
  kv.append(rows.bottomRows(3), rows.bottomRows(3));
  CHECK(kv.values() == rows);
  CHECK(kv.pages().pages()[0].get() == place);

  kv.clear();
  CHECK(kv.empty());
  const Matrix<double> wider = test::random_matrix(1, 8, 8);
  kv.append(wider, wider);
  CHECK(kv.keys() == wider);
}

TEST_CASE("KvCache lets go of pages that are not needed", "[attention][kv_cache]") {
  // 100 rows needed: up to a page more is held.
  const Matrix<double> rows = test::random_matrix(1000, 3, 10);
  KvCache<double> kv;
  for (Index t = 0; t < 1000; ++t) {
    const Index from = std::max<Index>(0, t - 10);
    kv.forget(std::max<Index>(0, from - 90), from);
    const auto append = [&] { kv.append(rows.row(t), rows.row(t)); };
    const long allocations = test::count_allocations(append);
    REQUIRE((t < 3 * kPage || allocations == 0));
    REQUIRE(kv.length() == t + 1);
    REQUIRE(kv.first() <= std::max<Index>(0, t - 100));
    REQUIRE(kv.held() <= 101 + kPage);
    REQUIRE(kv.capacity() <= 4 * kPage);
    REQUIRE(kv.keys() == rows.middleRows(kv.first(), kv.held()));
  }
  CHECK(kv.values() == rows.middleRows(kv.first(), kv.held()));
}

TEST_CASE("KvCache gives up the room of a long prompt", "[attention][kv_cache]") {
  const Matrix<double> rows = test::random_matrix(3000, 2, 12);
  KvCache<double> kv;
  kv.append(rows, rows);
  kv.forget(2900, 2950);
  CHECK(kv.first() == 30 * kPage);
  CHECK(kv.capacity() <= 3 * kPage);
  CHECK(kv.keys() == rows.bottomRows(kv.held()));
  CHECK(kv.values() == rows.bottomRows(kv.held()));
}

TEST_CASE("KvCache takes back what it still can", "[attention][kv_cache]") {
  const Matrix<double> rows = test::random_matrix(4 * kPage, 3, 11);
  KvCache<double> kv;
  kv.append(rows.topRows(2 * kPage), rows.topRows(2 * kPage));
  kv.forget(kPage + 12, kPage + 16);  // gone is the first page
  REQUIRE(kv.first() == kPage);
  const KvCache<double> copy = kv;
  kv.truncate(kPage + 17);
  CHECK(kv.length() == kPage + 17);
  CHECK(kv.keys() == rows.middleRows(kPage, 17));
  kv.append(rows.middleRows(kPage + 17, 4), rows.middleRows(kPage + 17, 4));
  CHECK(kv.values() == rows.middleRows(kPage, 21));
  CHECK(test::message_of<StateError>([&] { kv.truncate(kPage + 15); }) ==
        "KvCache::truncate: length = 111, expected 0 or at least 112: the tokens before position "
        "96 have been forgotten");
  CHECK(kv.length() == kPage + 21);
  kv.truncate(kPage + 16);
  CHECK(kv.held() == 16);
  kv.clear();
  CHECK(kv.empty());
  CHECK(kv.first() == 0);
  kv.append(rows.topRows(3), rows.topRows(3));
  kv.truncate(1);
  CHECK(kv.keys() == rows.topRows(1));
  CHECK(copy.keys() == rows.middleRows(kPage, kPage));

  CHECK(test::message_of<ConfigError>([&] { kv.forget(0, 2); }) ==
        "KvCache::forget: position = 0 and from = 2, expected position <= from <= 1");
  CHECK(test::message_of<ConfigError>([&] { kv.forget(1, 0); }) ==
        "KvCache::forget: position = 1 and from = 0, expected position <= from <= 1");
}

TEST_CASE("KvCache accepts no tokens", "[attention][kv_cache]") {
  KvCache<double> kv;
  kv.append(Matrix<double>(0, 4), Matrix<double>(0, 4));
  CHECK(kv.length() == 0);
  kv.append(Matrix<double>::Ones(1, 4), Matrix<double>::Ones(1, 4));
  kv.append(Matrix<double>(0, 4), Matrix<double>(0, 4));
  CHECK(kv.length() == 1);
}

TEST_CASE("KvCache says what is wrong and stays as it was", "[attention][kv_cache]") {
  const Matrix<double> rows = test::random_matrix(2, 4, 9);
  const Matrix<double> wide = test::random_matrix(2, 5, 9);
  KvCache<double> kv;
  CHECK(test::message_of<ShapeError>([&] { kv.append(rows, rows.topRows(1)); }) ==
        "KvCache::append: values is [1, 4], expected [2, 4]");
  kv.append(rows, rows);
  CHECK(test::message_of<ShapeError>([&] { kv.append(wide, rows); }) ==
        "KvCache::append: keys is [2, 5], expected [tokens, 4]");
  CHECK(test::message_of<ShapeError>([&] { kv.append(rows, wide); }) ==
        "KvCache::append: values is [2, 5], expected [2, 4]");
  CHECK(test::message_of<ConfigError>([&] { kv.truncate(3); }) ==
        "KvCache::truncate: length = 3, expected 0 <= length <= 2");
  CHECK(test::message_of<ConfigError>([&] { kv.truncate(-1); }) ==
        "KvCache::truncate: length = -1, expected 0 <= length <= 2");
  CHECK(kv.keys() == rows);
  CHECK(kv.values() == rows);
}

}  // namespace weir::kv_cache_test
