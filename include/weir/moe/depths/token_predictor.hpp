// SPDX-License-Identifier: MIT
/// \file
/// A small network that gives each token one logit: the auxiliary predictor of MixtureOfDepths.
#pragma once

#include <concepts>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/storage.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/ops/activation.hpp>

namespace weir {

/// One logit for each token, from a network with one hidden layer:
///
///     p_t = w_out act(W_in x_t + b_in) + b_out
///
/// W_in [d_hidden, d_model], w_out [1, d_hidden]; the biases may be left out.
/// (The "small auxiliary MLP predictor" of Raposo et al. 2024, arXiv:2404.02258, section 3.5, which
/// does not tell its size.)
template <std::floating_point T, Activation Act = Relu>
class TokenPredictor {
 public:
  using Scalar = T;

  struct Cache {
    typename Linear<T>::Cache in, out;
    Matrix<T> h, dz;
  };

  /// Weights as in `Linear`; biases start at zero.
  /// \throws ConfigError  unless sizes and scale are positive.
  TokenPredictor(Index d_model, Index d_hidden, Rng& rng, LinearConfig config = {.bias = true})
      : in_(d_model, d_hidden, rng, config), out_(d_hidden, 1, rng, config) {}

  /// \param in       d_model -> d_hidden
  /// \param out      d_hidden -> 1
  /// \throws ConfigError  if they do not fit each other.
  TokenPredictor(Linear<T> in, Linear<T> out) : in_(std::move(in)), out_(std::move(out)) {
    if (out_.d_in() != in_.d_out() || out_.d_out() != 1) {
      throw_error<ConfigError>("TokenPredictor: out is [", out_.d_out(), ", ", out_.d_in(),
                               "], expected [1, ", in_.d_out(), "]");
    }
  }

  /// \param x        [tokens, d_model]
  /// \return         [tokens, 1]
  /// \throws ShapeError   if x does not have d_model columns.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    const Matrix<T>& z = in_.forward(x, pass, cache.in);
    set_shape(cache.h, z.rows(), z.cols());
    activation_forward<Act, T>(z, cache.h);
    return out_.forward(cache.h, pass, cache.out);
  }

  /// \param dy       [tokens, 1], of the last forward pass.
  /// \return         dL/dx, [tokens, d_model].
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if dy does not have the shape of the result.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    const Matrix<T>& dh = out_.backward(dy, cache.out);
    set_shape(cache.dz, dh.rows(), dh.cols());
    activation_backward<Act, T>(cache.in.y, dh, cache.dz);
    return in_.backward(cache.dz, cache.in);
  }

  /// The weights keep full precision in every storage, as those of a router: they choose tokens.
  void set_storage(Storage /*storage*/) {}

  /// Parameters `in.*` and `out.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("in", self.in_);
    visit("out", self.out_);
  }

  Index d_model() const { return in_.d_in(); }
  Index d_hidden() const { return in_.d_out(); }

 private:
  Linear<T> in_;   // [d_hidden, d_model]
  Linear<T> out_;  // [1, d_hidden]
};

}  // namespace weir
