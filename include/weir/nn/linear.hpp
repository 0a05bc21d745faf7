// SPDX-License-Identifier: MIT
/// \file
/// The affine map.
#pragma once

#include <array>
#include <concepts>
#include <span>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/init.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/low_rank.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/precision.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/core/workspace.hpp>
#include <weir/kernels/e4m3_rows.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/weight.hpp>
#include <weir/nn/adapted.hpp>
#include <weir/ops/padding.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// y = x W^T + b; x [tokens, in], W [out, in], b [1, out] or empty for none, y [tokens, out].
template <class T>
void linear_forward(MatrixIn<T> x, const kernels::Weight<T>& weight, const Matrix<T>& bias,
                    MatrixOut<T> y) {
  kernels::multiply_weights<T, 1>(x, {{{weight, y}}});
  if (bias.size() != 0) add_to_each_row<T>(bias.data(), y);
}

/// The derivative of `linear_forward` with respect to everything:
///
///     dW += dy^T x,   db += sum_t dy[t],   dx = dy W
///
/// and of what the adapters of the weight added. Where the weight is frozen or stored for
/// inference, dW is not computed, see Pass::through_stored.
///
/// \param accumulate  Whether dx is added to.
template <class T>
void linear_backward(MatrixIn<T> dy, MatrixIn<T> x, kernels::Weight<T>& weight, Parameter<T>& bias,
                     MatrixOut<T> dx, Adapted<T>& adapted, bool accumulate = false) {
  LinearParameter<T>& w = weight.parameter();
  std::array<Product<T>, 2> products = {
      input_gradient_product<T>(dy, weight.value(), dx, accumulate)};
  if (w.takes_gradient()) products[1] = weight_gradient_product<T>(dy, x, w);
  multiply<T>(std::span<const Product<T>>(products).first(w.takes_gradient() ? 2 : 1));
  if (bias.value.size() != 0) add_rows_to<T>(dy, bias.gradient().data());
  adapt_backward<T>(w, dy, x, dx, adapted);
}

/// Settings of `Linear`.
struct LinearConfig {
  bool bias = false;
  double init_scale = 1.0;  ///< `scale` of `switch_init`.
};

/// y = x W^T + b. Padding is not read and yields zero, see PaddingRows.
template <std::floating_point T>
class Linear {
 public:
  using Scalar = T;

  struct Cache {
    CacheState state;
    Matrix<T> x, y, dy, dx;  ///< dy is only used if there is padding, and so in other layers.
    kernels::E4M3Rows<T> rounded_x;  ///< Instead of x, in training in FP8.
    Workspace workspace;             ///< For x again.
    PaddingRows padding;
    Adapted<T> adapted;
  };

  /// Weights from `switch_init`; the bias starts at zero.
  /// \throws ConfigError  unless both sizes and the scale are positive.
  Linear(Index d_in, Index d_out, Rng& rng, LinearConfig config = {}) {
    expect_positive("Linear", "d_in", d_in);
    expect_positive("Linear", "d_out", d_out);
    weight_ = kernels::Weight<T>(switch_init<T>(d_out, d_in, rng, config.init_scale));
    if (config.bias) set_zero(bias_.value, 1, d_out);
  }

  /// Takes over a weight [d_out, d_in] and, unless empty, a bias [1, d_out].
  /// \throws ShapeError   if the bias does not fit the weight.
  explicit Linear(Matrix<T> weight, Matrix<T> bias = {})
      : weight_(std::move(weight)), bias_{std::move(bias)} {
    if (has_bias()) expect_shape("Linear", "bias", bias_.value, 1, d_out());
  }

  /// \param x        [tokens, d_in].
  /// \return         [tokens, d_out].
  /// \throws ShapeError   if x does not have d_in columns, or pass.mask does not fit.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const;

  /// Adds to the gradients of weight and bias.
  /// \param dy       [tokens, d_out], of the last forward pass.
  /// \return         dL/dx, [tokens, d_in].
  /// \throws StateError   if the cache does not fit, see CacheState, or if the weight is stored for
  ///                      inference, see Pass::through_stored.
  /// \throws ShapeError   if dy does not have the shape of the result.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    cache.adapted.expect_differentiable("Linear::backward", weight_.storage());
    cache.state.begin_backward("Linear::backward", *this, dy);
    set_shape(cache.dx, dy.rows(), d_in());
    const Eigen::Ref<const Matrix<T>> d = cache.padding.template cleared<T>(dy, cache.dy);
    Workspace::Frame frame(cache.workspace);
    linear_backward<T>(d, cache.rounded_x.or_else(cache.x, frame), weight_, bias_, cache.dx,
                       cache.adapted);
    return cache.dx;
  }

  /// See `weir::set_storage`; the bias stays a parameter.
  void set_storage(Storage storage) { weight_.set_storage(storage); }
  Storage storage() const { return weight_.storage(); }

  /// Changes the outputs: each is one of those before or a new one, with a row of zeros and the
  /// bias `map.cold_logit`; biases are added if that is not zero. Gradients and adapters move too.
  /// \throws StateError   if the weight is stored for inference.
  void remap_outputs(const ExpertMap& map);

  Index d_in() const { return weight_.cols(); }
  Index d_out() const { return weight_.rows(); }
  bool has_bias() const { return bias_.value.size() != 0; }

  /// Without a value if it is stored for inference.
  const LinearParameter<T>& weight() const { return weight_.parameter(); }
  LinearParameter<T>& weight() { return weight_.parameter(); }
  /// Empty if there is none.
  const Parameter<T>& bias() const { return bias_; }
  Parameter<T>& bias() { return bias_; }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("weight", self.weight_.parameter());
    if (self.has_bias()) visit("bias", self.bias_);
  }

 private:
  kernels::Weight<T> weight_;
  Parameter<T> bias_;
};

template <std::floating_point T>
void Linear<T>::remap_outputs(const ExpertMap& map) {
  expect_trainable("Linear::remap_outputs", weight_.storage());
  LinearParameter<T> weight = this->weight();
  map.remap_rows(weight);
  for (LowRank<T>& adapter : weight.adapters) map.remap_rows(adapter.b);
  Parameter<T> bias = bias_;
  if (!has_bias() && map.has_cold() && map.cold_logit != 0.0) set_zero(bias.value, 1, d_out());
  if (bias.value.size() > 0) {
    bias.value = map.columns(bias.value, static_cast<T>(map.cold_logit));
    if (bias.grad.size() > 0) bias.grad = map.columns(bias.grad, T(0));
  }
  this->weight() = std::move(weight);
  bias_ = std::move(bias);
}

template <std::floating_point T>
const Matrix<T>& Linear<T>::forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
  cache.state.begin();
  expect_columns("Linear::forward", "x", x, d_in());
  cache.padding.set("Linear::forward", pass, x.rows());
  using Rows = Eigen::Ref<const Matrix<T>>;
  const bool rounds = weight().precision() == Precision::kFp8;
  Matrix<T>& copy = rounds ? cache.dx : cache.x;  // Rounded, x is not kept a second time.
  const Rows clean = pass.training ? cache.padding.template cleared<T>(x, copy) : Rows(x);
  if (pass.training) {
    cache.rounded_x.set(clean, rounds);
    if (!rounds && cache.padding.mask().empty()) copy_rows<T>(x, cache.x);
  }
  set_shape(cache.y, x.rows(), d_out());
  pass.show<T>(weight_.parameter(), x);
  linear_forward<T>(x, weight_, bias_.value, cache.y);
  adapt<T>(weight(), clean, pass, cache.y, cache.adapted);
  cache.padding.clear(cache.y);
  return cache.state.finish(*this, pass, cache.y);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::Linear<float>;
extern template class weir::Linear<double>;
#endif
