// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/attention/causal.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::causal_test {

namespace {

/// Queries, keys and values of several sequences, of which only the last tokens have queries.
struct Problem {
  AttentionHeads heads;
  std::vector<AttentionSpan> spans;
  std::vector<std::uint8_t> mask;
  Matrix<double> q, k, v;
  Matrix<double> sinks = {};  // [1, heads], or empty

  Problem(const AttentionHeads& shape, const std::vector<AttentionSpan>& sequences)
      : heads(shape), spans(sequences) {
    Index queries = 0;
    Index keys = 0;
    for (const AttentionSpan& s : spans) {
      queries = std::max(queries, s.query_begin + s.queries);
      keys = std::max(keys, s.key_begin + s.keys);
    }
    q = test::random_matrix(queries, heads.heads * heads.head_dim, 1);
    k = test::random_matrix(keys, heads.kv_heads * heads.head_dim, 2);
    v = test::random_matrix(keys, heads.kv_heads * heads.value_dim, 3);
  }

  CausalAttention<double> attention() const {
    return {heads, spans, mask, q, k, v, {sinks.data(), static_cast<std::size_t>(sinks.size())}};
  }

  /// Key j, counted in its span, as seen by query i.
  bool sees(const AttentionSpan& s, Index i, Index j) const {
    const Index query = s.first_position() + i;
    const Index key = s.first_key + j;
    const auto row = static_cast<std::size_t>(s.key_begin + j);
    return (mask.empty() || mask[row] != 0) && key <= query &&
           (heads.window == 0 || key > query - heads.window) &&
           (heads.chunk == 0 || key / heads.chunk == query / heads.chunk);
  }

  Matrix<double> forward(CausalAttention<double>::Cache& cache) const {
    Matrix<double> out(q.rows(), heads.heads * heads.value_dim);
    attention().forward(out, cache);
    return out;
  }

  Matrix<double> forward() const {
    CausalAttention<double>::Cache cache;
    return forward(cache);
  }

  /// The definition, written out.
  Matrix<double> reference() const {
    Matrix<double> out = Matrix<double>::Zero(q.rows(), heads.heads * heads.value_dim);
    for (const AttentionSpan& s : spans) {
      for (Index i = 0; i < s.queries; ++i) {
        for (Index h = 0; h < heads.heads; ++h) {
          const Index shared = h / (heads.heads / heads.kv_heads);
          auto row = out.row(s.query_begin + i).segment(h * heads.value_dim, heads.value_dim);
          double total = sinks.size() == 0 ? 0.0 : std::exp(sinks(0, h));
          for (Index j = 0; j < s.keys; ++j) {
            if (!sees(s, i, j)) continue;
            const Index of_key = s.key_begin + j;
            double score = heads.scale *
                           q.row(s.query_begin + i)
                               .segment(h * heads.head_dim, heads.head_dim)
                               .dot(k.row(of_key).segment(shared * heads.head_dim, heads.head_dim));
            if (heads.softcap > 0) score = heads.softcap * std::tanh(score / heads.softcap);
            const double p = std::exp(score);
            total += p;
            row += p * v.row(of_key).segment(shared * heads.value_dim, heads.value_dim);
          }
          if (total > 0.0) row /= total;
        }
      }
    }
    return out;
  }
};

}  // namespace

TEST_CASE("CausalAttention is the softmax attention of its definition", "[attention][causal]") {
  // A chunk behind a prefix, a single query behind a long one, a whole sequence, none at all.
  const std::vector<AttentionSpan> spans = {
      {0, 30, 0, 130}, {30, 1, 130, 700}, {31, 100, 830, 100}, {131, 0, 930, 3}};
  const auto head_dim = GENERATE(as<Index>{}, 5, 70);
  const auto value_dim = GENERATE(as<Index>{}, 1, 7, 70);
  const auto kv_heads = GENERATE(as<Index>{}, 1, 3);
  Problem problem({3, kv_heads, head_dim, value_dim, 0.3}, spans);

  CHECK(test::relative_error(problem.forward(), problem.reference()) <= 1e-13);
  problem.mask.assign(933, 1);
  for (const std::size_t padding : {0U, 99U, 100U, 140U, 829U, 830U, 831U, 900U}) {
    problem.mask[padding] = 0;
  }
  std::fill_n(problem.mask.begin() + 300, 350, std::uint8_t{0});  // more than whole blocks of keys
  CHECK(test::relative_error(problem.forward(), problem.reference()) <= 1e-13);
}

TEST_CASE("CausalAttention is its definition with windows, chunks, softcaps and sinks",
          "[attention][causal]") {
  struct Option {
    double softcap;
    Index window, chunk;
    bool sinks;
  };
  const auto option =
      GENERATE(Option{0.0, 1, 0, false}, Option{0.0, 7, 0, false}, Option{0.0, 16, 0, false},
               Option{0.0, 100, 0, true}, Option{0.0, 1'000'000, 0, false},
               Option{0.0, std::numeric_limits<Index>::max(), 0, false}, Option{0.0, 0, 1, false},
               Option{0.0, 0, 24, false}, Option{0.0, 0, 64, true}, Option{0.0, 50, 40, false},
               Option{0.0, 0, std::numeric_limits<Index>::max(), false}, Option{1.5, 0, 0, false},
               Option{0.0, 0, 0, true}, Option{2.0, 30, 45, true});
  // As above; and sequences whose first keys have been forgotten.
  const std::vector<AttentionSpan> spans = {
      {0, 30, 0, 130},       {30, 1, 130, 700},         {31, 100, 830, 100},    {131, 0, 930, 3},
      {131, 65, 933, 75, 1}, {196, 2, 1008, 280, 1000}, {198, 20, 1288, 90, 37}};
  Problem problem({3, 1, 5, 7, 0.8}, spans);
  problem.heads.softcap = option.softcap;
  problem.heads.window = option.window;
  problem.heads.chunk = option.chunk;
  if (option.sinks) problem.sinks = test::random_matrix(1, 3, 5);

  CHECK(test::relative_error(problem.forward(), problem.reference()) <= 1e-13);
  problem.mask.assign(1378, 1);
  for (const std::size_t padding : {0U, 99U, 100U, 140U, 829U, 830U, 831U, 900U, 1100U}) {
    problem.mask[padding] = 0;
  }
  std::fill_n(problem.mask.begin() + 300, 350, std::uint8_t{0});
  CHECK(test::relative_error(problem.forward(), problem.reference()) <= 1e-13);
}

TEST_CASE("CausalAttention reads keys and values from places of their own", "[attention][causal]") {
  // Two spans with many queries and two with few, of which one has forgotten its first keys.
  const std::vector<AttentionSpan> spans = {
      {0, 70, 0, 90}, {70, 1, 90, 40}, {71, 3, 130, 9, 300}, {74, 20, 139, 50}};
  Problem problem({2, 1, 5, 7, 0.8}, spans);
  problem.heads.window = 35;
  problem.sinks = test::random_matrix(1, 2, 5);
  std::vector<Matrix<double>> keys;
  std::vector<Matrix<double>> values;
  std::vector<KeyValueRows<double>> rows;
  for (const AttentionSpan& s : spans) {
    keys.emplace_back(problem.k.middleRows(s.key_begin, s.keys));
    values.emplace_back(problem.v.middleRows(s.key_begin, s.keys));
    rows.push_back({keys.back().data(), 5, values.back().data(), 7});
  }
  CausalAttention<double>::Cache cache;
  Matrix<double> out(94, 14);
  CausalAttention<double>(problem.heads, spans, problem.q, rows, {problem.sinks.data(), 2})
      .forward(out, cache);
  CHECK(out == problem.forward());
}

TEST_CASE("CausalAttention with a sink as large as one score gives it one share",
          "[attention][causal][golden]") {
  // Zero queries and values of one: of i + 1 equal scores and an equal sink, out_i has the share
  // (i + 1) / (i + 2), with a window of 3 at most 3 / 4. Half of what a softcap leaves of them is
  // what tanh says: 2 tanh(5 / 2) for one score of 5 against a sink of zero.
  Problem problem({1, 1, 2, 1, 1.0}, {{0, 100, 0, 100}, {100, 1, 100, 9}});
  problem.q.setZero();
  problem.v.setOnes();
  problem.sinks.setZero(1, 1);
  Matrix<double> out = problem.forward();
  for (Index i = 0; i < 100; ++i) {
    CHECK(out(i, 0) == Approx(static_cast<double>(i + 1) / static_cast<double>(i + 2)));
  }
  CHECK(out(100, 0) == Approx(0.9));
  problem.heads.window = 3;
  out = problem.forward();
  CHECK(out(0, 0) == Approx(0.5));
  CHECK(out(99, 0) == Approx(0.75));
  CHECK(out(100, 0) == Approx(0.75));

  Problem single({1, 1, 1, 1, 1.0}, {{0, 1, 0, 1}});
  single.q(0, 0) = single.v(0, 0) = 1.0;
  single.k(0, 0) = 5.0;
  single.sinks.setZero(1, 1);
  single.heads.softcap = 2.0;
  CHECK(single.forward()(0, 0) == Approx(1.0 / (1.0 + std::exp(-2.0 * std::tanh(2.5)))));
}

TEST_CASE("CausalAttention is not changed by options that change nothing", "[attention][causal]") {
  const auto queries = GENERATE(as<Index>{}, 3, 90);
  Problem problem({2, 1, 4, 4, 0.5}, {{0, queries, 0, 300}});
  const Matrix<double> plain = problem.forward();
  problem.heads.window = 300;
  problem.heads.chunk = 300;
  problem.sinks.setConstant(1, 2, -std::numeric_limits<double>::infinity());
  CHECK(problem.forward() == plain);
  problem.heads.window = 299;
  CHECK(problem.forward() != plain);
}

TEST_CASE("CausalAttention with equal scores averages the values so far",
          "[attention][causal][golden]") {
  // Zero queries: p_ij = 1 / (i + 1), so out_i is the mean of 1, ..., i + 1, which is 1 + i / 2,
  // and logsumexp_i = log(i + 1).
  Problem problem({1, 1, 2, 1, 1.0}, {{0, 200, 0, 200}});
  problem.q.setZero();
  for (Index j = 0; j < 200; ++j) problem.v(j, 0) = static_cast<double>(j + 1);
  CausalAttention<double>::Cache cache;
  const Matrix<double> out = problem.forward(cache);
  for (Index i = 0; i < 200; ++i) {
    CHECK(out(i, 0) == Approx(1.0 + 0.5 * static_cast<double>(i)));
    CHECK(cache.logsumexp.view()(0, i) == Approx(std::log(static_cast<double>(i + 1))));
  }
}

namespace {

/// Compares all gradients of sum(out * weight) with finite differences.
void check_gradients(Problem& problem) {
  const AttentionHeads& h = problem.heads;
  const Matrix<double> weight = test::random_matrix(problem.q.rows(), h.heads * h.value_dim, 4);
  const auto objective = [&] { return problem.forward().cwiseProduct(weight).sum(); };
  CausalAttention<double>::Cache cache;
  const Matrix<double> out = problem.forward(cache);
  Matrix<double> dq(problem.q.rows(), problem.q.cols());
  Matrix<double> dk(problem.k.rows(), problem.k.cols());
  Matrix<double> dv(problem.v.rows(), problem.v.cols());
  Matrix<double> d_sinks = Matrix<double>::Zero(1, problem.sinks.size());
  problem.attention().backward(out, weight, dq, dk, dv, cache,
                               {d_sinks.data(), static_cast<std::size_t>(d_sinks.size())});

  CHECK(test::relative_error(dq, test::numeric_gradient(problem.q, objective)) <= 1e-6);
  CHECK(test::relative_error(dk, test::numeric_gradient(problem.k, objective)) <= 1e-6);
  CHECK(test::relative_error(dv, test::numeric_gradient(problem.v, objective)) <= 1e-6);
  if (problem.sinks.size() > 0) {
    const Matrix<double> numeric = test::numeric_gradient(problem.sinks, objective);
    CHECK(test::relative_error(d_sinks, numeric) <= 1e-6);
  }
  for (std::size_t key = 0; key < problem.mask.size(); ++key) {
    if (problem.mask[key] != 0) continue;
    CHECK(dk.row(static_cast<Index>(key)).isZero(0.0));
    CHECK(dv.row(static_cast<Index>(key)).isZero(0.0));
  }
}

}  // namespace

TEST_CASE("CausalAttention gradients agree with finite differences",
          "[attention][causal][gradient]") {
  const auto value_dim = GENERATE(as<Index>{}, 1, 2);
  Problem problem({2, 1, 1, value_dim, 0.7}, {{0, 90, 0, 110}, {90, 5, 110, 5}, {95, 1, 115, 9}});
  problem.mask.assign(124, 1);
  for (const std::size_t padding : {0U, 70U, 109U, 110U, 117U}) problem.mask[padding] = 0;
  check_gradients(problem);
}

TEST_CASE("CausalAttention gradients agree with finite differences for every option",
          "[attention][causal][gradient]") {
  Problem problem({2, 1, 1, 1, 0.9}, {{0, 45, 0, 50, 3}, {45, 3, 50, 11}, {48, 0, 61, 2}});
  SECTION("window") {
    problem.heads.window = GENERATE(1, 5, 20);
  }
  SECTION("chunk") {
    problem.heads.chunk = GENERATE(1, 7, 16);
  }
  SECTION("softcap") {
    problem.heads.softcap = 0.8;
  }
  SECTION("sinks") {
    problem.sinks = test::random_matrix(1, 2, 6);
  }
  SECTION("all, and padding") {
    problem.heads.window = 17;
    problem.heads.chunk = 25;
    problem.heads.softcap = 1.1;
    problem.sinks = test::random_matrix(1, 2, 7);
    problem.mask.assign(63, 1);
    for (const std::size_t padding : {0U, 1U, 30U, 49U, 55U}) problem.mask[padding] = 0;
  }
  check_gradients(problem);
}

TEST_CASE("CausalAttention and its gradient are right in random settings",
          "[attention][causal][gradient]") {
  Rng rng(17);
  const auto up_to = [&](Index most) {
    return static_cast<Index>(rng.uniform() * static_cast<double>(most + 1));
  };
  const auto perhaps = [&](Index most) { return up_to(1) == 0 ? 0 : 1 + up_to(most - 1); };
  for (int i = 0; i < 40; ++i) {
    const Index kv_heads = 1 + up_to(2);
    AttentionHeads shape = {kv_heads * (1 + up_to(2)), kv_heads, 1 + up_to(8), 1 + up_to(8), 0.6};
    shape.softcap = up_to(1) == 0 ? 0.0 : 0.5 + 2.0 * rng.uniform();
    shape.window = perhaps(90);
    shape.chunk = perhaps(90);
    std::vector<AttentionSpan> spans;
    for (Index s = up_to(3), query = 0, key = 0; s >= 0; --s) {
      const Index queries = up_to(1) == 0 ? up_to(4) : up_to(150);
      const Index keys = queries + up_to(60);
      spans.push_back({query, queries, key, keys, perhaps(50)});
      query += queries;
      key += keys;
    }
    Problem problem(shape, spans);
    if (up_to(1) == 0) problem.sinks = test::random_matrix(1, shape.heads, 18);
    if (up_to(1) == 0) {
      for (Index key = 0; key < problem.k.rows(); ++key) {
        problem.mask.push_back(up_to(5) == 0 ? 0 : 1);
      }
    }
    INFO("problem " << i << ": window " << shape.window << ", chunk " << shape.chunk << ", softcap "
                    << shape.softcap);
    CausalAttention<double>::Cache cache;
    const Matrix<double> out = problem.forward(cache);
    CHECK(test::relative_error(out, problem.reference()) <= 1e-12);

    // Along one random direction.
    const Matrix<double> weight = test::random_matrix(out.rows(), out.cols(), 19);
    std::vector<Matrix<double>*> inputs = {&problem.q, &problem.k, &problem.v, &problem.sinks};
    std::vector<Matrix<double>> gradients;
    for (const Matrix<double>* m : inputs) {
      gradients.push_back(Matrix<double>::Zero(m->rows(), m->cols()));
    }
    problem.attention().backward(
        out, weight, gradients[0], gradients[1], gradients[2], cache,
        {gradients[3].data(), static_cast<std::size_t>(gradients[3].size())});
    constexpr double kStep = 1e-5;
    double slope = 0.0;
    double size = 0.0;
    double difference = 0.0;
    std::vector<Matrix<double>> directions;
    for (std::size_t m = 0; m < inputs.size(); ++m) {
      directions.push_back(test::random_matrix(inputs[m]->rows(), inputs[m]->cols(), 20 + m));
      slope += gradients[m].cwiseProduct(directions[m]).sum();
      size += gradients[m].squaredNorm();
    }
    for (const double sign : {1.0, -1.0}) {
      for (std::size_t m = 0; m < inputs.size(); ++m) {
        *inputs[m] += (sign > 0.0 ? kStep : -2.0 * kStep) * directions[m];
      }
      difference += sign * problem.forward().cwiseProduct(weight).sum() / (2.0 * kStep);
    }
    CHECK(std::abs(slope - difference) <= 1e-6 * std::sqrt(size));
  }
}

TEST_CASE("CausalAttention gradients are right in a window over many blocks",
          "[attention][causal][gradient]") {
  // Each query's output has to do with its window alone: the gradients are those of the same
  // sequence without a window, cut short at the window's length.
  Problem problem({1, 1, 3, 2, 0.9}, {{0, 500, 0, 500}});
  const Index window = GENERATE(as<Index>{}, 3, 64, 130);
  problem.heads.window = window;
  CausalAttention<double>::Cache cache;
  const Matrix<double> out = problem.forward(cache);
  Matrix<double> dq(500, 3);
  Matrix<double> dk(500, 3);
  Matrix<double> dv(500, 2);
  for (const Index query : {0, 70, 128, 300, 499}) {
    Matrix<double> weight = Matrix<double>::Zero(500, 2);
    weight.row(query).setOnes();
    problem.attention().backward(out, weight, dq, dk, dv, cache);

    const Index first = std::max<Index>(0, query - window + 1);
    const Index keys = query - first + 1;
    Problem cut({1, 1, 3, 2, 0.9}, {{0, 1, 0, keys}});
    cut.q = problem.q.row(query);
    cut.k = problem.k.middleRows(first, keys);
    cut.v = problem.v.middleRows(first, keys);
    CausalAttention<double>::Cache of_cut;
    const Matrix<double> cut_out = cut.forward(of_cut);
    Matrix<double> cut_dq(1, 3);
    Matrix<double> cut_dk(keys, 3);
    Matrix<double> cut_dv(keys, 2);
    cut.attention().backward(cut_out, Matrix<double>::Ones(1, 2), cut_dq, cut_dk, cut_dv, of_cut);
    CHECK(test::relative_error(dq.row(query), cut_dq) <= 1e-12);
    CHECK(test::relative_error(dk.middleRows(first, keys), cut_dk) <= 1e-12);
    CHECK(test::relative_error(dv.middleRows(first, keys), cut_dv) <= 1e-12);
    CHECK(dk.topRows(first).isZero(0.0));
    CHECK(dv.bottomRows(499 - query).isZero(0.0));
  }
}

TEST_CASE("CausalAttention passes a NaN on to the queries that see it, and tells of no key",
          "[attention][causal]") {
  const auto tokens = GENERATE(as<Index>{}, 3, 150);
  Problem problem({1, 1, 2, 2, 1.0}, {{0, tokens, 0, tokens}});
  CausalAttention<double>::Cache cache;
  problem.k(1, 0) = std::numeric_limits<double>::quiet_NaN();
  const Matrix<double> out = problem.forward(cache);
  CHECK(out.row(0).allFinite());
  CHECK(std::isnan(out(1, 0)));
  CHECK(std::isnan(out(tokens - 1, 1)));

  problem.mask.assign(static_cast<std::size_t>(tokens), 1);
  problem.mask[0] = problem.mask[1] = 0;
  const Matrix<double> masked = problem.forward(cache);
  CHECK(masked.topRows(2).isZero(0.0));
  CHECK(masked.allFinite());
  CHECK(cache.logsumexp.view()(0, 1) == std::numeric_limits<double>::infinity());
}

TEST_CASE("CausalAttention looks at nothing outside of a window or chunk", "[attention][causal]") {
  // What is there may be anything, even NaN; only the keys that a query sees are computed with.
  const auto queries = GENERATE(as<Index>{}, 1, 40);
  Problem problem({1, 1, 2, 2, 1.0}, {{0, queries, 0, 400}});
  const Index first = 400 - queries;
  if (GENERATE(true, false)) {
    problem.heads.window = 10;
    problem.k.topRows(first - 9).setConstant(std::numeric_limits<double>::quiet_NaN());
    problem.v.topRows(first - 9).setConstant(std::numeric_limits<double>::quiet_NaN());
  } else {
    problem.heads.chunk = first;
    problem.k.topRows(first).setConstant(std::numeric_limits<double>::infinity());
    problem.v.topRows(first).setConstant(std::numeric_limits<double>::infinity());
  }
  CHECK(problem.forward().allFinite());
}

TEST_CASE("CausalAttention gives the same bits on any number of threads",
          "[attention][causal][parallel]") {
  const auto queries = GENERATE(as<Index>{}, 1, 200);
  Problem problem({3, 1, 8, 8, 0.5}, {{0, queries, 0, 1500}});
  if (GENERATE(false, true)) {
    problem.heads.window = 1300;
    problem.heads.softcap = 3.0;
    problem.sinks = test::random_matrix(1, 3, 8);
  }
  const auto run = [&] {
    CausalAttention<double>::Cache cache;
    std::vector<Matrix<double>> results = {problem.forward(cache), Matrix<double>(queries, 24),
                                           Matrix<double>(1500, 8), Matrix<double>(1500, 8),
                                           Matrix<double>::Zero(1, problem.sinks.size())};
    problem.attention().backward(results[0], test::random_matrix(queries, 24, 9), results[1],
                                 results[2], results[3], cache,
                                 {results[4].data(), static_cast<std::size_t>(results[4].size())});
    return results;
  };
  const auto one = run();
  const test::Threads threads(2);
  const auto two = run();
  for (std::size_t i = 0; i < one.size(); ++i) CHECK(one[i] == two[i]);
}

TEST_CASE("CausalAttention allocates nothing once it has run", "[attention][causal][allocation]") {
  const auto queries = GENERATE(as<Index>{}, 1, 100);
  Problem problem({2, 1, 4, 4, 0.5}, {{0, queries, 0, 300}});
  problem.heads.window = 130;
  problem.heads.softcap = 3.0;
  problem.sinks = test::random_matrix(1, 2, 8);
  CausalAttention<double>::Cache cache;
  Matrix<double> out = problem.forward(cache);
  const Matrix<double> d_out = out;
  Matrix<double> dq(queries, 8);
  Matrix<double> dk(300, 4);
  Matrix<double> dv(300, 4);
  Matrix<double> d_sinks = Matrix<double>::Zero(1, 2);
  const auto step = [&] {
    problem.attention().forward(out, cache);
    problem.attention().backward(out, d_out, dq, dk, dv, cache, {d_sinks.data(), 2});
  };
  step();
  CHECK(test::count_allocations(step) == 0);
}

}  // namespace weir::causal_test
