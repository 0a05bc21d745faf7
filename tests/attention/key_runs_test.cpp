// SPDX-License-Identifier: MIT
// A query has the same bits whichever queries are computed beside it.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include <weir/attention/causal.hpp>
#include <weir/attention/key_runs.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::key_runs_test {

namespace {

constexpr Index kTokens = 1100;  // Three runs.

struct Setting {
  AttentionHeads heads;
  bool sinks;
};

const Setting kSettings[] = {
    {{.heads = 4, .kv_heads = 1, .head_dim = 20, .value_dim = 24, .scale = 0.3}, false},
    {{.heads = 2, .kv_heads = 2, .head_dim = 7, .value_dim = 5, .scale = 1.0, .softcap = 2.0},
     true},
    {{.heads = 9, .kv_heads = 1, .head_dim = 33, .value_dim = 70, .scale = 0.2, .window = 130},
     true},
    {{.heads = 6, .kv_heads = 3, .head_dim = 16, .value_dim = 16, .scale = 0.25, .chunk = 250},
     false},
};

}  // namespace

TEMPLATE_TEST_CASE("A query has the same bits alone, in a part of a prompt, and in the whole",
                   "[attention][invariance]", float, double) {
  using T = TestType;
  const auto setting = GENERATE(from_range(std::begin(kSettings), std::end(kSettings)));
  const AttentionHeads& shape = setting.heads;
  const Matrix<T> q = test::random_matrix<T>(kTokens, shape.heads * shape.head_dim, 1);
  const Matrix<T> k = test::random_matrix<T>(kTokens, shape.kv_heads * shape.head_dim, 2);
  const Matrix<T> v = test::random_matrix<T>(kTokens, shape.kv_heads * shape.value_dim, 3);
  Matrix<T> sinks = test::random_matrix<T>(1, shape.heads, 4);
  const std::span<const T> with(sinks.data(),
                                setting.sinks ? static_cast<std::size_t>(shape.heads) : 0);

  const auto attend = [&](Index begin, Index end) {
    typename CausalAttention<T>::Cache cache;
    const std::vector<AttentionSpan> spans = {{0, end - begin, 0, end}};
    const Matrix<T> some = q.middleRows(begin, end - begin);
    const Matrix<T> keys = k.topRows(end);
    const Matrix<T> values = v.topRows(end);
    Matrix<T> out(end - begin, shape.heads * shape.value_dim);
    CausalAttention<T>(shape, spans, {}, some, keys, values, with).forward(out, cache);
    Matrix<T> both(out.rows(), out.cols() + shape.heads);
    both << out, cache.logsumexp.view().transpose();
    return both;
  };
  const Matrix<T> whole = attend(0, kTokens);
  for (const auto& [begin, end] : std::vector<std::pair<Index, Index>>{{0, 1},
                                                                       {5, 6},
                                                                       {95, 97},
                                                                       {479, 480},
                                                                       {480, 481},
                                                                       {1099, 1100},
                                                                       {700, 703},
                                                                       {950, 970},
                                                                       {100, 300},
                                                                       {301, 1099},
                                                                       {13, 500}}) {
    INFO("queries " << begin << " to " << end);
    CHECK(attend(begin, end) == whole.middleRows(begin, end - begin));
  }
}

TEST_CASE("Runs of keys add up to the whole, and runs of which nothing is seen change nothing",
          "[attention][invariance]") {
  // exp(1 - 3) * 2 + 5 = 2 / e^2 + 5 and exp(4 - 7) * 5 + 2.
  const double lowest = std::numeric_limits<double>::lowest();
  Matrix<double> top(1, 3), of_run(1, 3), keep(1, 3), add(1, 3), sums(1, 3), run(1, 3);
  top << 1.0, 7.0, 2.0;
  of_run << 3.0, 4.0, lowest;
  sums << 2.0, 2.0, 0.1;
  run << 5.0, 5.0, 0.0;
  merge_tops<double>(3, of_run.data(), top.data(), keep.data(), add.data());
  merge_sums<double>(3, keep.data(), add.data(), run.data(), sums.data());
  CHECK(top(0, 0) == 3.0);
  CHECK(top(0, 1) == 7.0);
  CHECK(top(0, 2) == 2.0);
  CHECK(sums(0, 0) == Approx(2.0 * std::exp(-2.0) + 5.0).epsilon(1e-14));
  CHECK(sums(0, 1) == Approx(2.0 + 5.0 * std::exp(-3.0)).epsilon(1e-14));
  CHECK(sums(0, 2) == 0.1);
}

}  // namespace weir::key_runs_test
