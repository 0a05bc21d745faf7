// SPDX-License-Identifier: MIT
/// \file
/// A mixture of experts and a dense network, mixed by a learned softmax: PR-MoE.
#pragma once

#include <utility>

#include <weir/core/layer.hpp>
#include <weir/core/parallel.hpp>
#include <weir/nn/linear.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// The dense network computes every token, and the experts correct it:
///
///     y = c_1 moe(x) + c_2 dense(x),   [c_1, c_2] = softmax(x W_c^T + b_c)
///
/// W_c [2, d_model], b_c [1, 2] or none. Everything has its exact gradient.
/// (Rajbhandari et al. 2022, arXiv:2201.05596, section 4.1.2; the softmax is that of DeepSpeed's
/// `use_residual`.)
template <PassLayer Moe, Layer Dense>
class ResidualMoe {
 public:
  using Scalar = typename Moe::Scalar;
  using T = Scalar;

  struct Cache {
    typename Moe::Cache moe;
    typename Dense::Cache dense;
    typename Linear<T>::Cache mix;
    Matrix<T> share;               ///< [tokens, 2], c_1 and c_2.
    Matrix<T> moe_out, dense_out;  ///< [tokens, d_model]
    Matrix<T> d_moe, d_dense, d_share, d_logits;
    Matrix<T> y, dx;
    T aux_loss = T(0);  ///< That of the mixture.
  };

  /// \param mix      A linear map d_model -> 2, the logits of c_1 and c_2.
  /// \throws ConfigError  if it has another shape.
  ResidualMoe(Moe moe, Dense dense, Linear<T> mix)
      : moe_(std::move(moe)), dense_(std::move(dense)), mix_(std::move(mix)) {
    if (mix_.d_in() != moe_.d_model() || mix_.d_out() != 2) {
      fail<ConfigError>("ResidualMoe: the mix is [", mix_.d_out(), ", ", mix_.d_in(),
                        "], expected [2, ", moe_.d_model(), "]");
    }
  }

  Matrix<T> forward(MatrixIn<T> x) const {
    Cache cache;
    return forward(x, cache);
  }

  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const { return forward(x, {}, cache); }

  /// \param x        [tokens, d_model]. The dense network computes padding too.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    copy_rows<T>(moe_.forward(x, pass, cache.moe), cache.moe_out);
    copy_rows<T>(apply(dense_, x, pass, cache.dense), cache.dense_out);
    expect_shape("ResidualMoe::forward", "the dense network's output", cache.dense_out,
                 cache.moe_out.rows(), cache.moe_out.cols());
    cache.aux_loss = cache.moe.aux_loss;
    cache.share.resize(x.rows(), 2);
    softmax<T>(mix_.forward(x, cache.mix), cache.share);
    cache.y.resize(cache.moe_out.rows(), cache.moe_out.cols());
    parallel_pieces(cache.y.rows(), cache.y.cols(), 3, [&](Index t, Index col, Index count) {
      loops::blend<T>(count, cache.share(t, 0), &cache.moe_out(t, col), cache.share(t, 1),
                      &cache.dense_out(t, col), &cache.y(t, col));
    });
    return cache.y;
  }

  /// \param dy       [tokens, d_model], of the last forward pass.
  /// \return         dL/dx, the mixture's auxiliary losses included.
  /// \throws ShapeError   if dy does not have the shape of y.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    expect_shape("ResidualMoe::backward", "dy", dy, cache.y.rows(), cache.y.cols());
    cache.d_moe.resize(dy.rows(), dy.cols());
    cache.d_dense.resize(dy.rows(), dy.cols());
    cache.d_share.resize(dy.rows(), 2);
    parallel_rows(dy.rows(), 6 * dy.cols(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        const T* const d = &dy.coeffRef(t, 0);
        cache.d_share(t, 0) = loops::dot<T>(dy.cols(), d, &cache.moe_out(t, 0));
        cache.d_share(t, 1) = loops::dot<T>(dy.cols(), d, &cache.dense_out(t, 0));
        loops::scale<T>(dy.cols(), cache.share(t, 0), d, &cache.d_moe(t, 0));
        loops::scale<T>(dy.cols(), cache.share(t, 1), d, &cache.d_dense(t, 0));
      }
    });
    cache.d_logits.setZero(dy.rows(), 2);
    add_softmax_backward<T>(cache.share, cache.d_share, cache.d_logits);
    const Matrix<T>& d_routed = moe_.backward(cache.d_moe, cache.moe);
    cache.dx.resize(d_routed.rows(), d_routed.cols());
    add_rows<T>(d_routed, dense_.backward(cache.d_dense, cache.dense), cache.dx);
    add_rows<T>(cache.dx, mix_.backward(cache.d_logits, cache.mix), cache.dx);
    return cache.dx;
  }

  /// See MoELayer::update.
  void update() {
    if constexpr (requires { moe_.update(); }) moe_.update();
  }

  /// See MoELayer::report.
  auto report(const Cache& cache) const { return moe_.report(cache.moe); }

  /// The mixture's members, `dense.*` and `mix.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    Moe::visit(self.moe_, visit);
    visit("dense", self.dense_);
    visit("mix", self.mix_);
  }

  Index d_model() const { return moe_.d_model(); }

  Moe& moe() { return moe_; }
  const Moe& moe() const { return moe_; }
  Dense& dense() { return dense_; }
  const Dense& dense() const { return dense_; }

 private:
  Moe moe_;
  Dense dense_;
  Linear<T> mix_;
};

}  // namespace weir
