// SPDX-License-Identifier: MIT
/// \file
/// Matrix products on all threads, one or many at once, whose results do not depend on the number
/// of threads and which allocate nothing once warm.
#pragma once

#include <algorithm>
#include <cstring>
#include <span>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/simd.hpp>
#include <weir/kernels/thread_space.hpp>

namespace weir {

/// One matrix product, operands described by their strides so that a transposed one needs no copy:
///
///     out[i, j] = sum_p a[i, p] b[p, j]           (added to out[i, j] if `accumulate`)
///
/// with a[i, p] at `a + i * a_row + p * a_col`, b[p, j] at `b + p * b_row + j * b_col` and out[i,
/// j] at `out + i * out_row + j`. `out` must not overlap the operands.
template <class T>
struct Product {
  Index m = 0, n = 0, k = 0;
  const T* a = nullptr;
  Index a_row = 0, a_col = 0;
  const T* b = nullptr;
  Index b_row = 0, b_col = 0;
  T* out = nullptr;
  Index out_row = 0;
  bool accumulate = false;
};

namespace kernels {

/// Register block: kRows x kCols numbers of `out` are accumulated in registers.
template <class T>
struct Block {
  static constexpr Index kVectors = kVectorRegisters == 32 ? 4 : 2;
  static constexpr Index kRows = 6;
  static constexpr Index kCols = kVectors * Simd<T>::kLanes;
};

/// Cache block: the largest tile of `out` one task computes, and the depth packed at once.
inline constexpr Index kTileRows = 192;
inline constexpr Index kTileCols = 512;
inline constexpr Index kDepth = 256;

/// Copies [count, depth] into strips of `width` rows, depth-major inside a strip:
/// `to[strip][p][i]`; the last strip is filled up with zeros.
template <Index width, class T>
void pack(const T* from, Index stride, Index depth_stride, Index count, Index depth, T* to) {
  for (Index i0 = 0; i0 < count; i0 += width) {
    const Index rows = std::min(width, count - i0);
    const T* strip = from + i0 * stride;
    if (rows == width && stride == 1) {
      for (Index p = 0; p < depth; ++p) {
        std::memcpy(to + p * width, strip + p * depth_stride, width * sizeof(T));
      }
    } else if (rows == width) {
      // Rows in blocks of depth, so that both sides stay in L1.
      constexpr Index kStep = 16;
      for (Index p0 = 0; p0 < depth; p0 += kStep) {
        const Index end = std::min(depth, p0 + kStep);
        for (Index i = 0; i < width; ++i) {
          const T* source = strip + i * stride;
          for (Index p = p0; p < end; ++p) to[p * width + i] = source[p * depth_stride];
        }
      }
    } else {
      for (Index p = 0; p < depth; ++p) {
        for (Index i = 0; i < width; ++i) {
          to[p * width + i] = i < rows ? strip[i * stride + p * depth_stride] : T(0);
        }
      }
    }
    to += width * depth;
  }
}

/// out[0..rows, 0..kCols] (+)= one strip of a times one strip of b.
template <class T, Index rows, bool accumulate>
void multiply_block(const T* a, const T* b, Index depth, T* out, Index out_row) {
  using S = Simd<T>;
  using B = Block<T>;
  typename S::Vector sum[rows][B::kVectors];
#pragma GCC unroll 8
  for (Index i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (Index j = 0; j < B::kVectors; ++j) {
      if constexpr (accumulate) {
        sum[i][j] = S::load(out + i * out_row + j * S::kLanes);
      } else {
        sum[i][j] = typename S::Vector{};
      }
    }
  }
#pragma GCC unroll 1
  for (Index p = 0; p < depth; ++p) {
    typename S::Vector column[B::kVectors];
#pragma GCC unroll 8
    for (Index j = 0; j < B::kVectors; ++j) column[j] = S::load(b + j * S::kLanes);
    b += B::kCols;
#pragma GCC unroll 8
    for (Index i = 0; i < rows; ++i) {
      const T factor = a[i];
#pragma GCC unroll 8
      for (Index j = 0; j < B::kVectors; ++j) sum[i][j] += factor * column[j];
    }
    a += B::kRows;
  }
#pragma GCC unroll 8
  for (Index i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (Index j = 0; j < B::kVectors; ++j) S::store(sum[i][j], out + i * out_row + j * S::kLanes);
  }
}

/// `multiply_block` for a number of rows known at run time.
template <class T, Index rows = Block<T>::kRows>
void multiply_rows(Index count, const T* a, const T* b, Index depth, T* out, Index out_row,
                   bool accumulate) {
  if constexpr (rows > 1) {
    if (count < rows) {
      return multiply_rows<T, rows - 1>(count, a, b, depth, out, out_row, accumulate);
    }
  }
  if (accumulate) {
    multiply_block<T, rows, true>(a, b, depth, out, out_row);
  } else {
    multiply_block<T, rows, false>(a, b, depth, out, out_row);
  }
}

/// Computes the tile of `out` with `rows` rows from `row` and `cols` columns from `col`.
template <class T>
void multiply_tile(const Product<T>& p, Index row, Index rows, Index col, Index cols) {
  using B = Block<T>;
  // Of one size for all products, so that it is allocated once.
  auto& space = ThreadSpace<T, Product<T>>::of_this_thread();
  space.reserve((kTileRows + kTileCols) * kDepth);
  T* const packed_a = space.take(kTileRows * kDepth);
  T* const packed_b = space.take(kTileCols * kDepth);
  T* tile = p.out + row * p.out_row + col;
  if (p.k == 0 && !p.accumulate) {
    for (Index i = 0; i < rows; ++i) std::fill_n(tile + i * p.out_row, cols, T(0));
  }
  for (Index depth0 = 0; depth0 < p.k; depth0 += kDepth) {
    const Index depth = std::min(kDepth, p.k - depth0);
    const bool accumulate = p.accumulate || depth0 > 0;
    pack<B::kRows>(p.a + row * p.a_row + depth0 * p.a_col, p.a_row, p.a_col, rows, depth, packed_a);
    pack<B::kCols>(p.b + depth0 * p.b_row + col * p.b_col, p.b_col, p.b_row, cols, depth, packed_b);
    for (Index j = 0; j < cols; j += B::kCols) {
      const T* b = packed_b + j * depth;
      const Index width = std::min(B::kCols, cols - j);
      for (Index i = 0; i < rows; i += B::kRows) {
        const T* a = packed_a + i * depth;
        const Index height = std::min(B::kRows, rows - i);
        T* out = tile + i * p.out_row + j;
        if (width == B::kCols) {
          multiply_rows(height, a, b, depth, out, p.out_row, accumulate);
        } else {
          T edge[B::kRows * B::kCols];
          multiply_rows(height, a, b, depth, edge, B::kCols, false);
          for (Index r = 0; r < height; ++r) {
            for (Index c = 0; c < width; ++c) {
              T& target = out[r * p.out_row + c];
              target = (accumulate ? target : T(0)) + edge[r * B::kCols + c];
            }
          }
        }
      }
    }
  }
}

/// Columns `col` to `col + cols` of a product of few rows whose operands are both contiguous along
/// k: dot products, each element of b read once.
template <class T>
void multiply_few_rows(const Product<T>& p, Index col, Index cols) {
  using S = Simd<T>;
  constexpr Index kStreams = 4;
  const Index whole = p.k / (kStreams * S::kLanes) * (kStreams * S::kLanes);
  for (Index i = 0; i < p.m; ++i) {
    const T* a = p.a + i * p.a_row;
    for (Index j = col; j < col + cols; ++j) {
      const T* b = p.b + j * p.b_col;
      typename S::Vector sum[kStreams] = {};
      for (Index q = 0; q < whole; q += kStreams * S::kLanes) {
#pragma GCC unroll 4
        for (Index s = 0; s < kStreams; ++s) {
          sum[s] += S::load(a + q + s * S::kLanes) * S::load(b + q + s * S::kLanes);
        }
      }
      T total = S::sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
      for (Index q = whole; q < p.k; ++q) total += a[q] * b[q];
      T& target = p.out[i * p.out_row + j];
      target = p.accumulate ? target + total : total;
    }
  }
}

/// How a product is cut into tasks; depends on shapes alone, never on the number of threads.
struct Tiling {
  Index rows, cols;  ///< of one tile
  bool few_rows;

  template <class T>
  static Tiling of(const Product<T>& p, Index tile_rows, Index tile_cols) {
    constexpr Index kFew = 4;
    if (p.m <= kFew && p.a_col == 1 && p.b_row == 1) return {std::max<Index>(1, p.m), 64, true};
    return {tile_rows, tile_cols, false};
  }

  template <class T>
  Index down(const Product<T>& p) const {
    return (p.m + rows - 1) / rows;
  }
  template <class T>
  Index across(const Product<T>& p) const {
    return (p.n + cols - 1) / cols;
  }
  template <class T>
  Index tasks(const Product<T>& p) const {
    return down(p) * across(p);
  }
};

}  // namespace kernels

/// Computes all `products`, which must not write to the same place, with all threads sharing the
/// tiles of all of them: one expert with most of the tokens keeps every core busy.
template <class T>
void multiply(std::span<const Product<T>> products) {
  using kernels::Tiling;
  constexpr Index kSerialWork = 100'000;  // Multiply-adds below which waking a thread costs more.
  constexpr Index kEnoughTasks = 16;
  constexpr Index kSmallestTile = 48;

  Index work = 0;
  for (const Product<T>& p : products) work += p.m * p.n * p.k;
  Index tile_rows = kernels::kTileRows;
  Index tile_cols = kernels::kTileCols;
  const auto count_tasks = [&] {
    Index tasks = 0;
    for (const Product<T>& p : products) tasks += Tiling::of(p, tile_rows, tile_cols).tasks(p);
    return tasks;
  };
  Index tasks = count_tasks();
  while (tasks < kEnoughTasks && work > kSerialWork && tile_rows > kSmallestTile) {
    (tile_cols > tile_rows ? tile_cols : tile_rows) /= 2;
    tasks = count_tasks();
  }

  const auto run = [&](Index task) {
    for (const Product<T>& p : products) {
      const Tiling tiling = Tiling::of(p, tile_rows, tile_cols);
      if (task >= tiling.tasks(p)) {
        task -= tiling.tasks(p);
        continue;
      }
      const Index row = task % tiling.down(p) * tiling.rows;
      const Index col = task / tiling.down(p) * tiling.cols;
      const Index cols = std::min(tiling.cols, p.n - col);
      if (tiling.few_rows) return kernels::multiply_few_rows(p, col, cols);
      return kernels::multiply_tile(p, row, std::min(tiling.rows, p.m - row), col, cols);
    }
  };
  if (work <= kSerialWork) {
    for (Index task = 0; task < tasks; ++task) run(task);
  } else {
    parallel_for(tasks, run);
  }
}

/// The product out (+)= a b^T, for example tokens [m, k] times a weight [n, k].
template <class T>
Product<T> product_nt(MatrixIn<T> a, MatrixIn<T> b, MatrixOut<T> out, bool accumulate = false) {
  return {a.rows(), b.rows(), a.cols(),        a.data(),   a.outerStride(),   1,
          b.data(), 1,        b.outerStride(), out.data(), out.outerStride(), accumulate};
}

/// The product out (+)= a b, for example a gradient [m, k] times a weight [k, n].
template <class T>
Product<T> product_nn(MatrixIn<T> a, MatrixIn<T> b, MatrixOut<T> out, bool accumulate = false) {
  return {a.rows(), b.cols(),        a.cols(), a.data(),   a.outerStride(),   1,
          b.data(), b.outerStride(), 1,        out.data(), out.outerStride(), accumulate};
}

/// The product out (+)= a^T b, for example a gradient [k, m] times tokens [k, n].
template <class T>
Product<T> product_tn(MatrixIn<T> a, MatrixIn<T> b, MatrixOut<T> out, bool accumulate = false) {
  return {a.cols(), b.cols(),        a.rows(),          a.data(),
          1,        a.outerStride(), b.data(),          b.outerStride(),
          1,        out.data(),      out.outerStride(), accumulate};
}

/// out = a b^T; a [m, k], b [n, k], out [m, n].
/// \throws ShapeError   if the shapes do not fit.
template <class T>
void multiply_nt(MatrixIn<T> a, MatrixIn<T> b, MatrixOut<T> out, bool accumulate = false) {
  expect_shape("multiply_nt", "b", b, b.rows(), a.cols());
  expect_shape("multiply_nt", "out", out, a.rows(), b.rows());
  const Product<T> product = product_nt<T>(a, b, out, accumulate);
  multiply<T>({&product, 1});
}

/// out = a b; a [m, k], b [k, n], out [m, n].
/// \throws ShapeError   if the shapes do not fit.
template <class T>
void multiply_nn(MatrixIn<T> a, MatrixIn<T> b, MatrixOut<T> out, bool accumulate = false) {
  expect_shape("multiply_nn", "b", b, a.cols(), b.cols());
  expect_shape("multiply_nn", "out", out, a.rows(), b.cols());
  const Product<T> product = product_nn<T>(a, b, out, accumulate);
  multiply<T>({&product, 1});
}

/// out = a^T b; a [k, m], b [k, n], out [m, n].
/// \throws ShapeError   if the shapes do not fit.
template <class T>
void multiply_tn(MatrixIn<T> a, MatrixIn<T> b, MatrixOut<T> out, bool accumulate = false) {
  expect_shape("multiply_tn", "b", b, a.rows(), b.cols());
  expect_shape("multiply_tn", "out", out, a.cols(), b.cols());
  const Product<T> product = product_tn<T>(a, b, out, accumulate);
  multiply<T>({&product, 1});
}

}  // namespace weir
