// SPDX-License-Identifier: MIT
/// \file
/// Experts that are two-matrix feed-forward networks: Switch, GShard, Shazeer 2017.
#pragma once

#include <concepts>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/init.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/storage.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/packed_product.hpp>
#include <weir/kernels/weight.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/ops/activation.hpp>
#include <weir/ops/lanes.hpp>

namespace weir {

/// Settings of MlpBank.
struct MlpBankConfig {
  bool bias = false;
  double init_scale = 0.1;  ///< Of switch_init.
};

/// `experts` networks
///
///     E_e(x) = act(x W1_e^T + b1_e) W2_e^T + b2_e
///
/// with W1_e [d_hidden, d_model] and W2_e [d_model, d_hidden], the biases optional, computed for
/// all experts at once on the packed slots. (Fedus et al. 2021, arXiv:2101.03961, act = ReLU.)
template <std::floating_point T, Activation Act = Relu>
class MlpBank {
 public:
  using Scalar = T;

  struct Cache {
    Scratch<T> x, inner, hidden, out;               ///< [slots, .], from forward
    Scratch<T> d_out, d_hidden, d_inner, d_packed;  ///< [slots, .], from backward
    Matrix<T> y, dx;                                ///< [tokens, .]
    std::vector<Product<T>> products;
    std::vector<kernels::PackedTo<T>> packed;
  };

  /// Initialised like Switch's experts, with the fan-in of one expert; biases zero.
  /// \throws ConfigError  if a size is below 1.
  MlpBank(Index experts, Index d_model, Index d_hidden, Rng& rng, MlpBankConfig config = {}) {
    expect_at_least<Index>("MlpBank", "experts", experts, 1);
    expect_at_least<Index>("MlpBank", "d_model", d_model, 1);
    expect_at_least<Index>("MlpBank", "d_hidden", d_hidden, 1);
    for (Index e = 0; e < experts; ++e) {
      in_.emplace_back(switch_init<T>(d_hidden, d_model, rng, config.init_scale));
      out_.emplace_back(switch_init<T>(d_model, d_hidden, rng, config.init_scale));
      if (config.bias) {
        in_bias_.push_back({Matrix<T>::Zero(1, d_hidden)});
        out_bias_.push_back({Matrix<T>::Zero(1, d_model)});
      }
    }
  }

  /// From existing weights, one of each per expert; biases [1, .] one per expert, or none at all.
  /// \throws ConfigError  without experts or with different numbers of weights.
  /// \throws ShapeError   if a weight's shape does not fit the others.
  MlpBank(std::vector<Matrix<T>> in, std::vector<Matrix<T>> out,
          std::vector<Matrix<T>> in_bias = {}, std::vector<Matrix<T>> out_bias = {}) {
    if (in.empty() || in.size() != out.size() || in_bias.size() != out_bias.size() ||
        (!in_bias.empty() && in_bias.size() != in.size())) {
      fail<ConfigError>("MlpBank: ", in.size(), " in, ", out.size(), " out, ", in_bias.size(),
                        " in_bias and ", out_bias.size(),
                        " out_bias weights, expected one of each per expert, or no biases");
    }
    for (std::size_t e = 0; e < in.size(); ++e) {
      const std::string which = "[" + std::to_string(e) + "]";
      expect_shape("MlpBank", "in" + which, in[e], in[0].rows(), in[0].cols());
      expect_shape("MlpBank", "out" + which, out[e], out[0].rows(), in[0].rows());
      if (!in_bias.empty()) {
        expect_shape("MlpBank", "in_bias" + which, in_bias[e], 1, in[0].rows());
        expect_shape("MlpBank", "out_bias" + which, out_bias[e], 1, out[0].rows());
      }
    }
    for (Matrix<T>& weight : in) in_.emplace_back(std::move(weight));
    for (Matrix<T>& weight : out) out_.emplace_back(std::move(weight));
    for (Matrix<T>& bias : in_bias) in_bias_.push_back({std::move(bias)});
    for (Matrix<T>& bias : out_bias) out_bias_.push_back({std::move(bias)});
  }

  const Matrix<T>& forward(MatrixIn<T> x, const Dispatch<T>& dispatch, Cache& cache) const {
    const Index slots = dispatch.slots();
    gather<T>(x, dispatch, cache.x.reshape(slots, d_in()));
    auto inner = cache.inner.reshape(slots, d_hidden());
    auto hidden = cache.hidden.reshape(slots, d_hidden());
    auto out = cache.out.reshape(slots, d_out());

    multiply_all(cache.x.view(), in_, in_bias_, dispatch, inner, cache);
    activation_forward<Act, T>(inner, hidden);
    multiply_all(hidden, out_, out_bias_, dispatch, out, cache);

    cache.y.resize(x.rows(), d_out());
    combine<T>(out, dispatch, cache.y);
    return cache.y;
  }

  /// The gradients of experts without tokens are left alone.
  /// \throws StateError   if the weights are stored for inference.
  const Matrix<T>& backward(MatrixIn<T> dy, const Dispatch<T>& dispatch, std::span<T> d_weight,
                            Cache& cache) {
    expect_trainable("MlpBank::backward", in_[0].storage());
    const Index slots = dispatch.slots();
    auto d_out_packed = cache.d_out.reshape(slots, d_out());
    auto d_hidden_packed = cache.d_hidden.reshape(slots, d_hidden());
    auto d_inner = cache.d_inner.reshape(slots, d_hidden());
    auto d_packed = cache.d_packed.reshape(slots, d_in());

    combine_backward<T>(dy, cache.out.view(), dispatch, d_out_packed, d_weight);
    backward_all(d_out_packed, cache.hidden.view(), out_, out_bias_, dispatch, d_hidden_packed,
                 cache);
    activation_backward<Act, T>(cache.inner.view(), d_hidden_packed, d_inner);
    backward_all(d_inner, cache.x.view(), in_, in_bias_, dispatch, d_packed, cache);

    cache.dx.resize(dy.rows(), d_in());
    gather_backward<T>(d_packed, dispatch, cache.dx);
    return cache.dx;
  }

  /// See `weir::set_storage`; biases stay parameters.
  void set_storage(Storage storage) {
    for (kernels::Weight<T>& weight : in_) weight.set_storage(storage);
    for (kernels::Weight<T>& weight : out_) weight.set_storage(storage);
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    for (std::size_t e = 0; e < self.in_.size(); ++e) {
      const std::string expert = std::to_string(e);
      const bool trainable = self.in_[e].storage() == Storage::kTrainable;
      if (trainable) visit(expert + ".in", self.in_[e].parameter());
      if (!self.in_bias_.empty()) visit(expert + ".in_bias", self.in_bias_[e]);
      if (trainable) visit(expert + ".out", self.out_[e].parameter());
      if (!self.out_bias_.empty()) visit(expert + ".out_bias", self.out_bias_[e]);
    }
  }

  Index experts() const { return static_cast<Index>(in_.size()); }
  Index d_in() const { return in_[0].cols(); }
  Index d_hidden() const { return in_[0].rows(); }
  Index d_out() const { return out_[0].rows(); }

 private:
  /// y_e = x_e W_e^T + b_e for each expert's slots.
  static void multiply_all(MatrixIn<T> x, const std::vector<kernels::Weight<T>>& weight,
                           const std::vector<Parameter<T>>& bias, const Dispatch<T>& dispatch,
                           MatrixOut<T> y, Cache& cache) {
    cache.products.clear();
    cache.packed.clear();
    dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
      auto y_e = y.middleRows(begin, rows);
      if (weight[e].storage() == Storage::kTrainable) {
        if (!bias.empty()) y_e.rowwise() = bias[e].value.row(0);
        cache.products.push_back(product_nt<T>(x.middleRows(begin, rows),
                                               weight[e].parameter().value, y_e, !bias.empty()));
      } else {
        cache.packed.push_back({&weight[e].packed(), begin, rows, y_e.data(), y.outerStride()});
      }
    });
    multiply<T>(cache.products);
    kernels::multiply_packed<T>(x, cache.packed);
    if (cache.packed.empty() || bias.empty()) return;
    dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
      y.middleRows(begin, rows).rowwise() += bias[e].value.row(0);
    });
  }

  /// The derivative of `multiply_all`: dx_e = dy_e W_e, and the gradients of W_e and b_e.
  static void backward_all(MatrixIn<T> dy, MatrixIn<T> x, std::vector<kernels::Weight<T>>& weight,
                           std::vector<Parameter<T>>& bias, const Dispatch<T>& dispatch,
                           MatrixOut<T> dx, Cache& cache) {
    cache.products.clear();
    dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
      const auto dy_e = dy.middleRows(begin, rows);
      Parameter<T>& w = weight[e].parameter();
      cache.products.push_back(product_nn<T>(dy_e, w.value, dx.middleRows(begin, rows)));
      cache.products.push_back(product_tn<T>(dy_e, x.middleRows(begin, rows), w.gradient(), true));
      if (!bias.empty()) {
        add_over_rows<T>(rows, dy.cols(), bias[e].gradient().data(),
                         [&](Index r, Index col, Index count) {
                           return load_lanes<T>(&dy.coeffRef(begin + r, col), count);
                         });
      }
    });
    multiply<T>(cache.products);
  }

  std::vector<kernels::Weight<T>> in_, out_;
  std::vector<Parameter<T>> in_bias_, out_bias_;
};

}  // namespace weir
