// SPDX-License-Identifier: MIT
/// \file
/// Sampled routing: Gumbel noise on the logits of any router.
#pragma once

#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/router/group_count.hpp>
#include <weir/moe/router/noise.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// In training the logits are
///
///     z + scale * G,    G standard Gumbel, one draw per token and expert
///
/// and otherwise z, those of the inner router. With scale 1 the k largest are k experts drawn
/// without replacement from softmax(z) (Kool et al. 2019, arXiv:1903.06059). Choice and weights are
/// both made of the noisy logits, as in NoisyRouter; for the weights of z, see SampledChoice. G is
/// constant to the derivative. Needs `pass.rng` in training.
template <Layer Inner, class Noise = GumbelNoise>
requires NoiseSource<Noise, typename Inner::Scalar>
class GumbelRouter {
 public:
  using Scalar = typename Inner::Scalar;
  using T = Scalar;

  struct Cache {
    typename Inner::Cache inner;
    Matrix<T> noise, logits;
    Matrix<T> dx;  ///< Where the inner router returns its own by value.
  };

  /// \throws ConfigError  if scale < 0.
  explicit GumbelRouter(Inner inner, double scale = 1.0, Noise noise = {})
      : inner_(std::move(inner)), scale_(scale), noise_(std::move(noise)) {
    expect_at_least("GumbelRouter", "scale", scale, 0.0);
  }

  Matrix<T> forward(MatrixIn<T> x) const { return inner_.forward(x); }

  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const { return forward(x, {}, cache); }

  /// \throws ConfigError  if pass.training without a pass.rng.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    if (!pass.training || scale_ == 0.0) {
      return keep(cache.logits, apply(inner_, x, pass, cache.inner));
    }
    expect_columns("GumbelRouter::forward", "x", x, d_model());
    cache.noise.resize(x.rows(), experts());
    noise_.fill(pass, MatrixOut<T>(cache.noise));
    cache.noise *= static_cast<T>(scale_);
    const Matrix<T>& clean = keep(cache.logits, apply(inner_, x, pass, cache.inner));
    cache.logits.resize(x.rows(), experts());
    add_rows<T>(clean, cache.noise, cache.logits);
    return cache.logits;
  }

  const Matrix<T>& backward(MatrixIn<T> d_logits, Cache& cache) {
    return keep(cache.dx, inner_.backward(d_logits, cache.inner));
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    Inner::visit(self.inner_, visit);
  }

  Index d_model() const { return inner_.d_model(); }
  Index experts() const { return inner_.experts(); }
  Index groups() const requires GroupedRouter<Inner> { return inner_.groups(); }

 private:
  Inner inner_;
  double scale_;
  Noise noise_;
};

}  // namespace weir
