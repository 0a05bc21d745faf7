// SPDX-License-Identifier: MIT
/// \file
/// What an expert's logit is turned into where each expert is scored by itself.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

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

/// log s(z), also where s(z) is zero to rounding.
template <class T>
T log_score(ScoreFunction function, T z) {
  const T tail = std::log1p(std::exp(-std::abs(z)));
  if (function == ScoreFunction::kSigmoid) return std::min(z, T(0)) - tail;
  // softplus(z) = exp(z) up to rounding, far below zero.
  if (z < std::log(std::numeric_limits<T>::epsilon())) return T(0.5) * z;
  return T(0.5) * std::log(std::max(z, T(0)) + tail);
}

/// Adds the gradient of the logits z [count], given that of the logarithms of their scores:
/// dz[i] += d_log[i] d log s(z[i]) / dz[i], which is between 0 and 1.
template <class T>
void add_log_score_backward_row(ScoreFunction function, Index count, const T* z, const T* d_log,
                                T* dz) {
  // 1 - sigmoid(z)
  const auto of_sigmoid = [](const Lanes<T>& sum, const Lanes<T>& x,
                             const Lanes<T>& d) -> Lanes<T> {
    return sum + d * sigmoid_lanes<T>(-x);
  };
  // sigmoid(z) / (2 softplus(z)), which goes to 1/2.
  const auto of_sqrt_softplus = [](const Lanes<T>& sum, const Lanes<T>& x,
                                   const Lanes<T>& d) -> Lanes<T> {
    const T least = std::log(std::numeric_limits<T>::epsilon());
    const Lanes<T> half = Lanes<T>{} + T(0.5);
    const Lanes<T> safe = x < least ? Lanes<T>{} : x;
    const Lanes<T> s = detail::sqrt_softplus_lanes<T>(safe);
    const Lanes<T> slope = sigmoid_lanes<T>(safe) / (T(2) * s * s);
    return sum + d * (x < least ? half : slope);
  };
  if (function == ScoreFunction::kSigmoid) {
    map_lanes<T>(count, of_sigmoid, dz, dz, z, d_log);
  } else {
    map_lanes<T>(count, of_sqrt_softplus, dz, dz, z, d_log);
  }
}

}  // namespace weir
