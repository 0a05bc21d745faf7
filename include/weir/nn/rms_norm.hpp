// SPDX-License-Identifier: MIT
/// \file
/// Root mean square layer normalization (Zhang & Sennrich 2019, arXiv:1910.07467).
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Scales each row to unit root mean square, then each column by a trained weight:
///
///     y = x / sqrt(mean(x^2) + epsilon) * g
///
/// (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4, with the epsilon of common practice.)
template <std::floating_point T>
class RmsNorm {
 public:
  using Scalar = T;

  struct Cache {
    Matrix<T> x, y, dx;
    Matrix<T> inverse_rms;  ///< [tokens, 1].
    Scratch<T> d_weight;    ///< Of runs of tokens.
  };

  /// The weight starts at one.
  /// \throws ConfigError  unless d_model and epsilon are positive.
  explicit RmsNorm(Index d_model, double epsilon = 1e-5) : epsilon_(epsilon) {
    expect_positive("RmsNorm", "d_model", d_model);
    expect_positive("RmsNorm", "epsilon", epsilon);
    weight_.value.setOnes(1, d_model);
  }

  /// \param x        [tokens, d_model].
  /// \return         [tokens, d_model].
  /// \throws ShapeError   if x does not have d_model columns.
  Matrix<T> forward(MatrixIn<T> x) const {
    expect_columns("RmsNorm::forward", "x", x, d_model());
    Matrix<T> y(x.rows(), d_model());
    parallel_rows(x.rows(), 2 * d_model(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t)
        scale_row(&x.coeffRef(t, 0), inverse_rms(&x.coeffRef(t, 0)), &y(t, 0));
    });
    return y;
  }

  /// The same, keeping what `backward` needs.
  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const {
    expect_columns("RmsNorm::forward", "x", x, d_model());
    cache.x.resize(x.rows(), d_model());
    cache.y.resize(x.rows(), d_model());
    cache.inverse_rms.resize(x.rows(), 1);
    parallel_rows(x.rows(), 3 * d_model(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        const T* const row = &x.coeffRef(t, 0);
        std::copy_n(row, d_model(), &cache.x(t, 0));
        cache.inverse_rms(t, 0) = inverse_rms(row);
        scale_row(row, cache.inverse_rms(t, 0), &cache.y(t, 0));
      }
    });
    return cache.y;
  }

  /// With r the inverse root mean square of a row:
  ///
  ///     dg += sum_t dy x r,   dx = r (dy g - x r^2 mean(dy g x))
  ///
  /// \param dy       [tokens, d_model], of the last forward pass.
  /// \return         dL/dx, [tokens, d_model].
  /// \throws StateError   if the cache has seen no forward pass.
  /// \throws ShapeError   if dy does not have the shape of the result.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    if (cache.y.cols() != d_model()) {
      fail<StateError>("RmsNorm::backward: no forward pass before it");
    }
    expect_shape("RmsNorm::backward", "dy", dy, cache.x.rows(), d_model());
    cache.dx.resize(dy.rows(), d_model());
    const T* const g = weight_.value.data();
    sum_runs_of_rows<T>(dy.rows(), d_model(), cache.d_weight, [&](Index t, T* d_weight) {
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

  Index d_model() const { return weight_.value.cols(); }
  double epsilon() const { return epsilon_; }

  const Parameter<T>& weight() const { return weight_; }
  Parameter<T>& weight() { return weight_; }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("weight", self.weight_);
  }

 private:
  T inverse_rms(const T* x) const {
    const T mean = loops::sum_of_squares(d_model(), x) / static_cast<T>(d_model());
    return T(1) / std::sqrt(mean + static_cast<T>(epsilon_));
  }

  void scale_row(const T* x, T factor, T* y) const {
    const auto f = [factor](const Lanes<T>& v, const Lanes<T>& w) -> Lanes<T> {
      return factor * v * w;
    };
    map_lanes<T>(d_model(), f, y, x, weight_.value.data());
  }

  Parameter<T> weight_;  // [1, d_model]
  double epsilon_;
};

}  // namespace weir
