// SPDX-License-Identifier: MIT
/// \file
/// A mixture of experts and a dense network, mixed by a learned softmax: PR-MoE.
#pragma once

#include <utility>

#include <weir/core/layer.hpp>
#include <weir/core/parallel.hpp>
#include <weir/moe/concepts.hpp>
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
template <Layer Moe, Layer Dense>
class ResidualMoE {
 public:
  using Scalar = typename Moe::Scalar;
  using T = Scalar;

  struct Cache {
    CacheState state;
    typename Moe::Cache moe;
    typename Dense::Cache dense;
    typename Linear<T>::Cache mix;
    Matrix<T> share;               ///< [tokens, 2], c_1 and c_2.
    Matrix<T> moe_out, dense_out;  ///< [tokens, d_model]
    Matrix<T> d_moe, d_dense, d_share, d_logits;
    Matrix<T> y, dx;
  };

  /// \param mix      A linear map d_model -> 2, the logits of c_1 and c_2.
  /// \throws ConfigError  if it has another shape.
  ResidualMoE(Moe moe, Dense dense, Linear<T> mix)
      : moe_(std::move(moe)), dense_(std::move(dense)), mix_(std::move(mix)) {
    if (mix_.d_in() != moe_.d_model() || mix_.d_out() != 2) {
      throw_error<ConfigError>("ResidualMoE: the mix is [", mix_.d_out(), ", ", mix_.d_in(),
                               "], expected [2, ", moe_.d_model(), "]");
    }
  }

  /// \param x        [tokens, d_model]. The dense network computes padding too.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    copy_rows<T>(moe_.forward(x, pass, cache.moe), cache.moe_out);
    copy_rows<T>(forward_dense(x, pass, cache), cache.dense_out);
    expect_shape("ResidualMoE::forward", "the dense network's output", cache.dense_out,
                 cache.moe_out.rows(), cache.moe_out.cols());
    set_shape(cache.share, x.rows(), 2);
    softmax<T>(mix_.forward(x, pass, cache.mix), cache.share);
    set_shape(cache.y, cache.moe_out.rows(), cache.moe_out.cols());
    parallel_pieces(cache.y.rows(), cache.y.cols(), 3, [&](Index t, Index col, Index count) {
      loops::blend<T>(count, cache.share(t, 0), &cache.moe_out(t, col), cache.share(t, 1),
                      &cache.dense_out(t, col), &cache.y(t, col));
    });
    return cache.state.finish(*this, pass, cache.y);
  }

  /// \param dy       [tokens, d_model], of the last forward pass.
  /// \return         dL/dx, the mixture's auxiliary losses included.
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if dy does not have the shape of y.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    cache.state.begin_backward("ResidualMoE::backward", *this, dy);
    set_shape(cache.d_moe, dy.rows(), dy.cols());
    set_shape(cache.d_dense, dy.rows(), dy.cols());
    set_shape(cache.d_share, dy.rows(), 2);
    parallel_rows(dy.rows(), 6 * dy.cols(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        const T* const d = &dy.coeffRef(t, 0);
        cache.d_share(t, 0) = loops::dot<T>(dy.cols(), d, &cache.moe_out(t, 0));
        cache.d_share(t, 1) = loops::dot<T>(dy.cols(), d, &cache.dense_out(t, 0));
        loops::scale<T>(dy.cols(), cache.share(t, 0), d, &cache.d_moe(t, 0));
        loops::scale<T>(dy.cols(), cache.share(t, 1), d, &cache.d_dense(t, 0));
      }
    });
    set_zero(cache.d_logits, dy.rows(), 2);
    add_softmax_backward<T>(cache.share, cache.d_share, cache.d_logits);
    const Matrix<T>& d_routed = moe_.backward(cache.d_moe, cache.moe);
    set_shape(cache.dx, d_routed.rows(), d_routed.cols());
    add_rows<T>(d_routed, dense_.backward(cache.d_dense, cache.dense), cache.dx);
    add_rows<T>(cache.dx, mix_.backward(cache.d_logits, cache.mix), cache.dx);
    return cache.dx;
  }

  /// The mixture's members, `dense.*` and `mix.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.moe_);
    visit("dense", self.dense_);
    visit("mix", self.mix_);
  }
  /// The mix keeps full precision in every storage.
  template <class Self, class Visit>
  static void visit_stored(Self& self, Visit& visit) {
    visit("", self.moe_);
    visit("dense", self.dense_);
  }

  Index d_model() const { return moe_.d_model(); }
  Index experts() const requires HasExperts<Moe> { return moe_.experts(); }

  Moe& moe() { return moe_; }
  const Moe& moe() const { return moe_; }
  Dense& dense() { return dense_; }
  const Dense& dense() const { return dense_; }

 private:
  const Matrix<T>& forward_dense(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    const PassRecord::Scope scope(pass.record, "dense");
    return dense_.forward(x, pass, cache.dense);
  }

  Moe moe_;
  Dense dense_;
  Linear<T> mix_;
};

}  // namespace weir
