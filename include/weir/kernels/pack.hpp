// SPDX-License-Identifier: MIT
/// \file
/// Copies of operands in the order in which the innermost loop reads them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <weir/core/types.hpp>
#include <weir/kernels/bfloat16.hpp>
#include <weir/kernels/transpose.hpp>
#include <weir/ops/lanes.hpp>

namespace weir::kernels {

/// Copies [count, depth], count <= width, depth-major: number [i, p] goes to `to[p * to_row + i]`.
/// The places from `count` to `width` are filled with zeros.
template <Index width, class T>
void pack_strip(const T* from, Index stride, Index depth_stride, Index count, Index depth, T* to,
                Index to_row = width) {
  constexpr Index kSide = kLanes<T>;
  if (stride == 1) {
    for (Index p = 0; p < depth; ++p) {
      const T* row = from + p * depth_stride;
      T* out = to + p * to_row;
      if (count == width) {
        std::memcpy(out, row, width * sizeof(T));
      } else {
        std::copy_n(row, count, out);
        std::fill_n(out + count, width - count, T(0));
      }
    }
    return;
  }
  // Number by number, the rows from `first` on; and what is to be zero.
  const auto copy = [&](Index first, Index begin, Index end) {
    for (Index i = first; i < count; ++i) {
      const T* source = from + i * stride;
      for (Index p = begin; p < end; ++p) to[p * to_row + i] = source[p * depth_stride];
    }
    for (Index p = begin; p < end && count < width; ++p) {
      std::fill_n(to + p * to_row + count, width - count, T(0));
    }
  };
  Index done = 0;
  if constexpr (width >= kSide) {
    constexpr Index kAhead = 4;  // Squares: more rows than a processor follows by itself.
    const Index squares = count / kSide * kSide;  // Rows that are whole squares.
    for (; depth_stride == 1 && done + kSide <= depth; done += kSide) {
      for (Index i = 0; i < squares; i += kSide) {
        for (Index r = i; r < i + kSide; ++r) {
          __builtin_prefetch(from + r * stride + done + kAhead * kSide, 0, 2);
        }
        transpose<T>(from + i * stride + done, stride, to + done * to_row + i, to_row);
      }
      copy(squares, done, done + kSide);
    }
  }
  // Works in blocks of depth, so that both sides stay in L1.
  constexpr Index kStep = 16;
  for (; done < depth; done += kStep) copy(0, done, std::min(depth, done + kStep));
}

/// Copies [count, depth] as numbers of 16 bits, two neighbours of a row side by side: numbers [i,
/// p] and [i, p + 1], p even, go to `to[p * to_row + 2 i]` and the place behind it, for `steps`
/// even p. Places beyond the numbers are filled with zeros.
template <Index width>
void pack_halves(const float* from, Index stride, Index count, Index depth, Index steps,
                 BFloat16* to, Index to_row) {
  // The two are moved as one.
  constexpr Index kPart = 64;
  std::int32_t pairs[width * kPart];
  std::int32_t columns[width * kPart];
  BFloat16 row[2 * kPart];
  for (Index done = 0; done < steps; done += kPart) {
    const Index part = std::min(kPart, steps - done);
    const Index length = std::clamp<Index>(depth - 2 * done, 0, 2 * part);
    std::fill(row + length, row + 2 * part, BFloat16());
    for (Index i = 0; i < count; ++i) {
      if (length > 0) round_to_bfloat16(length, from + i * stride + 2 * done, row);
      std::memcpy(pairs + i * kPart, row, static_cast<std::size_t>(part) * sizeof *pairs);
    }
    pack_strip<width>(pairs, kPart, 1, count, part, columns);
    for (Index s = 0; s < part; ++s) {
      std::memcpy(static_cast<void*>(to + (done + s) * 2 * to_row), columns + s * width,
                  width * sizeof *columns);
    }
  }
}

/// Copies [count, depth] into strips of `width` rows, depth-major inside a strip:
/// `to[strip][p][i]`; the last strip is filled up with zeros.
template <Index width, class T>
void pack(const T* from, Index stride, Index depth_stride, Index count, Index depth, T* to) {
  for (Index i = 0; i < count; i += width) {
    pack_strip<width>(from + i * stride, stride, depth_stride, std::min(width, count - i), depth,
                      to);
    to += width * depth;
  }
}

}  // namespace weir::kernels
