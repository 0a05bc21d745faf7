// SPDX-License-Identifier: MIT
// Attention over caches that round what they hold.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/kv_cache.hpp>
#include <weir/attention/latent.hpp>
#include <weir/attention/latent_cache.hpp>
#include <weir/core/cache_storage.hpp>
#include <weir/core/decoding.hpp>
#include <weir/core/sequences.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::narrow_cache_test {

namespace {

constexpr CacheStorage kNarrow[] = {CacheStorage::kBfloat16, CacheStorage::kInt8,
                                    CacheStorage::kInt6};
constexpr CacheStorage kAll[] = {CacheStorage::kFull, CacheStorage::kBfloat16, CacheStorage::kInt8,
                                 CacheStorage::kInt6};

// Relative to what shares the scale.
double bound_of(CacheStorage storage) {
  switch (storage) {
    case CacheStorage::kFull:
      return 0.0;
    case CacheStorage::kBfloat16:
      return 1.0 / 256.0;
    case CacheStorage::kInt8:
      return 1.0 / 254.0;
    case CacheStorage::kInt6:
      return 1.0 / 62.0;
  }
  return 0.0;
}

// The sequence in chunks of the given sizes, the last one as often as there are tokens left.
template <class L>
Matrix<typename L::Scalar> in_chunks(const L& layer, const Matrix<typename L::Scalar>& x,
                                     typename L::State& state, const std::vector<Index>& chunks) {
  typename L::Cache cache;
  Matrix<typename L::Scalar> y(x.rows(), x.cols());
  std::size_t i = 0;
  for (Index t = 0; t < x.rows();) {
    const Index count = std::min(chunks[std::min(i++, chunks.size() - 1)], x.rows() - t);
    y.middleRows(t, count) = decode(layer, x.middleRows(t, count), state, cache);
    t += count;
  }
  return y;
}

struct Setting {
  GroupedQueryConfig config;
};
const Setting kSettings[] = {
    {{.d_model = 12, .heads = 4, .kv_heads = 2, .head_dim = 20}},
    {{.d_model = 12, .heads = 3, .kv_heads = 3, .head_dim = 6, .softcap = 3.0, .sinks = true}},
    {{.d_model = 12, .heads = 9, .kv_heads = 1, .head_dim = 70, .window = 130}},
    {{.d_model = 12, .heads = 2, .kv_heads = 1, .head_dim = 16, .chunk = 150}},
};

LatentConfig latent_config(LatentDecoding way) {
  return {.d_model = 12,
          .heads = 9,
          .q_rank = 7,
          .kv_rank = 21,
          .nope_dim = 6,
          .rope_dim = 4,
          .value_dim = 5,
          .decoding = way};
}

}  // namespace

TEST_CASE("With any storage, a token has the same bits in every chunk",
          "[attention][cache][invariance]") {
  using T = float;
  const CacheStorage storage = GENERATE(from_range(std::begin(kAll), std::end(kAll)));
  const Setting setting = GENERATE(from_range(std::begin(kSettings), std::end(kSettings)));
  Rng rng(1);
  const GroupedQueryAttention<T> layer(rng, setting.config);
  const Matrix<T> x = test::random_matrix<T>(590, 12, 2);  // Two runs, seven pages.
  KvCache<T> whole(storage);
  const Matrix<T> expected = in_chunks(layer, x, whole, {590});
  for (const std::vector<Index>& chunks :
       std::vector<std::vector<Index>>{{1}, {300, 1, 7, 40}, {95, 2, 17, 100}}) {
    KvCache<T> kv(storage);
    CHECK(in_chunks(layer, x, kv, chunks) == expected);
    CHECK(kv.values().bottomRows(40) == whole.values().bottomRows(40));
    CHECK(kv.keys().bottomRows(40) == whole.keys().bottomRows(40));
  }
  const test::Threads threads(3);
  KvCache<T> kv(storage);
  CHECK(in_chunks(layer, x, kv, {200, 16, 1}) == expected);
}

TEMPLATE_TEST_CASE("With any storage, latents give a token the same bits in every chunk",
                   "[attention][latent][cache][invariance]", float, double) {
  using T = TestType;
  const CacheStorage storage = GENERATE(from_range(std::begin(kAll), std::end(kAll)));
  const auto way = GENERATE(LatentDecoding::kAbsorbed, LatentDecoding::kExpanded);
  Rng rng(1);
  const LatentAttention<T> layer(rng, latent_config(way));
  const Matrix<T> x = test::random_matrix<T>(200, 12, 2);
  LatentCache<T> whole(storage);
  const Matrix<T> expected = in_chunks(layer, x, whole, {200});
  for (const std::vector<Index>& chunks :
       std::vector<std::vector<Index>>{{1}, {95, 2, 17, 30}, {150, 1}}) {
    LatentCache<T> kv(storage);
    CHECK(in_chunks(layer, x, kv, chunks) == expected);
    CHECK(kv.matrix() == whole.matrix());
  }
}

TEST_CASE("What is attended to are the rounded keys and values, in a prompt too",
          "[attention][cache]") {
  const CacheStorage storage = GENERATE(from_range(std::begin(kAll), std::end(kAll)));
  const Setting setting = GENERATE(from_range(std::begin(kSettings), std::end(kSettings)));
  Rng rng(1);
  const GroupedQueryAttention<double> layer(rng, setting.config);
  const Matrix<double> x = test::random_matrix(130, 12, 3);
  KvCache<double> kv(storage);
  GroupedQueryAttention<double>::Cache cache;
  decode(layer, x, kv, cache);
  const Matrix<double> context = cache.context;

  // The definition, over what the cache gives back.
  const AttentionHeads shape = layer.config().shape();
  const Matrix<double> keys = kv.keys();
  const Matrix<double> values = kv.values();
  const Index dim = shape.head_dim;
  Matrix<double> expected = Matrix<double>::Zero(context.rows(), context.cols());
  for (Index i = 0; i < x.rows(); ++i) {
    for (Index h = 0; h < shape.heads; ++h) {
      const Index from = h / shape.group() * dim;
      double total = shape.softcap > 0 ? 1.0 : 0.0;  // The sink is 0 where there is one.
      RowVector<double> sum = RowVector<double>::Zero(dim);
      for (Index j = shape.first_visible(i); j <= i; ++j) {
        double score =
            shape.scale * cache.q.row(i).segment(h * dim, dim).dot(keys.row(j).segment(from, dim));
        if (shape.softcap > 0) score = shape.softcap * std::tanh(score / shape.softcap);
        total += std::exp(score);
        sum += std::exp(score) * values.row(j).segment(from, dim);
      }
      expected.row(i).segment(h * dim, dim) = sum / total;
    }
  }
  CHECK(test::relative_error(context, expected) <= 1e-13);

  // A float's cache rounds to the same numbers, up to those on the border between two codes.
  Rng again(1);
  const GroupedQueryAttention<float> small(again, setting.config);
  GroupedQueryAttention<float>::Cache small_cache;
  KvCache<float> small_kv(storage);
  decode(small, x.cast<float>(), small_kv, small_cache);
  const double few = storage == CacheStorage::kFull ? 2e-6 : bound_of(storage);
  CHECK(test::relative_error(small_cache.context.cast<double>(), context) <= few);
}

TEST_CASE("Outputs are off by no more than rounded keys and values can move them",
          "[attention][cache]") {
  // Scores are off by D at most, so shares by a factor between exp(-2 D) and exp(2 D).
  const CacheStorage storage = GENERATE(from_range(std::begin(kNarrow), std::end(kNarrow)));
  const double bound = bound_of(storage);
  Rng rng(1);
  const GroupedQueryAttention<double> layer(
      rng, {.d_model = 12, .heads = 4, .kv_heads = 2, .head_dim = 6, .rope = false});
  Matrix<double> x = test::random_matrix(120, 12, 3);
  x.row(17) *= 1e4;  // An outlier, seen by all behind it.
  x.row(30).setZero();
  KvCache<double> full, narrow(storage);
  GroupedQueryAttention<double>::Cache of_full, of_narrow;
  decode(layer, x, full, of_full);
  decode(layer, x, narrow, of_narrow);
  CHECK(of_narrow.context.allFinite());
  const Matrix<double> keys = full.keys();
  const Matrix<double> values = full.values();
  const double scale = layer.config().shape().scale;
  for (Index i = 0; i < 17; ++i) {  // Where D is small.
    for (Index h = 0; h < 4; ++h) {
      const auto seen_keys = keys.block(0, h / 2 * 6, i + 1, 6);
      const auto seen_values = values.block(0, h / 2 * 6, i + 1, 6);
      const double off = scale * of_full.q.row(i).segment(h * 6, 6).cwiseAbs().sum() * bound *
                         seen_keys.cwiseAbs().maxCoeff();
      const double most = seen_values.cwiseAbs().maxCoeff() * (1.0 + bound);
      const auto error =
          of_narrow.context.row(i).segment(h * 6, 6) - of_full.context.row(i).segment(h * 6, 6);
      REQUIRE(error.cwiseAbs().maxCoeff() <= most * (bound + std::expm1(2.0 * off)) + 1e-14);
    }
  }
}

TEST_CASE("Keys and values are off by no more than their storage says", "[attention][cache]") {
  const CacheStorage storage = GENERATE(from_range(std::begin(kNarrow), std::end(kNarrow)));
  const Matrix<float> keys = test::random_matrix<float>(200, 24, 1);
  Matrix<float> values = test::random_matrix<float>(200, 12, 2);
  values.leftCols(4) *= 1e3F;  // One head does not spoil the next.
  KvCache<float> kv(storage);
  kv.append(keys, values, 3);
  CHECK(kv.storage() == storage);
  const auto check = [&](const Matrix<float>& stored, const Matrix<float>& exact, Index dim) {
    for (Index i = 0; i < exact.rows(); ++i) {
      for (Index h = 0; h < 3; ++h) {
        const auto of_head = exact.row(i).segment(h * dim, dim);
        const auto off = stored.row(i).segment(h * dim, dim) - of_head;
        REQUIRE(off.cwiseAbs().maxCoeff() <=
                static_cast<float>(bound_of(storage) * 1.00001) * of_head.cwiseAbs().maxCoeff());
      }
    }
  };
  check(kv.keys(), keys, 8);
  check(kv.values(), values, 4);
  CHECK(kv.keys() != keys);

  LatentCache<float> latents(storage);
  const Matrix<float> wide = test::random_matrix<float>(100, 300, 3);
  latents.append(wide, values.topRows(100));
  const Matrix<float> stored = latents.latents();
  for (Index i = 0; i < 100; ++i) {
    for (const Index first : {0, 128, 256}) {
      const Index count = std::min<Index>(128, 300 - first);
      const auto exact = wide.row(i).segment(first, count);
      const auto off = stored.row(i).segment(first, count) - exact;
      REQUIRE(off.cwiseAbs().maxCoeff() <=
              static_cast<float>(bound_of(storage) * 1.00001) * exact.cwiseAbs().maxCoeff());
    }
  }
}

TEST_CASE("Caches are as small as they say", "[attention][cache]") {
  // A token of 8 heads of 128 numbers, keys and values; scales are floats.
  const Matrix<float> rows = Matrix<float>::Zero(1, 1024);
  const auto bytes = [&](CacheStorage storage) {
    KvCache<float> kv(storage);
    CHECK(kv.bytes_per_token() == 0);
    kv.append(rows, rows, 8);
    return kv.bytes_per_token();
  };
  CHECK(bytes(CacheStorage::kFull) == 8192);
  CHECK(bytes(CacheStorage::kBfloat16) == 4096);
  CHECK(bytes(CacheStorage::kInt8) == 2048 + 64);
  CHECK(bytes(CacheStorage::kInt6) == 1536 + 64);
  // DeepSeek-V2's latent of 512 numbers and key of 64, with five scales.
  const auto latent_bytes = [&](CacheStorage storage) {
    LatentCache<float> kv(storage);
    kv.append(rows.leftCols(512), rows.leftCols(64));
    return kv.bytes_per_token();
  };
  CHECK(latent_bytes(CacheStorage::kFull) == 4 * 576);
  CHECK(latent_bytes(CacheStorage::kBfloat16) == 2 * 576);
  CHECK(latent_bytes(CacheStorage::kInt8) == 576 + 20);
  CHECK(latent_bytes(CacheStorage::kInt6) == 432 + 20);
}

TEST_CASE("Sequences with different storages are decoded in one pass as each alone",
          "[attention][cache]") {
  Rng rng(1);
  const GroupedQueryAttention<float> layer(rng, kSettings[0].config);
  const Matrix<float> x = test::random_matrix<float>(4 * 100, 12, 2);
  std::vector<KvCache<float>> together, alone;
  std::vector<KvCache<float>*> states;
  for (const CacheStorage storage : kAll) {
    together.emplace_back(storage);
    alone.emplace_back(storage);
  }
  for (KvCache<float>& kv : together) states.push_back(&kv);
  GroupedQueryAttention<float>::Cache cache, other;
  for (const Index count : {97, 1, 2}) {
    const Sequences sequences = Sequences::uniform(4, count);
    const Matrix<float> some = x.topRows(4 * count);
    const Matrix<float> y = layer.decode(some, {.sequences = &sequences}, states, cache);
    for (Index s = 0; s < 4; ++s) {
      KvCache<float>& kv = alone[static_cast<std::size_t>(s)];
      CHECK(y.middleRows(s * count, count) ==
            decode(layer, some.middleRows(s * count, count), kv, other));
    }
  }
}

TEST_CASE("Narrow caches are cut, continued and shared as full ones", "[attention][cache]") {
  const CacheStorage storage = GENERATE(from_range(std::begin(kNarrow), std::end(kNarrow)));
  Rng rng(1);
  const GroupedQueryAttention<float> layer(rng, kSettings[0].config);
  const Matrix<float> x = test::random_matrix<float>(230, 12, 2);
  KvCache<float> kv(storage);
  const Matrix<float> expected = in_chunks(layer, x, kv, {230});

  KvCache<float> prefix(storage);
  in_chunks(layer, Matrix<float>(x.topRows(150)), prefix, {150});
  KvCache<float> first = prefix;
  KvCache<float> second = prefix;
  CHECK(first.storage() == storage);
  // Both write to the page that the prefix has begun.
  const Matrix<float> other = test::random_matrix<float>(80, 12, 3);
  const Matrix<float> of_other = in_chunks(layer, other, second, {1, 79});
  CHECK(in_chunks(layer, Matrix<float>(x.bottomRows(80)), first, {3, 1, 76}) ==
        expected.bottomRows(80));
  CHECK(prefix.keys() == kv.keys().topRows(150));
  CHECK(second.keys().topRows(150) == prefix.keys());
  // A draft that is not accepted leaves nothing behind, in bytes that it shares with others.
  second.truncate(151);
  second.truncate(150);
  CHECK(in_chunks(layer, Matrix<float>(x.bottomRows(80)), second, {2, 78}) ==
        expected.bottomRows(80));
  CHECK(in_chunks(layer, other, prefix, {80}) == of_other);

  LatentCache<float> latents(storage);
  const LatentAttention<float> latent(rng, latent_config(LatentDecoding::kAbsorbed));
  const Matrix<float> whole = in_chunks(latent, x, latents, {230});
  LatentCache<float> copy = latents;
  copy.truncate(149);
  CHECK(copy.matrix() == latents.matrix().topRows(149));
  CHECK(in_chunks(latent, Matrix<float>(x.bottomRows(81)), copy, {4, 77}) == whole.bottomRows(81));
  CHECK(copy.matrix() == latents.matrix());
}

TEST_CASE("Narrow caches allocate nothing in what was reserved", "[attention][cache]") {
  if (!test::allocations_are_counted()) return;
  const CacheStorage storage = GENERATE(from_range(std::begin(kNarrow), std::end(kNarrow)));
  const Matrix<float> rows = test::random_matrix<float>(100, 8, 1);
  KvCache<float> kv(storage);
  LatentCache<float> latents(storage);
  kv.append(rows, rows, 2);
  latents.append(rows, rows);
  kv.reserve(300);
  latents.reserve(300);
  CHECK(test::count_allocations([&] {
          kv.append(rows, rows, 2);
          latents.append(rows, rows);
        }) == 0);
}

TEST_CASE("A NaN reaches the queries that see it, through any storage", "[attention][cache]") {
  const CacheStorage storage = GENERATE(from_range(std::begin(kAll), std::end(kAll)));
  Rng rng(1);
  const GroupedQueryAttention<float> layer(rng, kSettings[0].config);
  Matrix<float> x = test::random_matrix<float>(30, 12, 2);
  x(20, 3) = std::numeric_limits<float>::quiet_NaN();
  KvCache<float> kv(storage);
  const Matrix<float> y = in_chunks(layer, x, kv, {1});
  CHECK(y.topRows(20).allFinite());
  CHECK(y.bottomRows(10).array().isNaN().all());
}

TEST_CASE("KvCache and attention refuse heads that do not fit", "[attention][cache]") {
  const Matrix<double> rows = test::random_matrix(3, 12, 1);
  KvCache<double> kv(CacheStorage::kInt8);
  CHECK(test::message_of<ConfigError>([&] { kv.append(rows, rows, 5); }) ==
        "KvCache::append: heads = 5, expected a divisor of 12 and 12, the widths of keys and "
        "values");
  CHECK(test::message_of<ConfigError>([&] { kv.append(rows, rows, 0); }) ==
        "KvCache::append: heads = 0, expected >= 1");
  kv.append(rows, rows, 3);
  CHECK(test::message_of<ConfigError>([&] { kv.append(rows, rows, 2); }) ==
        "KvCache::append: heads = 2, expected 3 as before");
  CHECK(kv.length() == 3);

  Rng rng(1);
  const GroupedQueryAttention<double> layer(
      rng, {.d_model = 6, .heads = 4, .kv_heads = 2, .head_dim = 6});
  GroupedQueryAttention<double>::Cache cache;
  CHECK(test::message_of<ShapeError>([&] { decode(layer, rows.leftCols(6), kv, cache); }) ==
        "GroupedQueryAttention::decode: kv has 3 heads, expected 2");
  CHECK(kv.length() == 3);
}

}  // namespace weir::narrow_cache_test
