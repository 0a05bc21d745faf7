// SPDX-License-Identifier: MIT
/// \file
/// The feed-forward network of OpenMoE's released code.
#pragma once

#include <concepts>

#include <weir/core/cache_state.hpp>
#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>
#include <weir/ops/activation.hpp>
#include <weir/ops/rows.hpp>

namespace weir::presets {

/// Settings of `OpenMoENetwork`.
struct OpenMoENetworkConfig {
  double init_scale = 1.0;  ///< `scale` of `switch_init`.
};

/// A gated network with one matrix more than the usual:
///
///     y = (silu(x gate^T) * (x up^T) * (x linear^T)) down^T
///
/// T5 multiplies one projection for each activation in its list ('swiglu', 'linear'), and 'swiglu'
/// takes two. (Xue et al. 2024, arXiv:2402.01739; this is the released code, not the paper.)
template <std::floating_point T>
class OpenMoENetwork {
 public:
  using Scalar = T;

  struct Cache {
    CacheState state;
    typename Linear<T>::Cache gate, up, linear, down;
    Matrix<T> product, h;                   ///< up * linear, and that gated; [tokens, d_hidden].
    Matrix<T> d_product, d_gate, d_factor;  ///< [tokens, d_hidden]
    Matrix<T> dx;                           ///< [tokens, d_model]
  };

  /// Weights from `switch_init`.
  /// \throws ConfigError  unless sizes and scale are positive.
  OpenMoENetwork(Index d_model, Index d_hidden, Rng& rng, OpenMoENetworkConfig config = {})
      : gate_(d_model, d_hidden, rng, {.init_scale = config.init_scale}),
        up_(d_model, d_hidden, rng, {.init_scale = config.init_scale}),
        linear_(d_model, d_hidden, rng, {.init_scale = config.init_scale}),
        down_(d_hidden, d_model, rng, {.init_scale = config.init_scale}) {}

  /// \param x        [tokens, d_model].
  /// \return         [tokens, d_model].
  /// \throws ShapeError   if x does not have d_model columns.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const;

  /// Adds to the gradients of all four matrices.
  /// \param dy       [tokens, d_model], of the last forward pass.
  /// \return         dL/dx, [tokens, d_model].
  /// \throws StateError   if the cache does not fit, see CacheState, or if the weights are stored
  ///                      for inference.
  /// \throws ShapeError   if dy does not have the shape of the result.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache);

  /// Parameters `gate.weight`, `up.weight`, `linear.weight` and `down.weight`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("gate", self.gate_);
    visit("up", self.up_);
    visit("linear", self.linear_);
    visit("down", self.down_);
  }

 private:
  Linear<T> gate_, up_, linear_, down_;
};

template <std::floating_point T>
const Matrix<T>& OpenMoENetwork<T>::forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
  cache.state.begin();
  expect_columns("OpenMoENetwork::forward", "x", x, gate_.d_in());
  const Matrix<T>& gate = gate_.forward(x, pass, cache.gate);
  multiply_rows<T>(up_.forward(x, pass, cache.up), linear_.forward(x, pass, cache.linear),
                   cache.product);
  set_shape(cache.h, x.rows(), gate.cols());
  glu_forward<Silu, T>(gate, cache.product, cache.h);
  return cache.state.finish(*this, pass, down_.forward(cache.h, pass, cache.down));
}

template <std::floating_point T>
const Matrix<T>& OpenMoENetwork<T>::backward(MatrixIn<T> dy, Cache& cache) {
  cache.state.begin_backward("OpenMoENetwork::backward", *this, dy);
  const Matrix<T>& dh = down_.backward(dy, cache.down);
  set_shape(cache.d_gate, dh.rows(), dh.cols());
  set_shape(cache.d_product, dh.rows(), dh.cols());
  glu_backward<Silu, T>(cache.gate.y, cache.product, dh, cache.d_gate, cache.d_product);
  assign(cache.dx, gate_.backward(cache.d_gate, cache.gate));
  multiply_rows<T>(cache.d_product, cache.linear.y, cache.d_factor);
  add_rows<T>(cache.dx, up_.backward(cache.d_factor, cache.up), cache.dx);
  multiply_rows<T>(cache.d_product, cache.up.y, cache.d_factor);
  add_rows<T>(cache.dx, linear_.backward(cache.d_factor, cache.linear), cache.dx);
  return cache.dx;
}

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template class weir::presets::OpenMoENetwork<float>;
extern template class weir::presets::OpenMoENetwork<double>;
#endif
