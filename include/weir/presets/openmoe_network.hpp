// SPDX-License-Identifier: MIT
/// \file
/// The feed-forward network of OpenMoE's released code.
#pragma once

#include <concepts>

#include <weir/core/error.hpp>
#include <weir/core/random.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>
#include <weir/ops/activation.hpp>
#include <weir/ops/rows.hpp>

namespace weir::presets {

/// A gated network with one matrix more than the usual:
///
///     y = (silu(x gate^T) * (x up^T) * (x linear^T)) down^T
///
/// T5's activations ('swiglu', 'linear') multiply what a projection for each yields, and 'swiglu'
/// alone takes two of them. (Xue et al. 2024, arXiv:2402.01739; the released code, not the paper.)
template <std::floating_point T>
class OpenMoENetwork {
 public:
  using Scalar = T;

  struct Cache {
    typename Linear<T>::Cache gate, up, linear, down;
    Matrix<T> product, h;                   ///< up * linear, and that gated; [tokens, d_hidden].
    Matrix<T> d_product, d_gate, d_factor;  ///< [tokens, d_hidden]
    Matrix<T> dx;                           ///< [tokens, d_model]
  };

  /// Weights from `switch_init`.
  /// \throws ConfigError  unless sizes and scale are positive.
  OpenMoENetwork(Index d_model, Index d_hidden, Rng& rng, double init_scale = 1.0)
      : gate_(d_model, d_hidden, rng, {.init_scale = init_scale}),
        up_(d_model, d_hidden, rng, {.init_scale = init_scale}),
        linear_(d_model, d_hidden, rng, {.init_scale = init_scale}),
        down_(d_hidden, d_model, rng, {.init_scale = init_scale}) {}

  Matrix<T> forward(MatrixIn<T> x) const {
    Cache cache;
    return forward(x, cache);
  }

  /// \param x        [tokens, d_model].
  /// \return         [tokens, d_model].
  /// \throws ShapeError   if x does not have d_model columns.
  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const {
    expect_columns("OpenMoENetwork::forward", "x", x, gate_.d_in());
    const Matrix<T>& gate = gate_.forward(x, cache.gate);
    multiply_rows<T>(up_.forward(x, cache.up), linear_.forward(x, cache.linear), cache.product);
    cache.h.resize(x.rows(), gate.cols());
    glu_forward<Silu, T>(gate, cache.product, cache.h);
    return down_.forward(cache.h, cache.down);
  }

  /// Adds to the gradients of all four matrices.
  /// \param dy       [tokens, d_model], of the last forward pass.
  /// \return         dL/dx, [tokens, d_model].
  /// \throws StateError   if the cache has seen no forward pass, or if the weights are stored for
  ///                      inference.
  /// \throws ShapeError   if dy does not have the shape of the result.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    expect_trainable("OpenMoENetwork::backward", storage_);
    if (cache.h.cols() != down_.d_in()) {
      fail<StateError>("OpenMoENetwork::backward: no forward pass before it");
    }
    expect_shape("OpenMoENetwork::backward", "dy", dy, cache.h.rows(), down_.d_out());
    const Matrix<T>& dh = down_.backward(dy, cache.down);
    cache.d_gate.resize(dh.rows(), dh.cols());
    cache.d_product.resize(dh.rows(), dh.cols());
    glu_backward<Silu, T>(cache.gate.y, cache.product, dh, cache.d_gate, cache.d_product);
    cache.dx = gate_.backward(cache.d_gate, cache.gate);
    multiply_rows<T>(cache.d_product, cache.linear.y, cache.d_factor);
    add_rows<T>(cache.dx, up_.backward(cache.d_factor, cache.up), cache.dx);
    multiply_rows<T>(cache.d_product, cache.up.y, cache.d_factor);
    add_rows<T>(cache.dx, linear_.backward(cache.d_factor, cache.linear), cache.dx);
    return cache.dx;
  }

  /// See `weir::set_storage`.
  void set_storage(Storage storage) {
    for (Linear<T>* part : {&gate_, &up_, &linear_, &down_}) part->set_storage(storage);
    storage_ = storage;
  }

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
  Storage storage_ = Storage::kTrainable;
};

}  // namespace weir::presets
