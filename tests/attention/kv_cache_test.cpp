// SPDX-License-Identifier: MIT
#include <algorithm>

#include <weir/attention/kv_cache.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

using namespace weir;

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

TEST_CASE("KvCache seldom moves what it holds", "[attention][kv_cache]") {
  const Matrix<float> row = test::random_matrix<float>(1, 8, 4);
  KvCache<float> kv;
  Index moves = 0;
  const float* place = nullptr;
  for (Index t = 0; t < 1000; ++t) {
    kv.append(row, row);
    if (kv.keys().data() != place) ++moves;
    place = kv.keys().data();
  }
  CHECK(moves <= 11);  // 1 + log2(1000)

  kv.reserve(4000);
  place = kv.values().data();
  for (Index t = 0; t < 3000; ++t) kv.append(row, row);
  CHECK(kv.values().data() == place);
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
  const double* place = kv.keys().data();
  kv.truncate(2);
  CHECK(kv.keys() == rows.topRows(2));
  kv.append(rows.bottomRows(3), rows.bottomRows(3));
  CHECK(kv.values() == rows);
  CHECK(kv.keys().data() == place);

  kv.clear();
  CHECK(kv.empty());
  const Matrix<double> wider = test::random_matrix(1, 8, 8);
  kv.append(wider, wider);
  CHECK(kv.keys() == wider);
}

TEST_CASE("KvCache lets go of what is not needed, now and then", "[attention][kv_cache]") {
  // 100 rows needed: up to a quarter as many more are held, and rows move at most every 25 tokens.
  const Matrix<double> rows = test::random_matrix(1000, 3, 10);
  KvCache<double> kv;
  Index moved = 0;
  for (Index t = 0; t < 1000; ++t) {
    const Index before = kv.first();
    const Index from = std::max<Index>(0, t - 10);
    kv.forget(std::max<Index>(0, from - 90), from);
    if (kv.first() > before) moved += kv.held();
    kv.append(rows.row(t), rows.row(t));
    REQUIRE(kv.length() == t + 1);
    REQUIRE(kv.first() <= std::max<Index>(0, t - 100));
    REQUIRE(kv.held() <= 126);
    REQUIRE(kv.capacity() <= 126);
    REQUIRE(kv.keys() == rows.middleRows(kv.first(), kv.held()));
  }
  CHECK(moved <= 4 * 1000);
  CHECK(kv.values() == rows.middleRows(kv.first(), kv.held()));
}

TEST_CASE("KvCache gives up the room of a long prompt", "[attention][kv_cache]") {
  const Matrix<double> rows = test::random_matrix(3000, 2, 12);
  KvCache<double> kv;
  kv.append(rows, rows);
  kv.forget(2900, 2950);
  CHECK(kv.held() == 100);
  CHECK(kv.capacity() <= 125);
  CHECK(kv.keys() == rows.bottomRows(100));
  CHECK(kv.values() == rows.bottomRows(100));
}

TEST_CASE("KvCache takes back what it still can", "[attention][kv_cache]") {
  const Matrix<double> rows = test::random_matrix(40, 3, 11);
  KvCache<double> kv;
  kv.append(rows.topRows(20), rows.topRows(20));
  kv.forget(12, 16);  // gone are the tokens before position 12
  REQUIRE(kv.first() == 12);
  const KvCache<double> copy = kv;
  kv.truncate(17);
  CHECK(kv.length() == 17);
  CHECK(kv.keys() == rows.middleRows(12, 5));
  kv.append(rows.middleRows(17, 4), rows.middleRows(17, 4));
  CHECK(kv.values() == rows.middleRows(12, 9));
  CHECK(test::message_of<StateError>([&] { kv.truncate(15); }) ==
        "KvCache::truncate: length = 15, expected 0 or at least 16: the tokens before position 12 "
        "have been forgotten");
  CHECK(kv.length() == 21);
  kv.truncate(16);
  CHECK(kv.held() == 4);
  kv.clear();
  CHECK(kv.empty());
  CHECK(kv.first() == 0);
  kv.append(rows.topRows(3), rows.topRows(3));
  kv.truncate(1);
  CHECK(kv.keys() == rows.topRows(1));
  CHECK(copy.keys() == rows.middleRows(12, 8));

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
