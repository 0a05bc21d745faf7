// SPDX-License-Identifier: MIT
/// \file
/// What an expert's logit is turned into where each expert is scored by itself.
#pragma once

#include <cmath>

#include <weir/core/types.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// The score s of an expert with the logit z.
enum class ScoreFunction {
  kSigmoid,       ///< 1 / (1 + exp(-z)): DeepSeek-V3.
  kSqrtSoftplus,  ///< sqrt(log(1 + exp(z))): Megatron-Core's `sqrtsoftplus`, DeepSeek-V4.
};

namespace detail {

template <class T>
Lanes<T> sqrt_softplus_lanes(const Lanes<T>& z) {
  Lanes<T> score{};
  for (int lane = 0; lane < static_cast<int>(kLanes<T>); ++lane) {
    const T x = z[lane];
    const T softplus = (x > T(0) ? x : T(0)) + std::log1p(std::exp(-std::abs(x)));
    score[lane] = std::sqrt(softplus);
  }
  return score;
}

}  // namespace detail

/// The scores [count] of the logits z [count]; `score` may be `z`.
template <class T>
void score_row(ScoreFunction function, Index count, const T* z, T* score) {
  if (function == ScoreFunction::kSigmoid) {
    map_lanes<T>(count, sigmoid_lanes<T>, score, z);
  } else {
    map_lanes<T>(count, detail::sqrt_softplus_lanes<T>, score, z);
  }
}

/// Adds the gradient of the logits z [count]: dz[i] += ds[i] s'(z[i]).
template <class T>
void add_score_backward_row(ScoreFunction function, Index count, const T* z, const T* ds, T* dz) {
  const auto of_sigmoid = [](const Lanes<T>& sum, const Lanes<T>& x,
                             const Lanes<T>& d) -> Lanes<T> {
    const Lanes<T> s = sigmoid_lanes<T>(x);
    return sum + d * (s * (T(1) - s));
  };
  // sigmoid(z) / (2 s); zero where s is zero, which is its limit.
  const auto of_sqrt_softplus = [](const Lanes<T>& sum, const Lanes<T>& x,
                                   const Lanes<T>& d) -> Lanes<T> {
    const Lanes<T> s = detail::sqrt_softplus_lanes<T>(x);
    const Lanes<T> slope = sigmoid_lanes<T>(x) / (T(2) * s);
    return sum + d * (s > T(0) ? slope : Lanes<T>{});
  };
  if (function == ScoreFunction::kSigmoid) {
    map_lanes<T>(count, of_sigmoid, dz, dz, z, ds);
  } else {
    map_lanes<T>(count, of_sqrt_softplus, dz, dz, z, ds);
  }
}

}  // namespace weir
