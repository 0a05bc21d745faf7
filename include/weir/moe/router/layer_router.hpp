// SPDX-License-Identifier: MIT
/// \file
/// A router made of any layer.
#pragma once

#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/router_wrapper.hpp>

namespace weir {

namespace detail {

/// What LayerRouter is apart from its `forward` and `backward`: a router without noise, groups and
/// vectors of experts.
template <Layer Inner>
class LayerRouterBase : public RouterBase<typename Inner::Scalar> {
 public:
  struct Cache {
    CacheState state;
    typename Inner::Cache inner;
  };

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.inner_);
  }

 protected:
  explicit LayerRouterBase(Inner inner) : inner_(std::move(inner)) {}

  Inner inner_;
};

/// If the layer is a router, LayerRouter has the router's.
template <Router Inner>
class LayerRouterBase<Inner> : public RouterWrapper<Inner> {
 protected:
  using RouterWrapper<Inner>::RouterWrapper;
};

}  // namespace detail

/// The logits are what a layer makes of the tokens: a network of several matrices, a norm in front
/// of a projection, or any other of yours. It is trained with the rest.
///
///     z = layer(x)     [tokens, d_model] -> [tokens, experts]
///
/// Causal if the layer is. A layer that is a router already keeps its noise, groups and vectors of
/// experts. The weights of the layer keep full precision in every storage, as those of any router.
template <Layer Inner>
class LayerRouter : public detail::LayerRouterBase<Inner> {
 public:
  using T = typename Inner::Scalar;
  using typename detail::LayerRouterBase<Inner>::Cache;

  /// \throws ConfigError  unless d_model >= 1 and experts >= 1.
  LayerRouter(Inner inner, Index d_model, Index experts)
      : detail::LayerRouterBase<Inner>(std::move(inner)), d_model_(d_model), experts_(experts) {
    expect_at_least<Index>("LayerRouter", "d_model", d_model, 1);
    expect_at_least<Index>("LayerRouter", "experts", experts, 1);
  }

  /// \param x        [tokens, d_model]
  /// \return         Logits [tokens, experts].
  /// \throws ShapeError   if x does not have d_model columns, or the layer yields another shape.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    expect_columns("LayerRouter::forward", "x", x, d_model_);
    const Matrix<T>& logits = this->inner_.forward(x, pass, cache.inner);
    expect_shape("LayerRouter::forward", "the layer's output", logits, x.rows(), experts_);
    return cache.state.finish(*this, pass, logits);
  }

  /// \param d_logits  [tokens, experts], of the last forward pass.
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if d_logits does not have the shape of the logits.
  const Matrix<T>& backward(MatrixIn<T> d_logits, Cache& cache) {
    cache.state.begin_backward("LayerRouter::backward", *this, d_logits);
    return this->inner_.backward(d_logits, cache.inner);
  }

  Index d_model() const { return d_model_; }
  Index experts() const { return experts_; }
  Inner& layer() { return this->inner_; }
  const Inner& layer() const { return this->inner_; }

 private:
  Index d_model_, experts_;
};

}  // namespace weir
