// SPDX-License-Identifier: MIT
/// \file
/// A router made of any layer.
#pragma once

#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// The logits are what a layer makes of the tokens: a network of several matrices, a norm in front
/// of a projection, or any other of yours. It is trained with the rest.
///
///     z = layer(x)     [tokens, d_model] -> [tokens, experts]
///
/// Causal if the layer is.
template <Layer Inner>
class LayerRouter {
 public:
  using Scalar = typename Inner::Scalar;
  using T = Scalar;

  struct Cache {
    typename Inner::Cache inner;
    Matrix<T> logits, dx;  ///< Where the layer returns its own by value.
  };

  /// \throws ConfigError  unless d_model >= 1 and experts >= 1.
  LayerRouter(Inner inner, Index d_model, Index experts)
      : inner_(std::move(inner)), d_model_(d_model), experts_(experts) {
    expect_at_least<Index>("LayerRouter", "d_model", d_model, 1);
    expect_at_least<Index>("LayerRouter", "experts", experts, 1);
  }

  Matrix<T> forward(MatrixIn<T> x) const {
    Cache cache;
    return forward(x, cache);
  }
  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const { return forward(x, {}, cache); }

  /// \param x        [tokens, d_model]
  /// \return         Logits [tokens, experts].
  /// \throws ShapeError   if x does not have d_model columns, or the layer yields another shape.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    expect_columns("LayerRouter::forward", "x", x, d_model_);
    const Matrix<T>& logits = keep<T>(cache.logits, apply(inner_, x, pass, cache.inner));
    expect_shape("LayerRouter::forward", "the layer's output", logits, x.rows(), experts_);
    return logits;
  }

  /// \throws              As the layer.
  const Matrix<T>& backward(MatrixIn<T> d_logits, Cache& cache) {
    return keep<T>(cache.dx, inner_.backward(d_logits, cache.inner));
  }

  /// The layer's own parameters.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    Inner::visit(self.inner_, visit);
  }

  Index d_model() const { return d_model_; }
  Index experts() const { return experts_; }
  Inner& layer() { return inner_; }
  const Inner& layer() const { return inner_; }

 private:
  Inner inner_;
  Index d_model_, experts_;
};

}  // namespace weir
