// SPDX-License-Identifier: MIT
/// \file
/// Large matrices of zeros, made by all threads.
#pragma once

#include <algorithm>

#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Makes `m` zeros, on all threads.
template <class T>
void set_zero_in_parallel(Matrix<T>& m) {
  constexpr Index kPiece = 4096;  // A task writes a few of them.
  parallel_rows((m.size() + kPiece - 1) / kPiece, kPiece, [&](Index begin, Index end) {
    std::fill(m.data() + begin * kPiece, m.data() + std::min(m.size(), end * kPiece), T(0));
  });
}

/// Makes `m` zeros, [rows, cols], on all threads. Where its memory is new, they share the work of
/// the system too, which sets up each page when it is first written to. If memory runs out, `m` is
/// empty.
template <class T>
void set_zero_in_parallel(Matrix<T>& m, Index rows, Index cols) {
  set_shape(m, rows, cols);
  set_zero_in_parallel(m);
}

}  // namespace weir
