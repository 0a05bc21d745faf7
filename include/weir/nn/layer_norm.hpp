// SPDX-License-Identifier: MIT
/// \file
/// Layer normalisation (Ba et al. 2016, arXiv:1607.06450).
#pragma once

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

/// Settings of `LayerNorm`.
struct LayerNormConfig {
  double epsilon = 1e-5;
  bool bias = true;
};

/// Shifts each row to zero mean and scales it to unit variance, then scales and shifts each column:
///
///     y = (x - mean(x)) / sqrt(var(x) + epsilon) * g + b
///
/// var divides by d_model. Padding is not read and yields zero, see PaddingRows. (Ba et al. 2016,
/// arXiv:1607.06450, eq. 4, with the epsilon of common practice.)
template <std::floating_point T>
class LayerNorm {
 public:
  using Scalar = T;

  struct Cache {
    CacheState state;
    Matrix<T> normal;       ///< [tokens, d_model]: (x - mean) / sqrt(var + epsilon).
    Matrix<T> inverse_std;  ///< [tokens, 1].
    Matrix<T> y, dx;
    PaddingRows padding;
    Scratch<T> d_parameters;  ///< [runs of tokens, 2 d_model]: the weight's, then the bias's.
  };

  /// The weight starts at one, the bias at zero.
  /// \throws ConfigError  unless d_model and epsilon are positive.
  explicit LayerNorm(Index d_model, LayerNormConfig config = {}) : config_(config) {
    expect_positive("LayerNorm", "d_model", d_model);
    expect_positive("LayerNorm", "epsilon", config_.epsilon);
    weight_.value.setOnes(1, d_model);
    if (config.bias) set_zero(bias_.value, 1, d_model);
  }

  /// \param x        [tokens, d_model].
  /// \return         [tokens, d_model].
  /// \throws ShapeError   if x does not have d_model columns, or pass.mask does not fit.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const;

  /// With n the normalised row and a = dy g:
  ///
  ///     dg += sum_t dy n,   db += sum_t dy
  ///     dx = (a - mean(a) - n mean(a n)) / sqrt(var + epsilon)
  ///
  /// \param dy       [tokens, d_model], of the last forward pass.
  /// \return         dL/dx, [tokens, d_model].
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if dy does not have the shape of the result.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache);

  Index d_model() const { return weight_.value.cols(); }
  const LayerNormConfig& config() const { return config_; }
  bool has_bias() const { return config_.bias; }

  const Parameter<T>& weight() const { return weight_; }
  Parameter<T>& weight() { return weight_; }
  /// Empty if there is none.
  const Parameter<T>& bias() const { return bias_; }
  Parameter<T>& bias() { return bias_; }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("weight", self.weight_);
    if (self.has_bias()) visit("bias", self.bias_);
  }

 private:
  /// Writes the normalised row and returns 1 / sqrt(var + epsilon).
  T normalise_row(const T* x, T* normal) const;

  void affine_row(const T* normal, T* y) const;

  Parameter<T> weight_;  // [1, d_model]
  Parameter<T> bias_;    // [1, d_model] or empty
  LayerNormConfig config_;
};

template <std::floating_point T>
const Matrix<T>& LayerNorm<T>::forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
  cache.state.begin();
  expect_columns("LayerNorm::forward", "x", x, d_model());
  cache.padding.set("LayerNorm::forward", pass, x.rows());
  set_shape(cache.y, x.rows(), d_model());
  if (pass.training) {
    set_shape(cache.normal, x.rows(), d_model());
    set_shape(cache.inverse_std, x.rows(), 1);
  }
  parallel_rows(x.rows(), 4 * d_model(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      if (cache.padding.contains(t)) {
        cache.y.row(t).setZero();
        continue;
      }
      T* const normal = pass.training ? &cache.normal(t, 0) : &cache.y(t, 0);
      const T inverse_std = normalise_row(&x.coeffRef(t, 0), normal);
      if (pass.training) cache.inverse_std(t, 0) = inverse_std;
      affine_row(normal, &cache.y(t, 0));
    }
  });
  return cache.state.finish(*this, pass, cache.y);
}

template <std::floating_point T>
const Matrix<T>& LayerNorm<T>::backward(MatrixIn<T> dy, Cache& cache) {
  cache.state.begin_backward("LayerNorm::backward", *this, dy);
  set_shape(cache.dx, dy.rows(), d_model());
  const T* const g = weight_.value.data();
  sum_runs_of_rows<T>(dy.rows(), 2 * d_model(), cache.d_parameters, [&](Index t, T* sums) {
    if (cache.padding.contains(t)) {
      cache.dx.row(t).setZero();
      return;
    }
    const T* const d = &dy.coeffRef(t, 0);
    const T* const normal = &cache.normal(t, 0);
    const T inverse_std = cache.inverse_std(t, 0);
    const auto columns = static_cast<T>(d_model());
    const T mean = loops::dot(d_model(), d, g) / columns;
    const T along = loops::dot(d_model(), d, g, normal) / columns;
    const auto to_x = [=](const Lanes<T>& dv, const Lanes<T>& w, const Lanes<T>& n) -> Lanes<T> {
      return inverse_std * (dv * w - mean - along * n);
    };
    map_lanes<T>(d_model(), to_x, &cache.dx(t, 0), d, g, normal);
    const auto to_weight = [](const Lanes<T>& sum, const Lanes<T>& dv,
                              const Lanes<T>& n) -> Lanes<T> { return sum + dv * n; };
    map_lanes<T>(d_model(), to_weight, sums, sums, d, normal);
    T* const d_bias = sums + d_model();
    loops::add<T>(d_model(), d_bias, d, d_bias);
  });
  const auto sums = cache.d_parameters.view();
  add_rows_to<T>(sums.leftCols(d_model()), weight_.gradient().data());
  if (has_bias()) add_rows_to<T>(sums.rightCols(d_model()), bias_.gradient().data());
  return cache.dx;
}

template <std::floating_point T>
T LayerNorm<T>::normalise_row(const T* x, T* normal) const {
  const auto d = static_cast<T>(d_model());
  const T mean = loops::sum(d_model(), x) / d;
  const auto square = [mean](const Lanes<T>& v) -> Lanes<T> { return (v - mean) * (v - mean); };
  const T variance = sum_lanes<T>(d_model(), square, x) / d;
  const T inverse_std = T(1) / std::sqrt(variance + static_cast<T>(config_.epsilon));
  const auto f = [=](const Lanes<T>& v) -> Lanes<T> { return (v - mean) * inverse_std; };
  map_lanes<T>(d_model(), f, normal, x);
  return inverse_std;
}

template <std::floating_point T>
void LayerNorm<T>::affine_row(const T* normal, T* y) const {
  if (has_bias()) {
    const auto f = [](const Lanes<T>& n, const Lanes<T>& w, const Lanes<T>& b) -> Lanes<T> {
      return n * w + b;
    };
    map_lanes<T>(d_model(), f, y, normal, weight_.value.data(), bias_.value.data());
  } else {
    loops::multiply(d_model(), normal, weight_.value.data(), y);
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::LayerNorm<float>;
extern template class weir::LayerNorm<double>;
#endif
