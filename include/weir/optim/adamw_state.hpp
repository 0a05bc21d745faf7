// SPDX-License-Identifier: MIT
/// \file
/// What AdamW remembers about a parameter, and the steps that the parameter has missed.
#pragma once

#include <cmath>
#include <optional>
#include <string>

#include <weir/core/types.hpp>

namespace weir {

/// What AdamW remembers about one parameter.
template <class T>
struct Moments {
  Matrix<T> first;   ///< m, shaped like the parameter; empty until its first update.
  Matrix<T> second;  ///< v, shaped like the parameter; empty until its first update.
  Index steps = 0;   ///< t: how many updates the parameter has had, missed ones included.
  Matrix<T> missed;  ///< The numbers of MissedSteps; empty unless there were any.
};

/// The state of AdamW for one parameter: the moments, and what its group set.
template <class T>
struct AdamWState {
  Moments<T> moments = {};
  double learning_rate_factor = 1.0;
  std::optional<double> weight_decay = {};
};

/// The moments of the parameter called `name`.
template <class T>
struct NamedMoments {
  std::string name;
  Moments<T>* moments;
};

/// One step of AdamW for a parameter:
///
///     w <- keep * w - rate * m / (root * sqrt(v) + epsilon)
template <class T>
struct AdamWCoefficients {
  T keep = T(1);
  T rate = T(0);
  T root = T(1);
};

/// Steps of AdamW without a gradient, put together. In each of them m fades by beta1 and v by
/// beta2, so that n steps are
///
///     w <- keep * w - move * m / (sqrt(v) + epsilon),    m <- first * m,    v <- second * v
///
///     keep = prod_i keep_i,    first = beta1^n,    second = beta2^n
///     move = sum_i (prod_{j > i} keep_j) rate_i / root_i (beta1 / sqrt(beta2))^i
///
/// This is exact up to rounding and epsilon, which a step compares with sqrt(v) as it is then.
template <class T>
class MissedSteps {
 public:
  /// The numbers live in `numbers`, [1, 4], which is empty if no step was ever missed.
  explicit MissedSteps(Matrix<T>& numbers) : numbers_(numbers) {}

  bool any() const { return numbers_.size() > 0 && second() != T(1); }
  T keep() const { return numbers_(0, 0); }
  T move() const { return numbers_(0, 1); }
  T first() const { return numbers_(0, 2); }
  T second() const { return numbers_(0, 3); }

  /// Adds a step.
  void add(const AdamWCoefficients<T>& step, double beta1, double beta2) {
    if (numbers_.size() == 0) numbers_ = none();
    numbers_(0, 2) *= static_cast<T>(beta1);
    numbers_(0, 3) *= static_cast<T>(beta2);
    numbers_(0, 0) *= step.keep;
    const T rate = step.rate / step.root;
    const T fade = second() > T(0) ? first() / std::sqrt(second()) : T(0);
    numbers_(0, 1) = step.keep * move() + rate * fade;
  }

  /// Forgets them. Keeps the memory.
  void clear() {
    if (numbers_.size() > 0) numbers_ = none();
  }

 private:
  static Eigen::Matrix<T, 1, 4> none() { return {T(1), T(0), T(1), T(1)}; }

  Matrix<T>& numbers_;
};

}  // namespace weir
