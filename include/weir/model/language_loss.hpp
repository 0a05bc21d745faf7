// SPDX-License-Identifier: MIT
/// \file
/// The loss of a language model without its logits as a whole.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstdint>
#include <span>
#include <utility>

#include <weir/core/cache_state.hpp>
#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/token_ids.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/language_head.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// Settings of `LanguageLoss`.
struct LanguageLossConfig {
  CrossEntropyConfig cross_entropy = {};
  /// How many tokens have logits at a time. 0: as many as have 64 MiB of them, but at least 128.
  Index slice = 0;
};

/// CrossEntropy of a decoder's logits, computed from what the head is given, a slice of tokens
/// after the other. Logits of 512 tokens and a vocabulary of 128,000 take 262 MB in float, and
/// CrossEntropy with a head holds them three times; here they exist for one slice, once (three
/// times if the decoder scales them).
///
///     const Matrix<float>& x = model.forward_to_head(ids, pass, cache);
///     const float value = loss.forward(model, x, targets, pass, loss_cache);
///     model.backward_from_head(loss.backward(model, loss_cache), cache);
///
/// The loss has the value of CrossEntropy to rounding, as do gradients. Where there is more than
/// one slice, `backward` computes the logits of all but the last anew: a fourth product where the
/// head has three.
template <std::floating_point T>
class LanguageLoss {
 public:
  using Scalar = T;

  struct Cache {
    CacheState state;
    typename CrossEntropy<T>::Cache loss;  ///< nll, z_loss and tokens: see there.
    /// The logits of some slice.
    struct Slice {
      typename Decoder<T>::HeadCache head;
      Index first = 0;  ///< Its first token.
    };
    std::array<Slice, 2> slices;  ///< One for slices of full size, one for a smaller one.
    List<std::uint8_t> mask;      ///< The padding of the pass.
    Matrix<T> x, dx;              ///< [tokens, d_model]
    Index slice = 0;              ///< How many tokens a slice has.
  };

  /// \throws ConfigError  if a setting is out of range.
  explicit LanguageLoss(LanguageLossConfig config = {})
      : config_(config), loss_(config.cross_entropy) {
    expect_at_least<Index>("LanguageLoss", "slice", config_.slice, 0);
  }

  const LanguageLossConfig& config() const { return config_; }

  /// \param x        [tokens, d_model], what the head of `model` is given.
  /// \param targets  See CrossEntropy, as for `tokens` and `learned`.
  /// \param pass     Its padding and whether it trains are used.
  /// \param learned  The mask of CrossEntropy.
  /// \return         The loss; 0 if there is nothing to predict.
  /// \throws          As Decoder::head and CrossEntropy::forward do.
  T forward(const Decoder<T>& model, MatrixIn<T> x, TokenIds targets, const Pass& pass,
            Cache& cache, Index tokens = 0, std::span<const std::uint8_t> learned = {}) const;

  /// Adds to the gradient of the head or, tied, of the embedding.
  /// \param scale    What the gradient is multiplied by, such as a loss scale.
  /// \return         scale * d(loss)/dx, [tokens, d_model].
  /// \throws StateError   if the cache does not fit, see CacheState.
  const Matrix<T>& backward(Decoder<T>& model, Cache& cache, T scale = T(1)) const;

 private:
  Index slice_of(Index vocab) const {
    constexpr Index kBytes = Index{64} << 20U;
    constexpr Index kFewest = 128;
    if (config_.slice > 0) return config_.slice;
    return std::max(kFewest, kBytes / (vocab * static_cast<Index>(sizeof(T))));
  }

  using Slice = typename Cache::Slice;

  /// Where the slice from token `first` on has its logits.
  static Slice& slice_at(Index first, Index rows, Cache& cache) {
    return cache.slices[rows - first < cache.slice ? 1 : 0];
  }

  /// Computes the logits of the slice from token `first` on.
  const Matrix<T>& logits(const Decoder<T>& model, MatrixIn<T> x, Index first, bool training,
                          Cache& cache) const {
    const Index count = std::min(cache.slice, x.rows() - first);
    Pass pass = {.training = training};
    if (!cache.mask.empty()) pass.mask = span_of(cache.mask.data() + first, count);
    Slice& slice = slice_at(first, x.rows(), cache);
    slice.first = first;
    return model.head(x.middleRows(first, count), pass, slice.head);
  }

  LanguageLossConfig config_;
  CrossEntropy<T> loss_;
};

template <std::floating_point T>
T LanguageLoss<T>::forward(const Decoder<T>& model, MatrixIn<T> x, TokenIds targets,
                           const Pass& pass, Cache& cache, Index tokens,
                           std::span<const std::uint8_t> learned) const {
  cache.state.begin();
  expect_columns("LanguageLoss::forward", "x", x, model.d_model());
  Pass{.mask = pass.mask}.check("LanguageLoss::forward", x.rows());
  cache.mask.assign(pass.mask.begin(), pass.mask.end());
  cache.slice = slice_of(model.vocab());
  loss_.begin(x.rows(), model.vocab(), targets, cache.loss, tokens, learned);
  for (Index first = 0; first < x.rows(); first += cache.slice) {
    loss_.add_rows(logits(model, x, first, pass.training, cache), first, cache.loss);
  }
  if (pass.training) copy_rows<T>(x, cache.x);
  set_shape(cache.dx, pass.training ? x.rows() : 0, x.cols());
  const T loss = loss_.end(cache.loss);
  cache.state.finish(model, pass, cache.dx);
  return loss;
}

template <std::floating_point T>
const Matrix<T>& LanguageLoss<T>::backward(Decoder<T>& model, Cache& cache, T scale) const {
  cache.state.begin_backward("LanguageLoss::backward", model, cache.dx);
  const Index slices = (cache.x.rows() + cache.slice - 1) / cache.slice;
  for (Index i = slices; i-- > 0;) {  // Begins with the slices whose logits are there.
    const Index first = i * cache.slice;
    Slice& slice = slice_at(first, cache.x.rows(), cache);
    if (slice.first != first) logits(model, cache.x, first, true, cache);
    const LanguageHead<T>& head = model.language_head();
    Matrix<T>& d_logits = head.gradient_place(slice.head);
    loss_.backward_rows(head.logits(slice.head), first, cache.loss, scale, d_logits);
    cache.dx.middleRows(first, d_logits.rows()) = model.head_backward(d_logits, slice.head);
  }
  return cache.dx;
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::LanguageLoss<float>;
extern template class weir::LanguageLoss<double>;
#endif
