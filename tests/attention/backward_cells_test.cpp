// SPDX-License-Identifier: MIT
#include <cmath>
#include <limits>
#include <vector>

#include <weir/attention/causal.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::backward_cells_test {

namespace {

struct Gradients {
  Matrix<double> q, k, v;

  bool operator==(const Gradients& other) const {
    return q == other.q && k == other.k && v == other.v;
  }
  Gradients rows(const AttentionSpan& s) const {
    return {q.middleRows(s.query_begin, s.queries), k.middleRows(s.key_begin, s.keys),
            v.middleRows(s.key_begin, s.keys)};
  }
};

/// Random queries, keys, values and gradients of the output.
struct Problem {
  AttentionHeads heads;
  std::vector<AttentionSpan> spans;
  Matrix<double> q, k, v, d_out;

  Problem(const AttentionHeads& shape, const std::vector<AttentionSpan>& sequences, Index queries,
          Index keys)
      : heads(shape),
        spans(sequences),
        q(test::random_matrix(queries, heads.heads * heads.head_dim, 1)),
        k(test::random_matrix(keys, heads.kv_heads * heads.head_dim, 2)),
        v(test::random_matrix(keys, heads.kv_heads * heads.value_dim, 3)),
        d_out(test::random_matrix(queries, heads.heads * heads.value_dim, 4)) {}

  Gradients gradients() const {
    constexpr double kUnset = std::numeric_limits<double>::quiet_NaN();
    const CausalAttention<double> attention(heads, spans, {}, q, k, v);
    CausalAttention<double>::Cache cache;
    Matrix<double> out(q.rows(), d_out.cols());
    attention.forward(out, cache);
    Gradients d = {Matrix<double>::Constant(q.rows(), q.cols(), kUnset),
                   Matrix<double>::Constant(k.rows(), k.cols(), kUnset),
                   Matrix<double>::Constant(v.rows(), v.cols(), kUnset)};
    attention.backward(out, d_out, d.q, d.k, d.v, cache);
    return d;
  }

  /// One sequence's, by its whole matrices of probabilities.
  Gradients of_definition() const {
    Gradients d = {0.0 * q, 0.0 * k, 0.0 * v};
    const AttentionSpan& s = spans[0];
    for (Index h = 0; h < heads.heads; ++h) {
      const Index g = h / heads.group();
      const Matrix<double> qh = q.middleCols(h * heads.head_dim, heads.head_dim);
      const Matrix<double> kh = k.middleCols(g * heads.head_dim, heads.head_dim);
      const Matrix<double> vh = v.middleCols(g * heads.value_dim, heads.value_dim);
      const Matrix<double> dh = d_out.middleCols(h * heads.value_dim, heads.value_dim);
      Matrix<double> p = (heads.scale * qh * kh.transpose()).array().exp();
      for (Index i = 0; i < s.queries; ++i) {
        const Index own = s.prefix() + i;
        for (Index j = 0; j < s.keys; ++j) {
          if (j > own || (heads.window > 0 && j <= own - heads.window)) p(i, j) = 0.0;
        }
        p.row(i) /= p.row(i).sum();
      }
      const Matrix<double> dp = dh * vh.transpose();
      Matrix<double> ds = dp;
      for (Index i = 0; i < s.queries; ++i) {
        const double mean = p.row(i).dot(dp.row(i));
        ds.row(i) = heads.scale * p.row(i).cwiseProduct((dp.row(i).array() - mean).matrix());
      }
      d.q.middleCols(h * heads.head_dim, heads.head_dim) = ds * kh;
      d.k.middleCols(g * heads.head_dim, heads.head_dim) += ds.transpose() * qh;
      d.v.middleCols(g * heads.value_dim, heads.value_dim) += p.transpose() * dh;
    }
    return d;
  }
};

}  // namespace

TEST_CASE("Gradients of attention over many cells are those of the definition",
          "[attention][causal][gradient]") {
  // Dimensions of several strips, a prefix, and windows that begin inside of cells.
  const auto head_dim = GENERATE(as<Index>{}, 5, 70);
  const auto window = GENERATE(as<Index>{}, 0, 150);
  const auto queries = GENERATE(as<Index>{}, 300, 413);
  Problem problem({4, 2, head_dim, 7, 0.4, 0.0, window}, {{0, queries, 0, 413}}, queries, 413);

  const Gradients d = problem.gradients();
  const Gradients expected = problem.of_definition();
  CHECK(test::relative_error(d.q, expected.q) <= 1e-12);
  CHECK(test::relative_error(d.k, expected.k) <= 1e-12);
  CHECK(test::relative_error(d.v, expected.v) <= 1e-12);
}

TEST_CASE("Gradients of attention have the same bits in small cells and in large ones",
          "[attention][causal][parallel]") {
  // A sequence beside a long one is computed in larger cells than alone.
  const AttentionSpan alone = {0, 600, 0, 600};
  const AttentionHeads heads = {2, 1, 4, 4, 0.5};
  const Problem small(heads, {alone}, 600, 600);
  Problem large(heads, {alone, {600, 1100, 600, 1100}}, 1700, 1700);
  large.q.topRows(600) = small.q;
  large.k.topRows(600) = small.k;
  large.v.topRows(600) = small.v;
  large.d_out.topRows(600) = small.d_out;

  const Gradients expected = small.gradients();
  const Gradients beside = large.gradients();
  CHECK(beside.rows(alone) == expected);

  const test::Threads threads(2);
  CHECK(small.gradients() == expected);
  CHECK(large.gradients() == beside);
}

}  // namespace weir::backward_cells_test
