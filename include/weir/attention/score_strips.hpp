// SPDX-License-Identifier: MIT
/// \file
/// Strips of an attention matrix, and what softmax attention does with them.
#pragma once

#include <algorithm>
#include <limits>

#include <weir/attention/key_runs.hpp>
#include <weir/attention/rows_apart.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/pack.hpp>
#include <weir/kernels/panel.hpp>
#include <weir/kernels/register_block.hpp>
#include <weir/kernels/transpose.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/tanh.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// A strip is a matrix of kStrip columns, as wide as the kernel's register block. It is the right
/// operand or the result of a product. Many columns are several strips, one behind the other.
///
/// Scores are computed as a strip [rows, kStrip], left operand times right operand. Softmax then
/// works on whole vectors of its columns, and the strip is, as it lies, the right operand of the
/// product with the values.
template <class T>
struct ScoreStrips {
  static constexpr Index kStrip = kernels::Block<T>::kCols;

  using Arithmetic = kernels::Native<T>;
  using Left = kernels::LeftRows<Arithmetic>;

  /// How many strips `columns` columns are.
  static Index strips_for(Index columns) { return (columns + kStrip - 1) / kStrip; }

  /// out [rows, kStrip] (+)= left [rows, depth] * right [depth, kStrip].
  static void multiply(const Left& left, Index rows, const T* right, Index depth, T* out,
                       bool accumulate) {
    const kernels::PackedPanel<Arithmetic> panel = {right, nullptr, depth};
    kernels::multiply_panel<Arithmetic>(left, rows, depth, panel, out, kStrip, accumulate);
  }

  /// The rows of one head from `row` on as a left operand.
  static Left rows_of(RowsApart<T>& from, Index row, Index head) {
    return {from.at(head, row), from.row_size(), 1};
  }
  /// The transposed rows of one head from `row` on as a left operand.
  static Left columns_of(RowsApart<T>& from, Index row, Index head) {
    return {from.at(head, row), 1, from.row_size()};
  }

  /// Packs `count` rows of one head as the columns of right operands, one [dim, kStrip] strip after
  /// the other, filled up with zeros, times `factor`.
  static void pack(MatrixIn<T> from, Index row, Index count, Index head, Index dim, T factor,
                   T* to) {
    kernels::pack<kStrip>(from.data() + row * from.outerStride() + head * dim, from.outerStride(),
                          1, count, dim, to);
    if (factor != T(1)) loops::scale(strips_for(count) * kStrip * dim, factor, to, to);
  }

  /// The inverse of `pack`, for results: multiplies the strips by `factor` and writes them to
  /// `count` rows of one head.
  static void unpack(T* from, T factor, Index row, Index count, Index head, Index dim,
                     MatrixOut<T>& to);

  /// Multiplies each row of the scores [rows, kStrip] by its factor.
  static void scale_rows(const T* factors, Index rows, T* scores) {
    for (Index r = 0; r < rows; ++r) {
      loops::scale<T>(kStrip, factors[r], scores + r * kStrip, scores + r * kStrip);
    }
  }

  /// Multiplies `count` columns of strips [rows, kStrip], each by its factor.
  static void scale_columns(const T* factors, Index count, Index rows, T* strips);

  /// scores = softcap * tanh(scores), [rows, kStrip].
  static void cap(T softcap, Index rows, T* scores) {
    loops::scaled_tanh<T>(rows * kStrip, softcap, scores, scores);
  }

  /// slopes = 1 - tanh(scores)^2, then scores = softcap * tanh(scores); both [rows, kStrip].
  static void cap(T softcap, Index rows, T* scores, T* slopes) {
    for (Index i = 0; i < rows * kStrip; i += kLanes<T>) {
      const Lanes<T> tangent = tanh_lanes<T>(load_lanes<T>(scores + i));
      store_lanes<T>(softcap * tangent, scores + i);
      store_lanes<T>(T(1) - tangent * tangent, slopes + i);
    }
  }

  /// Raises `top` [kStrip] to the largest score of its column, turns scores [rows, kStrip] into
  /// exp(score - top) and adds them to `total` [kStrip]. Sums made with a smaller top, in `total`
  /// and in `sum` [value_dim, kStrip], are scaled to the new one.
  static void soften(Index rows, T* scores, T* top, T* total, T* sum, Index value_dim);

  /// The largest scores [kStrip] of a strip's columns, and sums relative to them: of shares
  /// [kStrip] and of values [value_dim, kStrip].
  struct Sums {
    T* top;
    T* total;
    T* sum;
  };

  /// Adds the sums over a run of keys to those over the runs before, and begins the next run.
  static void end_run(const Sums& run, const Sums& all, Index value_dim);

 private:
  static constexpr Index kVectors = kStrip / kLanes<T>;
};

template <class T>
void ScoreStrips<T>::scale_columns(const T* factors, Index count, Index rows, T* strips) {
  for (Index strip = 0; strip < strips_for(count); ++strip) {
    for (Index vector = 0; vector < kStrip; vector += kLanes<T>) {
      const Lanes<T> factor = load_lanes<T>(factors + strip * kStrip + vector);
      for (Index r = 0; r < rows; ++r) {
        T* const at = strips + (strip * rows + r) * kStrip + vector;
        store_lanes<T>(load_lanes<T>(at) * factor, at);
      }
    }
  }
}

template <class T>
void ScoreStrips<T>::unpack(T* from, T factor, Index row, Index count, Index head, Index dim,
                            MatrixOut<T>& to) {
  if (factor != T(1)) loops::scale(strips_for(count) * kStrip * dim, factor, from, from);
  for (Index i = 0; i < count; i += kLanes<T>) {
    const T* const columns = from + i / kStrip * kStrip * dim + i % kStrip;
    const Index lanes = std::min(kLanes<T>, count - i);
    T* const target = &to(row + i, head * dim);
    Index d = 0;
    if (lanes == kLanes<T>) {
      for (; d + kLanes<T> <= dim; d += kLanes<T>) {
        kernels::transpose<T>(columns + d * kStrip, kStrip, target + d, to.outerStride());
      }
    }
    for (; d < dim; ++d) {
      for (Index lane = 0; lane < lanes; ++lane) {
        target[lane * to.outerStride() + d] = columns[d * kStrip + lane];
      }
    }
  }
}

template <class T>
void ScoreStrips<T>::soften(Index rows, T* scores, T* top, T* total, T* sum, Index value_dim) {
  Lanes<T> new_top[kVectors];
  for (Index j = 0; j < kVectors; ++j) new_top[j] = load_lanes<T>(top + j * kLanes<T>);
  for (Index r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (Index j = 0; j < kVectors; ++j) {
      const Lanes<T> score = load_lanes<T>(scores + r * kStrip + j * kLanes<T>);
      new_top[j] = max_lanes<T>(new_top[j], score);
    }
  }
  for (Index j = 0; j < kVectors; ++j) {
    T* const column = scores + j * kLanes<T>;
    T* const of_total = total + j * kLanes<T>;
    const Lanes<T> old_top = load_lanes<T>(top + j * kLanes<T>);
    Lanes<T> sum_of_column = load_lanes<T>(of_total);
    if (any_lane<T>(new_top[j] != old_top)) {
      store_lanes<T>(new_top[j], top + j * kLanes<T>);
      const Lanes<T> shrink = exp_lanes<T>(old_top - new_top[j]);
      sum_of_column *= shrink;
      for (Index d = 0; d < value_dim; ++d) {
        T* const s = sum + d * kStrip + j * kLanes<T>;
        store_lanes<T>(load_lanes<T>(s) * shrink, s);
      }
    }
    for (Index r = 0; r < rows; ++r) {
      const Lanes<T> p = exp_lanes<T>(load_lanes<T>(column + r * kStrip) - new_top[j]);
      store_lanes<T>(p, column + r * kStrip);
      sum_of_column += p;
    }
    store_lanes<T>(sum_of_column, of_total);
  }
}

template <class T>
void ScoreStrips<T>::end_run(const Sums& run, const Sums& all, Index value_dim) {
  T keep[kStrip];
  T add[kStrip];
  merge_tops<T>(kStrip, run.top, all.top, keep, add);
  merge_sums<T>(kStrip, keep, add, run.total, all.total);
  for (Index d = 0; d < value_dim; ++d) {
    merge_sums<T>(kStrip, keep, add, run.sum + d * kStrip, all.sum + d * kStrip);
  }
  std::fill_n(run.top, kStrip, std::numeric_limits<T>::lowest());
  std::fill_n(run.total, kStrip, T(0));
  std::fill_n(run.sum, kStrip * value_dim, T(0));
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template struct weir::ScoreStrips<float>;
extern template struct weir::ScoreStrips<double>;
#endif
