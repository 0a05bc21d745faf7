// SPDX-License-Identifier: MIT
/// \file
/// What an expert's logit is turned into where each expert is scored by itself.
#pragma once

#include <cmath>

#include <weir/core/types.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>

namespace weir {

/// The score s of an expert with the logit z.
enum class ScoreFunction {
  kSigmoid,       ///< 1 / (1 + exp(-z)): DeepSeek-V3.
  kSqrtSoftplus,  ///< sqrt(log(1 + exp(z))): Megatron-Core's `sqrtsoftplus`, DeepSeek-V4.
};

namespace detail {

struct SigmoidScore {
  template <class T>
  static Lanes<T> value(const Lanes<T>& z) {
    return sigmoid_lanes<T>(z);
  }

  /// ds/dz.
  template <class T>
  static Lanes<T> slope(const Lanes<T>& z) {
    const Lanes<T> score = sigmoid_lanes<T>(z);
    return score * (T(1) - score);
  }
};

struct SqrtSoftplusScore {
  template <class T>
  static Lanes<T> value(const Lanes<T>& z) {
    Lanes<T> score{};
    for (int lane = 0; lane < static_cast<int>(kLanes<T>); ++lane) {
      const T x = z[lane];
      const T softplus = (x > T(0) ? x : T(0)) + std::log1p(std::exp(-std::abs(x)));
      score[lane] = std::sqrt(softplus);
    }
    return score;
  }

  /// sigmoid(z) / (2 s); zero where s is zero, which is its limit.
  template <class T>
  static Lanes<T> slope(const Lanes<T>& z) {
    const Lanes<T> score = value<T>(z);
    const Lanes<T> slope = sigmoid_lanes<T>(z) / (T(2) * score);
    return score > T(0) ? slope : Lanes<T>{};
  }
};

}  // namespace detail

}  // namespace weir
