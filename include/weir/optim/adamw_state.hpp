// SPDX-License-Identifier: MIT
/// \file
/// What AdamW remembers about a parameter, and the steps that the parameter has missed.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include <weir/core/types.hpp>
#include <weir/core/zeros.hpp>
#include <weir/kernels/bfloat16.hpp>
#include <weir/optim/parameter_states.hpp>

namespace weir {

/// What AdamW remembers about one parameter.
template <class T>
struct Moments {
  Matrix<T> first;   ///< m, shaped like the parameter; empty until its first update.
  Matrix<T> second;  ///< v, shaped like the parameter; empty until its first update.
  Index steps = 0;   ///< t: how many updates the parameter has had, missed ones included.
  Matrix<T> missed;  ///< The numbers of MissedSteps; empty unless there were any.
  /// m and v as numbers of 16 bits instead, see AdamWConfig::bfloat16_moments.
  Matrix<kernels::BFloat16> short_first = {}, short_second = {};

  /// Whether there were any updates, so that there is m and v.
  bool any() const { return first.size() + short_first.size() > 0; }

  /// Makes m and v zeros unless they are there.
  void make(const Matrix<T>& value, bool bfloat16) {
    const auto zeros = [&](auto& matrix) {
      if (matrix.size() == 0) set_zero_in_parallel(matrix, value.rows(), value.cols());
    };
    if (bfloat16) {
      zeros(short_first);
      zeros(short_second);
    } else {
      zeros(first);
      zeros(second);
    }
  }

  /// \throws ShapeError   unless they are empty or shaped like the parameter `name`.
  void check(std::string_view who, std::string_view name, const Matrix<T>& value) const {
    expect_like_value(who, "first moment", name, first, value);
    expect_like_value(who, "second moment", name, second, value);
    expect_like_value(who, "first moment", name, short_first, value);
    expect_like_value(who, "second moment", name, short_second, value);
  }

  SavedState<T> saved(std::string_view name, bool bfloat16) {
    SavedState<T> state = {std::string(name), {}, &steps};
    if (bfloat16) {
      state.halves = {{"first", &short_first}, {"second", &short_second}};
    } else {
      state.matrices = {{"first", &first}, {"second", &second}};
    }
    state.matrices.emplace_back("missed", &missed);
    return state;
  }
};

/// The moments of up to `most` neighbouring numbers of a parameter while a step changes them: in
/// place or, where they are numbers of 16 bits, widened in space of its own and rounded back to
/// nearest in the end.
template <class T, Index most>
class MomentBlock {
 public:
  using Values = Eigen::Map<Eigen::Array<T, Eigen::Dynamic, 1>>;

  MomentBlock(Moments<T>& moments, Index begin, Index size) {
    if (!moments.any()) return;
    size_ = size;
    if (moments.short_first.size() == 0) {
      m_ = moments.first.data() + begin;
      v_ = moments.second.data() + begin;
      return;
    }
    short_m_ = moments.short_first.data() + begin;
    short_v_ = moments.short_second.data() + begin;
    m_ = space_;
    v_ = space_ + most;
    for (Index i = 0; i < size; ++i) m_[i] = static_cast<T>(static_cast<float>(short_m_[i]));
    for (Index i = 0; i < size; ++i) v_[i] = static_cast<T>(static_cast<float>(short_v_[i]));
  }
  MomentBlock(const MomentBlock&) = delete;
  MomentBlock& operator=(const MomentBlock&) = delete;
  ~MomentBlock() {
    if (short_m_ == nullptr) return;
    round(m_, short_m_);
    round(v_, short_v_);
  }

  Values m() const { return {m_, size_}; }
  Values v() const { return {v_, size_}; }

 private:
  void round(const T* from, kernels::BFloat16* to) const {
    if constexpr (std::is_same_v<T, float>) {
      kernels::round_to_bfloat16(size_, from, to);
    } else {
      for (Index i = 0; i < size_; ++i) to[i] = kernels::BFloat16(static_cast<float>(from[i]));
    }
  }

  Index size_ = 0;
  T* m_ = nullptr;
  T* v_ = nullptr;
  kernels::BFloat16* short_m_ = nullptr;
  kernels::BFloat16* short_v_ = nullptr;
  T space_[2 * most];
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
    if (numbers_.size() == 0) forget();
    numbers_(0, 2) *= static_cast<T>(beta1);
    numbers_(0, 3) *= static_cast<T>(beta2);
    numbers_(0, 0) *= step.keep;
    const T rate = step.rate / step.root;
    const T fade = second() > T(0) ? first() / std::sqrt(second()) : T(0);
    numbers_(0, 1) = step.keep * move() + rate * fade;
  }

  /// Forgets them. Keeps the memory.
  void clear() {
    if (numbers_.size() > 0) forget();
  }

 private:
  // No steps, number by number: GCC 12 warns of a row of four where vectors have sixteen.
  void forget() {
    numbers_.setOnes(1, 4);
    numbers_(0, 1) = T(0);
  }

  Matrix<T>& numbers_;
};

}  // namespace weir
