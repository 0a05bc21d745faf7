// SPDX-License-Identifier: MIT
/// \file
/// Root mean square layer normalisation (Zhang & Sennrich 2019, arXiv:1910.07467).
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>

#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/padding.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of `RmsNorm`.
struct RmsNormConfig {
  double epsilon = 1e-5;
};

/// Scales each row to unit root mean square, then each column by a trained weight:
///
///     y = x / sqrt(mean(x^2) + epsilon) * g
///
/// Padding is not read and yields zero, see PaddingRows.
/// (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4, with the epsilon of common practice.)
template <std::floating_point T>
class RmsNorm {
 public:
  using Scalar = T;

  struct Cache {
    CacheState state;
    Matrix<T> x, y, dx;
    PaddingRows padding;
    Matrix<T> inverse_rms;  ///< [tokens, 1].
    Scratch<T> d_weight;    ///< [runs of tokens, d_model].
  };

  /// The weight starts at one.
  /// \throws ConfigError  unless d_model and epsilon are positive.
  explicit RmsNorm(Index d_model, RmsNormConfig config = {}) : config_(config) {
    expect_positive("RmsNorm", "d_model", d_model);
    expect_positive("RmsNorm", "epsilon", config_.epsilon);
    weight_.value.setOnes(1, d_model);
  }

  /// \param x        [tokens, d_model].
  /// \return         [tokens, d_model].
  /// \throws ShapeError   if x does not have d_model columns, or pass.mask does not fit.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const;

  /// With r the inverse root mean square of a row:
  ///
  ///     dg += sum_t dy x r,   dx = r (dy g - x r^2 mean(dy g x))
  ///
  /// \param dy       [tokens, d_model], of the last forward pass.
  /// \return         dL/dx, [tokens, d_model].
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if dy does not have the shape of the result.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache);

  Index d_model() const { return weight_.value.cols(); }
  const RmsNormConfig& config() const { return config_; }

  const Parameter<T>& weight() const { return weight_; }
  Parameter<T>& weight() { return weight_; }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("weight", self.weight_);
  }

 private:
  T inverse_rms(const T* x) const {
    const T mean = loops::sum_of_squares(d_model(), x) / static_cast<T>(d_model());
    return T(1) / std::sqrt(mean + static_cast<T>(config_.epsilon));
  }

  void scale_row(const T* x, T factor, T* y) const {
    const auto f = [factor](const Lanes<T>& v, const Lanes<T>& w) -> Lanes<T> {
      return factor * v * w;
    };
    map_lanes<T>(d_model(), f, y, x, weight_.value.data());
  }

  Parameter<T> weight_;  // [1, d_model]
  RmsNormConfig config_;
};

template <std::floating_point T>
const Matrix<T>& RmsNorm<T>::forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
  cache.state.begin();
  expect_columns("RmsNorm::forward", "x", x, d_model());
  cache.padding.set("RmsNorm::forward", pass, x.rows());
  set_shape(cache.y, x.rows(), d_model());
  if (pass.training) {
    set_shape(cache.x, x.rows(), d_model());
    set_shape(cache.inverse_rms, x.rows(), 1);
  }
  parallel_rows(x.rows(), 3 * d_model(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      if (cache.padding.contains(t)) {
        cache.y.row(t).setZero();
        continue;
      }
      const T* const row = &x.coeffRef(t, 0);
      const T r = inverse_rms(row);
      if (pass.training) {
        std::copy_n(row, d_model(), &cache.x(t, 0));
        cache.inverse_rms(t, 0) = r;
      }
      scale_row(row, r, &cache.y(t, 0));
    }
  });
  return cache.state.finish(*this, pass, cache.y);
}

template <std::floating_point T>
const Matrix<T>& RmsNorm<T>::backward(MatrixIn<T> dy, Cache& cache) {
  cache.state.begin_backward("RmsNorm::backward", *this, dy);
  set_shape(cache.dx, dy.rows(), d_model());
  const T* const g = weight_.value.data();
  sum_runs_of_rows<T>(dy.rows(), d_model(), cache.d_weight, [&](Index t, T* d_weight) {
    if (cache.padding.contains(t)) {
      cache.dx.row(t).setZero();
      return;
    }
    const T* const d = &dy.coeffRef(t, 0);
    const T* const x = &cache.x(t, 0);
    const T r = cache.inverse_rms(t, 0);
    const T along_x = r * r * loops::dot(d_model(), d, g, x) / static_cast<T>(d_model());
    const auto to_x = [=](const Lanes<T>& dv, const Lanes<T>& w, const Lanes<T>& v) -> Lanes<T> {
      return r * (dv * w - along_x * v);
    };
    map_lanes<T>(d_model(), to_x, &cache.dx(t, 0), d, g, x);
    const auto to_weight = [=](const Lanes<T>& sum, const Lanes<T>& dv,
                               const Lanes<T>& v) -> Lanes<T> { return sum + dv * v * r; };
    map_lanes<T>(d_model(), to_weight, d_weight, d_weight, d, x);
  });
  add_rows_to<T>(cache.d_weight.view(), weight_.gradient().data());
  return cache.dx;
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::RmsNorm<float>;
extern template class weir::RmsNorm<double>;
#endif
