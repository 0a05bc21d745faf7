// SPDX-License-Identifier: MIT
/// \file
/// Loops over the rows of matrices, on all threads.
#pragma once

#include <algorithm>

#include <weir/core/parallel.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Calls `body(row, col, count)` for pieces of at most 1024 columns that cover [rows, cols], on all
/// threads. Elementwise work done in such pieces stays in L1 and is shared out even if there is
/// only one row. `cost` is roughly how many elementary operations one element takes.
template <class Body>
void parallel_pieces(Index rows, Index cols, Index cost, Body&& body) {
  constexpr Index kPiece = 1024;
  const Index per_row = (cols + kPiece - 1) / kPiece;
  parallel_rows(rows * per_row, cost * std::min(cols, kPiece), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      const Index col = i % per_row * kPiece;
      body(i / per_row, col, std::min(kPiece, cols - col));
    }
  });
}

/// `to` = `from`, on all threads; `to` is resized.
template <class T>
void copy_rows_to(MatrixIn<T> from, MatrixOut<T> to) {
  parallel_pieces(from.rows(), from.cols(), 1, [&](Index t, Index col, Index count) {
    std::copy_n(&from.coeffRef(t, col), count, &to(t, col));
  });
}
template <class T>
void copy_rows(MatrixIn<T> from, Matrix<T>& to) {
  set_shape(to, from.rows(), from.cols());
  copy_rows_to<T>(from, to);
}

/// sum = a + b, on all threads; `sum` has their shape and may be one of them.
template <class T>
void add_rows(MatrixIn<T> a, MatrixIn<T> b, MatrixOut<T> sum) {
  parallel_pieces(a.rows(), a.cols(), 1, [&](Index t, Index col, Index count) {
    loops::add(count, &a.coeffRef(t, col), &b.coeffRef(t, col), &sum(t, col));
  });
}

/// sum = a + factor * b, on all threads; `sum` has their shape and may be one of them.
template <class T>
void add_scaled_rows(MatrixIn<T> a, T factor, MatrixIn<T> b, MatrixOut<T> sum) {
  parallel_pieces(a.rows(), a.cols(), 1, [&](Index t, Index col, Index count) {
    loops::blend(count, T(1), &a.coeffRef(t, col), factor, &b.coeffRef(t, col), &sum(t, col));
  });
}

/// product = a * b, elementwise, on all threads; `product` is resized.
template <class T>
void multiply_rows(MatrixIn<T> a, MatrixIn<T> b, Matrix<T>& product) {
  set_shape(product, a.rows(), a.cols());
  parallel_pieces(a.rows(), a.cols(), 1, [&](Index t, Index col, Index count) {
    loops::multiply(count, &a.coeffRef(t, col), &b.coeffRef(t, col), &product(t, col));
  });
}

/// to = factor * from, on all threads; `to` is resized.
template <class T>
void scale_rows(T factor, MatrixIn<T> from, Matrix<T>& to) {
  set_shape(to, from.rows(), from.cols());
  parallel_pieces(from.rows(), from.cols(), 1, [&](Index t, Index col, Index count) {
    loops::scale(count, factor, &from.coeffRef(t, col), &to(t, col));
  });
}

/// rows[t] += row for each t, on all threads.
/// \param row  As many numbers as `rows` has columns.
template <class T>
void add_to_each_row(const T* row, MatrixOut<T> rows) {
  parallel_pieces(rows.rows(), rows.cols(), 1, [&](Index t, Index col, Index count) {
    loops::add(count, &rows(t, col), row + col, &rows(t, col));
  });
}

/// out[j] += sum_t f(t, j, count) for j in [0, cols), where `f` gives the `count` lanes of row t
/// from column j on. This is the gradient of parameters that all rows share. Threads divide the
/// columns; rows are added from the first to the last.
template <class T, class F>
void add_over_rows(Index rows, Index cols, T* out, F&& f) {
  constexpr Index kBlocks = 8;  // Side by side, so that whole cache lines are read.
  constexpr Index kWidth = kBlocks * kLanes<T>;
  parallel_rows((cols + kWidth - 1) / kWidth, rows * kWidth, [&](Index begin, Index end) {
    for (Index first = begin * kWidth; first < std::min(cols, end * kWidth); first += kWidth) {
      Lanes<T> sum[kBlocks] = {};
      for (Index t = 0; t < rows; ++t) {
        for (Index b = 0; b < kBlocks; ++b) {
          const Index col = first + b * kLanes<T>;
          if (col < cols) sum[b] += f(t, col, std::min(kLanes<T>, cols - col));
        }
      }
      for (Index b = 0; b < kBlocks; ++b) {
        const Index col = first + b * kLanes<T>;
        if (col >= cols) break;
        const Index count = std::min(kLanes<T>, cols - col);
        store_lanes<T>(load_lanes<T>(out + col, count) + sum[b], out + col, count);
      }
    }
  });
}

/// out[j] += sum_t rows[t, j], from the first row to the last.
template <class T>
void add_rows_to(MatrixIn<T> rows, T* out) {
  const auto row = [&](Index t, Index col, Index count) -> Lanes<T> {
    return load_lanes<T>(&rows.coeffRef(t, col), count);
  };
  add_over_rows<T>(rows.rows(), rows.cols(), out, row);
}

/// Sums over rows that are read for another purpose as well: `body(t, sums)` adds the contribution
/// of row t to `sums` [width]. Each run of rows has sums of its own, computed by one thread, which
/// are a row of `sums`; `add_rows_to` can add them up. The runs do not depend on the number of
/// threads.
template <class T, class Body>
void sum_runs_of_rows(Index rows, Index width, Scratch<T>& sums, Body&& body) {
  constexpr Index kMostRuns = 64;
  constexpr Index kFewestRows = 16;
  const Index run = std::max(kFewestRows, (rows + kMostRuns - 1) / kMostRuns);
  auto of_runs = sums.reshape((rows + run - 1) / run, width);
  parallel_rows(of_runs.rows(), run * width, [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      of_runs.row(i).setZero();
      for (Index t = i * run; t < std::min(rows, (i + 1) * run); ++t) body(t, &of_runs(i, 0));
    }
  });
}

}  // namespace weir
