// SPDX-License-Identifier: MIT
/// \file
/// The feed-forward network of two layers (Vaswani et al. 2017, arXiv:1706.03762).
#pragma once

#include <array>
#include <concepts>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/init.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/core/workspace.hpp>
#include <weir/nn/linear.hpp>
#include <weir/ops/activation.hpp>
#include <weir/ops/padding.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// a = act(z), elementwise on [rows, d_hidden]. `a` may be `z`.
template <Activation Act, class T>
void activation_forward(MatrixIn<T> z, MatrixOut<T> a) {
  constexpr Index kCost = 8;
  parallel_pieces(z.rows(), z.cols(), kCost, [&](Index t, Index col, Index count) {
    Act::value(count, &z.coeffRef(t, col), &a(t, col));
  });
}

/// dz = da * act'(z), elementwise on [rows, d_hidden]. `dz` may be `z`, but not `da`.
template <Activation Act, class T>
void activation_backward(MatrixIn<T> z, MatrixIn<T> da, MatrixOut<T> dz) {
  constexpr Index kCost = 8;
  parallel_pieces(z.rows(), z.cols(), kCost, [&](Index t, Index col, Index count) {
    Act::derivative(count, &z.coeffRef(t, col), &dz(t, col));
    loops::multiply<T>(count, &dz(t, col), &da.coeffRef(t, col), &dz(t, col));
  });
}

/// Settings of `Mlp`.
struct MlpConfig {
  bool bias = false;
  double init_scale = 1.0;  ///< `scale` of `switch_init`.
};

/// The feed-forward network without a gate:
///
///     y = act(x in^T + in_bias) out^T + out_bias
///
/// Padding is not read and yields zero, see PaddingRows.
/// (Vaswani et al. 2017, arXiv:1706.03762, eq. 2.)
template <std::floating_point T, Activation Act = Relu>
class Mlp {
 public:
  using Scalar = T;

  struct Cache {
    CacheState state;
    Matrix<T> x, z, h, y;
    Matrix<T> dy, dx;
    Workspace workspace;  ///< For the gradients of hidden numbers.
    PaddingRows padding;
    Adapted<T> adapted_in, adapted_out;
  };

  /// Weights from `switch_init`; biases start at zero.
  /// \throws ConfigError  unless sizes and scale are positive.
  Mlp(Index d_model, Index d_hidden, Rng& rng, MlpConfig config = {});

  /// Takes over in [d_hidden, d_model], out [d_model, d_hidden] and, unless empty, their biases
  /// [1, d_hidden] and [1, d_model].
  /// \throws ShapeError   if they do not fit each other.
  Mlp(Matrix<T> in, Matrix<T> out, Matrix<T> in_bias = {}, Matrix<T> out_bias = {});

  /// \param x        [tokens, d_model].
  /// \return         [tokens, d_model].
  /// \throws ShapeError   if x does not have d_model columns, or pass.mask does not fit.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const;

  /// Adds to the gradients of weights and biases.
  /// \param dy       [tokens, d_model], of the last forward pass.
  /// \return         dL/dx, [tokens, d_model].
  /// \throws StateError   if the cache does not fit, see CacheState, or if the weights are stored
  ///                      for inference, see Pass::through_stored.
  /// \throws ShapeError   if dy does not have the shape of the result.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache);

  /// See `weir::set_storage`; biases stay parameters. If memory runs out, nothing has changed.
  void set_storage(Storage storage) { kernels::set_storage(std::array{&in_, &out_}, storage); }
  Storage storage() const { return in_.storage(); }

  Index d_model() const { return in_.cols(); }
  Index d_hidden() const { return in_.rows(); }

  /// The two weights have no value if they are stored for inference.
  const LinearParameter<T>& in() const { return in_.parameter(); }
  LinearParameter<T>& in() { return in_.parameter(); }
  const LinearParameter<T>& out() const { return out_.parameter(); }
  LinearParameter<T>& out() { return out_.parameter(); }
  /// The two biases are empty if there are none.
  const Parameter<T>& in_bias() const { return in_bias_; }
  Parameter<T>& in_bias() { return in_bias_; }
  const Parameter<T>& out_bias() const { return out_bias_; }
  Parameter<T>& out_bias() { return out_bias_; }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("in", self.in());
    if (self.in_bias_.value.size() != 0) visit("in_bias", self.in_bias_);
    visit("out", self.out());
    if (self.out_bias_.value.size() != 0) visit("out_bias", self.out_bias_);
  }

 private:
  void run(MatrixIn<T> x, const Pass& pass, MatrixOut<T> z, MatrixOut<T> h, Cache& cache) const {
    linear_forward<T>(x, in_, in_bias_.value, z);
    adapt<T>(in(), x, pass, z, cache.adapted_in);
    activation_forward<Act, T>(z, h);
    linear_forward<T>(h, out_, out_bias_.value, cache.y);
    adapt<T>(out(), h, pass, cache.y, cache.adapted_out);
  }

  kernels::Weight<T> in_;   // [d_hidden, d_model]
  Parameter<T> in_bias_;    // [1, d_hidden] or empty
  kernels::Weight<T> out_;  // [d_model, d_hidden]
  Parameter<T> out_bias_;   // [1, d_model] or empty
};

template <std::floating_point T, Activation Act>
Mlp<T, Act>::Mlp(Index d_model, Index d_hidden, Rng& rng, MlpConfig config) {
  expect_positive("Mlp", "d_model", d_model);
  expect_positive("Mlp", "d_hidden", d_hidden);
  in_ = kernels::Weight<T>(switch_init<T>(d_hidden, d_model, rng, config.init_scale));
  out_ = kernels::Weight<T>(switch_init<T>(d_model, d_hidden, rng, config.init_scale));
  if (config.bias) {
    in_bias_.value.setZero(1, d_hidden);
    out_bias_.value.setZero(1, d_model);
  }
}

template <std::floating_point T, Activation Act>
Mlp<T, Act>::Mlp(Matrix<T> in, Matrix<T> out, Matrix<T> in_bias, Matrix<T> out_bias)
    : in_(std::move(in)),
      in_bias_{std::move(in_bias)},
      out_(std::move(out)),
      out_bias_{std::move(out_bias)} {
  expect_shape("Mlp", "out", out_.parameter().value, d_model(), d_hidden());
  if (in_bias_.value.size() != 0) expect_shape("Mlp", "in_bias", in_bias_.value, 1, d_hidden());
  if (out_bias_.value.size() != 0) expect_shape("Mlp", "out_bias", out_bias_.value, 1, d_model());
}

template <std::floating_point T, Activation Act>
const Matrix<T>& Mlp<T, Act>::forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
  cache.state.begin();
  expect_columns("Mlp::forward", "x", x, d_model());
  cache.padding.set("Mlp::forward", pass, x.rows());
  set_shape(cache.h, x.rows(), d_hidden());
  set_shape(cache.y, x.rows(), d_model());
  if (pass.training) {
    copy_rows<T>(x, cache.x);
    cache.padding.clear(cache.x);
    set_shape(cache.z, x.rows(), d_hidden());
    run(cache.x, pass, cache.z, cache.h, cache);
  } else {
    run(x, pass, cache.h, cache.h, cache);
  }
  pass.show<T>(in_.parameter(), x);
  pass.show<T>(out_.parameter(), cache.h);
  cache.padding.clear(cache.y);
  return cache.state.finish(*this, pass, cache.y);
}

template <std::floating_point T, Activation Act>
const Matrix<T>& Mlp<T, Act>::backward(MatrixIn<T> dy, Cache& cache) {
  cache.adapted_in.expect_differentiable("Mlp::backward", in_.storage());
  cache.state.begin_backward("Mlp::backward", *this, dy);
  Workspace::Frame frame(cache.workspace);
  auto dh = frame.matrix<T>(dy.rows(), d_hidden());
  auto dz = frame.matrix<T>(dy.rows(), d_hidden());
  set_shape(cache.dx, dy.rows(), d_model());
  linear_backward<T>(cache.padding.template cleared<T>(dy, cache.dy), cache.h, out_, out_bias_, dh,
                     cache.adapted_out);
  activation_backward<Act, T>(cache.z, dh, dz);
  linear_backward<T>(dz, cache.x, in_, in_bias_, cache.dx, cache.adapted_in);
  return cache.dx;
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::Mlp<float>;
extern template class weir::Mlp<double>;
#endif
