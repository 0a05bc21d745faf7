// SPDX-License-Identifier: MIT
/// \file
/// The logarithm of a sum of exponentials.
#pragma once

#include <cmath>
#include <limits>
#include <span>

#include <weir/core/types.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// log(sum_i exp(values[i])), shifted by the maximum so that no exponential overflows. It is -inf
/// if there is no value above -inf, and NaN if one is NaN.
template <class T>
T logsumexp(std::span<const T> values) {
  const auto count = static_cast<Index>(values.size());
  const T top = loops::max(count, values.data());
  if (top == -std::numeric_limits<T>::infinity()) {
    return count == 0 ? top : loops::sum(count, values.data());  // -inf, or the NaN.
  }
  const auto f = [top](const Lanes<T>& x) -> Lanes<T> { return exp_lanes<T>(x - top); };
  return top + std::log(sum_lanes<T>(count, f, values.data()));
}

}  // namespace weir
