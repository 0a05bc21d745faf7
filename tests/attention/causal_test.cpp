// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/attention/causal.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"

using namespace weir;

namespace {

/// Queries, keys and values of several sequences, of which only the last tokens have queries.
struct Problem {
  AttentionHeads heads;
  std::vector<AttentionSpan> spans;
  std::vector<std::uint8_t> mask;
  Matrix<double> q, k, v;

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

  CausalAttention<double> attention() const { return {heads, spans, mask, q, k, v}; }

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
          double total = 0.0;
          for (Index j = s.key_begin; j <= s.key_begin + s.keys - s.queries + i; ++j) {
            if (!mask.empty() && mask[static_cast<std::size_t>(j)] == 0) continue;
            const double p = std::exp(
                heads.scale * q.row(s.query_begin + i)
                                  .segment(h * heads.head_dim, heads.head_dim)
                                  .dot(k.row(j).segment(shared * heads.head_dim, heads.head_dim)));
            total += p;
            row += p * v.row(j).segment(shared * heads.value_dim, heads.value_dim);
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

TEST_CASE("CausalAttention gradients agree with finite differences",
          "[attention][causal][gradient]") {
  const auto value_dim = GENERATE(as<Index>{}, 1, 3);
  Problem problem({2, 1, 2, value_dim, 0.7}, {{0, 90, 0, 110}, {90, 5, 110, 5}, {95, 1, 115, 9}});
  problem.mask.assign(124, 1);
  for (const std::size_t padding : {0U, 70U, 109U, 110U, 117U}) problem.mask[padding] = 0;
  const Matrix<double> weight = test::random_matrix(96, 2 * value_dim, 4);
  const auto objective = [&] { return problem.forward().cwiseProduct(weight).sum(); };

  CausalAttention<double>::Cache cache;
  const Matrix<double> out = problem.forward(cache);
  Matrix<double> dq(96, 4);
  Matrix<double> dk(124, 2);
  Matrix<double> dv(124, value_dim);
  problem.attention().backward(out, weight, dq, dk, dv, cache);

  CHECK(test::relative_error(dq, test::numeric_gradient(problem.q, objective)) <= 1e-6);
  CHECK(test::relative_error(dk, test::numeric_gradient(problem.k, objective)) <= 1e-6);
  CHECK(test::relative_error(dv, test::numeric_gradient(problem.v, objective)) <= 1e-6);
  for (const Index padding : {0, 70, 109, 110, 117}) {
    CHECK(dk.row(padding).isZero(0.0));
    CHECK(dv.row(padding).isZero(0.0));
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

TEST_CASE("CausalAttention gives the same bits on any number of threads",
          "[attention][causal][parallel]") {
  const auto queries = GENERATE(as<Index>{}, 1, 200);
  const Problem problem({3, 1, 8, 8, 0.5}, {{0, queries, 0, 3000}});
  const Matrix<double> one = problem.forward();
  set_threads(2);
  const Matrix<double> two = problem.forward();
  set_threads(1);
  CHECK(one == two);
}
