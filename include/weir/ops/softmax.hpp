// SPDX-License-Identifier: MIT
/// \file
/// Softmax over the columns of each row, and its derivative.
#pragma once

#include <span>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Softmax of one row:
///
///     p[i] = exp(logits[i] - max) / sum_j exp(logits[j] - max)
///
/// A logit of -inf gets exactly zero; at least one must be finite. A NaN makes the whole row NaN.
///
/// \param logits   At least one.
/// \param p        As long as `logits`, which it may be.
template <class T>
void softmax_row(std::span<const T> logits, std::span<T> p) {
  const auto count = static_cast<Index>(logits.size());
  loops::exp_shifted(count, logits.data(), loops::max(count, logits.data()), p.data());
  loops::scale(count, T(1) / loops::sum(count, p.data()), p.data(), p.data());
}

/// Softmax of each row of [tokens, n]; `p` has the shape of `logits` and may be the same matrix.
/// \throws ShapeError   if the shapes differ.
template <class T>
void softmax(MatrixIn<T> logits, MatrixOut<T> p) {
  expect_shape("softmax", "p", p, logits.rows(), logits.cols());
  if (logits.cols() == 0) return;
  parallel_rows(logits.rows(), 4 * logits.cols(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      softmax_row<T>(row_span(logits, t), row_span(p, t));
    }
  });
}

/// Softmax of each row of [tokens, n].
template <class T>
Matrix<T> softmax(MatrixIn<T> logits) {
  Matrix<T> p(logits.rows(), logits.cols());
  softmax<T>(logits, p);
  return p;
}

/// Adds the gradient with respect to the logits of one row, p being their softmax:
///
///     d_logits[i] += p[i] (dp[i] - sum_j p[j] dp[j])
template <class T>
void add_softmax_backward_row(std::span<const T> p, std::span<const T> dp, std::span<T> d_logits) {
  const auto count = static_cast<Index>(p.size());
  const T mean = loops::dot(count, p.data(), dp.data());
  const auto add = [mean](const Lanes<T>& d, const Lanes<T>& a, const Lanes<T>& b) -> Lanes<T> {
    return d + a * (b - mean);
  };
  map_lanes<T>(count, add, d_logits.data(), d_logits.data(), p.data(), dp.data());
}

/// `add_softmax_backward_row` for each row; all three are [tokens, n].
/// \throws ShapeError   if the shapes differ.
template <class T>
void add_softmax_backward(MatrixIn<T> p, MatrixIn<T> dp, MatrixOut<T> d_logits) {
  expect_shape("add_softmax_backward", "dp", dp, p.rows(), p.cols());
  expect_shape("add_softmax_backward", "d_logits", d_logits, p.rows(), p.cols());
  if (p.cols() == 0) return;
  parallel_rows(p.rows(), 2 * p.cols(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      add_softmax_backward_row<T>(row_span(p, t), row_span(dp, t), row_span(d_logits, t));
    }
  });
}

}  // namespace weir
