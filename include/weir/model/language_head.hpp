// SPDX-License-Identifier: MIT
/// \file
/// The part of a decoder that turns hidden states into logits.
#pragma once

#include <concepts>
#include <optional>
#include <utility>

#include <weir/core/cache_state.hpp>
#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/packed_product.hpp>
#include <weir/model/logit_scale.hpp>
#include <weir/nn/embedding.hpp>
#include <weir/nn/linear.hpp>
#include <weir/ops/padding.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// logits = scale(x W^T): W [vocab, d_model] is a matrix of its own or, tied, the embedding, which
/// is given to each call. For `scale`, see LogitScale. Padding is not read and yields zero, see
/// PaddingRows.
template <std::floating_point T>
class LanguageHead {
 public:
  using Scalar = T;

  struct Cache {
    CacheState state;
    typename Linear<T>::Cache linear;  ///< The cache of a matrix of its own.
    Matrix<T> x, dx;                   ///< [tokens, d_model], where the head is tied.
    Matrix<T> dz;                      ///< [tokens, vocab], where it is tied and there is padding.
    PaddingRows padding;               ///< Where the head is tied.
    Matrix<T> logits, d_z;             ///< [tokens, vocab], where it is tied or logits are scaled.
  };

  /// \param linear   Empty for a tied head.
  /// \throws ConfigError  if the scale is out of range; the message names `where`.
  LanguageHead(std::string_view where, std::optional<Linear<T>> linear, LogitScale<T> scale)
      : linear_(std::move(linear)), scale_(scale) {
    scale_.check(where);
  }

  /// \param x        [rows, d_model]
  /// \return         [rows, vocab]
  const Matrix<T>& forward(MatrixIn<T> x, const Embedding<T>& embedding, const Pass& pass,
                           Cache& cache) const;

  /// Adds to the gradient of the head or, tied, of the embedding.
  /// \param d_logits  [rows, vocab], of the last forward pass with `cache`.
  /// \return         dL/dx, [rows, d_model].
  /// \throws StateError   if the cache does not fit, see CacheState, or if the weight is stored for
  ///                      inference.
  /// \throws ShapeError   if d_logits does not have the shape of the logits.
  const Matrix<T>& backward(MatrixIn<T> d_logits, Embedding<T>& embedding, Cache& cache);

  /// The logits of the last forward pass with `cache`.
  const Matrix<T>& logits(const Cache& cache) const {
    return linear_ && scale_.is_identity() ? cache.linear.y : cache.logits;
  }

  /// Where the gradient of these logits may be written before `backward`: in their own place, if
  /// `backward` does not need them.
  Matrix<T>& gradient_place(Cache& cache) const {
    if (scale_.is_identity()) return linear_ ? cache.linear.y : cache.logits;
    set_shape(cache.d_z, cache.logits.rows(), cache.logits.cols());
    return cache.d_z;
  }

  /// A head as `weir::set_storage` sees it: a tied one is stored beside the embedding.
  class Stored {
   public:
    static constexpr bool kTrainsInFull = true;  ///< See `set_precision`.

    Stored(LanguageHead& head, Embedding<T>& embedding) : head_(head), embedding_(embedding) {}

    void set_storage(Storage storage) { head_.set_storage(storage, embedding_); }
    Storage storage() const { return head_.storage(); }

    template <class Self, class Visit>
    static void visit(Self& self, Visit& visit) {
      if (self.head_.linear_) return visit("", *self.head_.linear_);
      if (self.storage() == Storage::kTrainable) visit("weight", self.embedding_.weight());
    }

   private:
    LanguageHead& head_;
    Embedding<T>& embedding_;
  };

  Storage storage() const { return linear_ ? linear_->storage() : tied_storage_; }

  /// Whether the weight is the embedding.
  bool is_tied() const { return !linear_; }
  /// Whether the weight is the embedding, stored for inference.
  bool is_tied_and_stored() const { return !tied_.empty(); }

  const std::optional<Linear<T>>& linear() const { return linear_; }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    if (self.linear_) visit("", *self.linear_);
  }

 private:
  void set_storage(Storage storage, const Embedding<T>& embedding) {
    if (linear_) return linear_->set_storage(storage);
    if (storage == tied_storage_) return;
    tied_ = storage == Storage::kTrainable
                ? kernels::PackedWeight<T>()
                : kernels::PackedWeight<T>(embedding.weight().value, storage);
    tied_storage_ = storage;
  }

  const Matrix<T>& tied_forward(MatrixIn<T> x, const Embedding<T>& embedding, const Pass& pass,
                                Cache& cache) const;

  const Matrix<T>& product_backward(MatrixIn<T> dz, Embedding<T>& embedding, Cache& cache) {
    if (linear_) return linear_->backward(dz, cache.linear);
    set_shape(cache.dx, dz.rows(), embedding.d_model());
    const Eigen::Ref<const Matrix<T>> d = cache.padding.template cleared<T>(dz, cache.dz);
    multiply_nn<T>(d, embedding.weight().value, cache.dx);
    multiply_tn<T>(d, cache.x, embedding.weight().gradient(), true);
    return cache.dx;
  }

  std::optional<Linear<T>> linear_;
  LogitScale<T> scale_;
  kernels::PackedWeight<T> tied_;  // Empty unless the head is tied and stored for inference.
  Storage tied_storage_ = Storage::kTrainable;
};

template <std::floating_point T>
const Matrix<T>& LanguageHead<T>::forward(MatrixIn<T> x, const Embedding<T>& embedding,
                                          const Pass& pass, Cache& cache) const {
  cache.state.begin();
  const Matrix<T>& z =
      linear_ ? linear_->forward(x, pass, cache.linear) : tied_forward(x, embedding, pass, cache);
  if (scale_.is_identity()) return cache.state.finish(*this, pass, z);
  set_shape(cache.logits, z.rows(), z.cols());
  scale_.forward(z, cache.logits);
  return cache.state.finish(*this, pass, cache.logits);
}

template <std::floating_point T>
const Matrix<T>& LanguageHead<T>::backward(MatrixIn<T> d_logits, Embedding<T>& embedding,
                                           Cache& cache) {
  expect_trainable("LanguageHead::backward", tied_storage_);  // Linear checks its own.
  cache.state.begin_backward("LanguageHead::backward", *this, d_logits, "d_logits");
  if (scale_.is_identity()) return product_backward(d_logits, embedding, cache);
  set_shape(cache.d_z, d_logits.rows(), d_logits.cols());
  scale_.backward(cache.logits, d_logits, cache.d_z);
  return product_backward(cache.d_z, embedding, cache);
}

template <std::floating_point T>
const Matrix<T>& LanguageHead<T>::tied_forward(MatrixIn<T> x, const Embedding<T>& embedding,
                                               const Pass& pass, Cache& cache) const {
  cache.padding.set("LanguageHead::forward", pass, x.rows());
  if (pass.training) {
    copy_rows<T>(x, cache.x);
    cache.padding.clear(cache.x);
  }
  set_shape(cache.logits, x.rows(), embedding.vocab());
  if (tied_.empty()) {
    multiply_nt<T>(x, embedding.weight().value, cache.logits);
  } else {
    const kernels::PackedTo<T> to = {&tied_, 0, x.rows(), cache.logits.data(), embedding.vocab()};
    kernels::multiply_packed<T>(x, {&to, 1});
  }
  cache.padding.clear(cache.logits);
  return cache.logits;
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::LanguageHead<float>;
extern template class weir::LanguageHead<double>;
#endif
