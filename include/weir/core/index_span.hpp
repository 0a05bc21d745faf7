// SPDX-License-Identifier: MIT
/// \file
/// Spans whose places and sizes are Index.
#pragma once

#include <cstddef>
#include <span>

#include <weir/core/types.hpp>

namespace weir {

/// The `count` numbers from `first` on.
template <class T>
std::span<T> span_of(T* first, Index count) {
  return {first, static_cast<std::size_t>(count)};
}

/// Row `row` of a matrix whose rows are contiguous.
template <class M>
auto row_span(M&& matrix, Index row) {
  return span_of(matrix.data() + row * matrix.outerStride(), matrix.cols());
}

/// Element `i` of a span.
template <class T>
T& element(std::span<T> span, Index i) {
  return span[static_cast<std::size_t>(i)];
}

}  // namespace weir
