// SPDX-License-Identifier: MIT
/// \file
/// Blocks of numbers as wide as a vector register, and loops over contiguous numbers made of them:
/// what activations, softmax and norms are computed in.
#pragma once

#include <algorithm>
#include <limits>

#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// As many numbers as the widest vector register holds. Eigen treats the ends of an unaligned array
/// with other code than its middle, which rounds differently; in blocks of fixed size an element
/// gets the same bits wherever it lies in memory.
template <class T>
using Lanes = Eigen::Array<T, 64 / sizeof(T), 1>;

/// How many numbers a block of lanes has.
template <class T>
inline constexpr Index kLanes = Lanes<T>::SizeAtCompileTime;

/// The `count` <= kLanes numbers from `from` on, followed by zeros.
template <class T>
Lanes<T> load_lanes(const T* from, Index count) {
  if (count >= kLanes<T>) return Eigen::Map<const Lanes<T>>(from);
  Lanes<T> lanes = Lanes<T>::Zero();
  for (Index i = 0; i < count; ++i) lanes[i] = from[i];
  return lanes;
}

/// The first `count` <= kLanes lanes to `to`.
template <class T>
void store_lanes(const Lanes<T>& lanes, T* to, Index count) {
  if (count >= kLanes<T>) {
    Eigen::Map<Lanes<T>>{to} = lanes;
  } else {
    for (Index i = 0; i < count; ++i) to[i] = lanes[i];
  }
}

/// out[i] = f(in[i]...) for i in [0, count), `f` being given and returning `Lanes<T>`. `out` may be
/// one of the inputs.
template <class T, class F, class... In>
void map_lanes(Index count, F&& f, T* out, const In*... in) {
  Index i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    store_lanes<T>(f(load_lanes<T>(in + i, kLanes<T>)...), out + i, kLanes<T>);
  }
  if (i < count) store_lanes<T>(f(load_lanes<T>(in + i, count - i)...), out + i, count - i);
}

/// The sum of f(in[i]...) for i in [0, count), in an order that depends on `count` alone.
template <class T, class F, class... In>
T sum_lanes(Index count, F&& f, const T* first, const In*... in) {
  Lanes<T> sum = Lanes<T>::Zero();
  Index i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    sum += f(load_lanes<T>(first + i, kLanes<T>), load_lanes<T>(in + i, kLanes<T>)...);
  }
  if (i < count) {
    const Lanes<T> last =
        f(load_lanes<T>(first + i, count - i), load_lanes<T>(in + i, count - i)...);
    for (Index lane = 0; lane < count - i; ++lane) sum[lane] += last[lane];
  }
  return sum.sum();
}

/// Calls `body(row, col, count)` for pieces of at most 1024 columns that cover [rows, cols], on all
/// threads: elementwise work in steps that stay in L1, shared out even if there is only one row.
/// `cost` is roughly how many elementary operations one element takes.
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

/// out[j] += sum_t f(t, j, count) for j in [0, cols), `f` giving the `count` lanes from column j on
/// of row t: the gradient of what all rows share. Threads divide the columns, rows are added from
/// the first to the last.
template <class T, class F>
void add_over_rows(Index rows, Index cols, T* out, F&& f) {
  constexpr Index kBlocks = 4;  // Side by side, so that whole cache lines are read.
  constexpr Index kWidth = kBlocks * kLanes<T>;
  parallel_rows((cols + kWidth - 1) / kWidth, rows * kWidth, [&](Index begin, Index end) {
    for (Index first = begin * kWidth; first < std::min(cols, end * kWidth); first += kWidth) {
      Lanes<T> sum[kBlocks];
      for (Lanes<T>& lanes : sum) lanes.setZero();
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

/// max(x, 0); a NaN stays a NaN.
template <class T>
Lanes<T> rectify_lanes(const Lanes<T>& x) {
  Lanes<T> y;
  for (Index i = 0; i < kLanes<T>; ++i) y[i] = x[i] < T(0) ? T(0) : x[i];
  return y;
}

/// exp(x), but exactly zero where it would be below the normal numbers, also for x = -inf. (Eigen's
/// vector code stops at the edge of what a number can hold.)
template <class T>
Lanes<T> exp_lanes(const Lanes<T>& x) {
  return rectify_lanes<T>(x.exp() - std::numeric_limits<T>::min());
}

/// 1 / (1 + exp(-x)).
template <class T>
Lanes<T> sigmoid_lanes(const Lanes<T>& x) {
  return (T(1) + exp_lanes<T>(-x)).inverse();
}

}  // namespace weir
